"""What several commands need: results, and arguments that mean the same everywhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from ..backbones import BACKBONES
from ..config import EDiTConfig
from ..errors import EDiTError

__all__ = [
    "DTYPES",
    "Result",
    "add_config_arguments",
    "add_model_arguments",
    "config_of",
    "device_of",
    "progress",
    "usable_device",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

T = TypeVar("T")


class Result(NamedTuple):
    """What a command has to say: to people, and to machines."""

    text: str
    data: Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", choices=[*BACKBONES, "both"], default="both", help="which transformer")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of weights and computation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compression",
        type=int,
        default=EDiTConfig.compression,
        help="ConvFusion works on this many times fewer channels",
    )
    parser.add_argument("--layers", default="all", help='transformer blocks: "all", "none" or "0, 3-9, 27"')


def config_of(options: Any) -> EDiTConfig:
    return EDiTConfig(compression=options.compression)


def device_of(options: Any) -> torch.device:
    return usable_device(options.device)


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        EDiTError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EDiTError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def backbones_of(options: Any) -> list[str]:
    return list(BACKBONES) if options.backbone == "both" else [options.backbone]


def progress(steps: Iterable[T], total: int, label: str) -> Iterable[T]:
    """A progress bar on a terminal; nothing where stderr is not one."""
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=label, total=total, leave=False, disable=not sys.stderr.isatty())
