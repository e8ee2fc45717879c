"""Time attention with EDiT and without, one layer of it or whole transformers, of real dimensions.

Contenders take turns in one process: the model's own softmax attention (`teacher`), EDiT's presets and what they are
compared with, other softmax kernels where their packages are installed, and the `limit`, the same model with its
softmax free of charge. The weights are random, since speed does not depend on them. Memory is what a call holds beyond
weights and inputs: by the allocator's statistics on CUDA, by the profiler's record of allocations on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from .. import crossover
from ..backbones import Backbone
from ..bench import CONTENDERS, LEVELS, Measurement, draw, measure, table, verify
from ..config import DEFAULT, PRESETS, WITHOUT_WEIGHTS
from ..errors import EDiTError
from ..files import write_file
from ..runtime import DTYPES, progress
from ..world import BACKBONES as SHOWN
from .common import Result, add_backbone_argument, add_device_argument, backbones_of, device_of

_DEFAULTS: dict[str, Any] = {
    "level": ["layer"],
    "contenders": None,
    "dtype": "float32",
    "sizes": [1024],
    "batch": [1],
    "repeats": 3,
    "blocks": None,
}
_LINEAR = ["paper", DEFAULT, "sana", WITHOUT_WEIGHTS, "limit"]
_PRESETS: dict[str, list[dict[str, Any]]] = {
    "readme": [
        {"level": ["layer"], "contenders": ["teacher", *PRESETS, "limit"], "sizes": [1024, 2048]},
        {"level": ["layer"], "contenders": _LINEAR, "sizes": [4096], "repeats": 2},
        {"level": ["transformer"], "contenders": ["teacher", *_LINEAR], "blocks": 2},
        {"level": ["transformer"], "contenders": ["teacher", *_LINEAR], "sizes": [2048], "blocks": 1, "repeats": 2},
    ],
}
"""By name, what differs from the defaults in each of its parts; `readme` measures what the README's table shows."""
_CROSSOVER: dict[str, Any] = {"contenders": ["teacher", DEFAULT], "sizes": [256, 384, 512, 768, 1024, 1536, 2048]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_argument(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--preset",
        choices=_PRESETS,
        default=None,
        help="readme: what the README's table shows; what follows changes it",
    )

    def add(name: str, help: str, **options: Any) -> None:
        default = _DEFAULTS[name]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default or "all that can run here"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{help} (default: {shown})", **options)

    add("level", "one layer's self-attentions with their projections, or the transformer", nargs="+", choices=LEVELS)
    add(
        "contenders",
        f"what takes turns: {', '.join(CONTENDERS)}; a preset's fields may differ, as in paper:compression=8",
        nargs="+",
    )
    add("dtype", "dtype of weights and computation", choices=DTYPES)
    add("sizes", "pixels per side of the square pictures; 1024 are 4096 tokens", nargs="+", type=int)
    add("batch", "pictures per call; 2 as with classifier-free guidance", nargs="+", type=int)
    add("repeats", "timed rounds, after one to warm up and one for the memory", type=int)
    parser.add_argument(
        "--blocks", type=int, default=argparse.SUPPRESS, help="of a transformer, fewer than the real one's"
    )
    parser.add_argument(
        "--layers",
        default=None,
        help='of a transformer, the blocks that contenders replace: "all", "none" or "0, 3-9, 27"; all by default',
    )
    parser.add_argument(
        "--verify", action="store_true", help="first hold students' outputs against the formulas; exit with 1 if wrong"
    )
    parser.add_argument(
        "--crossover",
        action="store_true",
        help="find from how many tokens on a layer of EDiT is faster here, for min_tokens=auto; "
        f"--sizes then default to {' '.join(map(str, _CROSSOVER['sizes']))}",
    )
    parser.add_argument("--save", default=None, help="a .json file to write the measurements to")
    parser.add_argument("--plot", default=None, help="a .png file: time against tokens, with fitted slopes")


def run(options: Any) -> Result:
    parts = _PRESETS.get(options.preset, [{}])
    given = (_CROSSOVER if options.crossover else {}) | vars(options)
    every = [argparse.Namespace(**{**_DEFAULTS, **part, **given}) for part in parts]
    for part in every:
        if options.preset and part.level == ["layer"]:
            part.blocks = None  # a change to the preset's transformers
        _check(part)
    if options.plot and all(len(set(part.sizes)) < 2 for part in every):
        raise EDiTError("--plot draws time against tokens, and needs at least two --sizes")
    found: list[Measurement] = []
    for part in every:
        _measure(part, found)
    if options.plot:
        from ..distill.sampling import png

        write_file(Path(options.plot), png(draw(found)))
    text = table(found)
    if options.crossover:
        text += "\n\n" + _keep_crossovers(found, device_of(options), DTYPES[every[0].dtype])
    return Result(text, [m.to_json() for m in found])


def _backbones(options: argparse.Namespace) -> list[Backbone]:
    """Those asked for, which without a choice are all, or those that the README shows."""
    return backbones_of(options, *([SHOWN] if options.preset else []))


def _measure(options: argparse.Namespace, found: list[Measurement]) -> None:
    """Adds what the options ask for to what was found."""
    device, dtype, names = device_of(options), DTYPES[options.dtype], options.contenders or CONTENDERS
    backbones = _backbones(options)
    errors = {one.name: verify(one, names, dtype, device) if options.verify else {} for one in backbones}
    for level, backbone, batch, side in itertools.product(options.level, backbones, options.batch, options.sizes):
        part = {"blocks": options.blocks, "layers": options.layers or "all"} if level == "transformer" else {}
        optional = options.contenders is None
        steps = measure(level, backbone, side, batch, dtype, device, options.repeats, names, optional=optional, **part)
        for last in progress(steps, options.repeats, f"{level} {backbone.name} {side}²"):
            complete = last
        found.append(dataclasses.replace(complete, errors=errors[backbone.name]))
        if options.save:  # after each, since the large sizes take long
            data = json.dumps([m.to_json() for m in found], indent=1) + "\n"
            write_file(Path(options.save), data.encode())


def _keep_crossovers(found: list[Measurement], device: torch.device, dtype: torch.dtype) -> str:
    crossovers = {}
    for backbone in dict.fromkeys(m.backbone for m in found):
        speeds = {m.tokens: m.speed(DEFAULT) or 0.0 for m in found if m.backbone == backbone}
        crossovers[crossover.key(backbone, dtype, device)] = crossover.crossover_of(speeds)
    path = crossover.save(crossovers)
    return "\n".join(
        [*(f"{name}: {n} tokens" for name, n in crossovers.items()), f"kept in {path}, for min_tokens=auto"]
    )


def _check(options: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is measured.

    Raises:
        EDiTError: what is wrong.
    """
    if options.repeats < 1 or min(options.batch) < 1:
        raise EDiTError("--repeats and --batch must be at least 1")
    for backbone, side in itertools.product(_backbones(options), options.sizes):
        backbone.check_size(side, side)
    if options.crossover:
        asked = (options.level, options.contenders, options.batch)
        if asked != (["layer"], ["teacher", DEFAULT], [1]):
            raise EDiTError(f"--crossover times a layer of {DEFAULT} against the teacher's: without other contenders")
        crossover.stored()  # a damaged cache, before and not after the measurement
    if "transformer" not in options.level and (options.blocks is not None or options.layers is not None):
        raise EDiTError("--blocks and --layers are of --level transformer: a layer is of one block")
    for path in filter(None, (options.save, options.plot)):
        if not Path(path).parent.is_dir():
            raise EDiTError(f"{path}: cannot be written (there is no such folder)")
