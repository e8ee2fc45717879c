"""What several commands need: results, and arguments that mean the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from ..backbones import BACKBONES, Backbone
from ..config import CHOICES, DEFAULT, PRESETS, WITHOUT_WEIGHTS, EDiTConfig
from ..errors import EDiTError
from ..runtime import DTYPES, usable_device
from ..text import decode_text
from ..weights import EDiTWeights
from ..weights.differences import Trainable

__all__ = [
    "Result",
    "add_backbone_argument",
    "add_config_arguments",
    "add_device_argument",
    "add_device_arguments",
    "add_student_arguments",
    "add_trainable_arguments",
    "backbones_of",
    "config_of",
    "device_of",
    "read_prompts",
    "student_of",
]


_ALL = "all"


class Result(NamedTuple):
    """What a command has to say: to people, and to machines."""

    text: str
    data: Any


def add_backbone_argument(parser: argparse.ArgumentParser, names: Collection[str] = tuple(BACKBONES)) -> None:
    parser.add_argument("--backbone", choices=[*names, _ALL], default=_ALL, help="which transformer")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of weights and computation")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")


_FIELDS = {
    "kernel": "what makes features of queries and keys; softmax stays quadratic, over compressed keys; piecewise pools "
    "what matters least",
    "query": "what is added to the base's queries",
    "key": "what becomes of the base's keys, and with compressor of its values",
    "joint": "SD3.5: joint attentions are linear between image tokens alone, or between all",
    "quality": "piecewise: how much of a picture each query attends to in full",
}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", choices=PRESETS, default=DEFAULT, help="a form of attention; what follows changes its fields"
    )
    parser.add_argument(
        "--compression",
        type=int,
        default=argparse.SUPPRESS,
        help="ConvFusion, or LinFusion's MLP, works on this many times fewer channels "
        f"(default: {EDiTConfig.compression})",
    )
    for name, text in _FIELDS.items():
        parser.add_argument(
            f"--{name}", choices=CHOICES[name], default=argparse.SUPPRESS, help=f"{text} (default: the preset's)"
        )
    parser.add_argument(
        "--local",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="image tokens also get the values around them (default: the preset's)",
    )
    parser.add_argument("--layers", default="all", help='transformer blocks: "all", "none" or "0, 3-9, 27"')


def add_trainable_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trainable",
        choices=get_args(Trainable),
        default="side",
        help="low_rank or full also make room for changes to the base's attention linears",
    )
    parser.add_argument("--rank", type=int, default=16, help="with --trainable low_rank: the rank of each change")


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands in for the teacher, for :func:`student_of`."""
    parser.add_argument("--weights", help="the student: EDiT weights for the teacher")
    parser.add_argument("--preset", choices=[WITHOUT_WEIGHTS], help="instead of --weights: attention that needs none")
    parser.add_argument(
        "--quality",
        choices=CHOICES["quality"],
        help=f"with --preset: {_FIELDS['quality'].partition(': ')[2]}; {EDiTConfig.quality} by default",
    )


def student_of(options: Any) -> EDiTWeights | EDiTConfig:
    """What :func:`add_student_arguments` asks for.

    Raises:
        EDiTError: not one of the two, or weights that cannot be read.
    """
    if (options.weights is None) == (options.preset is None):
        raise EDiTError(f"give either --weights FILE or --preset {WITHOUT_WEIGHTS}, which needs no weights")
    if options.preset is not None:
        return EDiTConfig.preset(options.preset, **({"quality": options.quality} if options.quality else {}))
    if options.quality is not None:
        raise EDiTError(f"--quality is of --preset {WITHOUT_WEIGHTS}: what a file's students compute is in the file")
    return EDiTWeights.load(options.weights)


def config_of(options: Any) -> EDiTConfig:
    given = {name: value for name, value in vars(options).items() if name in ("compression", "local", *_FIELDS)}
    return EDiTConfig.preset(options.preset, **given)


def read_prompts(path: str) -> tuple[str, ...]:
    """The lines of a text file, without empty ones.

    Raises:
        EDiTError: it cannot be read, or holds none.
    """
    try:
        text = decode_text(Path(path).read_bytes())
    except FileNotFoundError:
        raise EDiTError(f"{path}: there is no such file of prompts") from None
    except (OSError, ValueError) as error:
        raise EDiTError(f"{path}: cannot be read as text ({error})") from None
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise EDiTError(f"{path}: holds no prompt; write one per line")
    return prompts


def device_of(options: Any) -> torch.device:
    return usable_device(options.device)


def backbones_of(options: Any, names: Collection[str] = tuple(BACKBONES)) -> list[Backbone]:
    return [BACKBONES[name] for name in (names if options.backbone == _ALL else [options.backbone])]
