"""Draw the small world's captions with the shipped teachers, their EDiT students and piecewise attention, and compare.

All get the same captions and the same noise; piecewise attention needs no weights. A reader without anything learnt
says how many of the captions' attributes each picture has right; one call of the transformer is timed at two sizes, in
alternation. The teachers are real PixArt-Σ and SD3.5-Medium architectures of a few million parameters; full-sized ones
are timed by `bench`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import backbone_named
from ..bench import device_name
from ..config import WITHOUT_WEIGHTS, EDiTConfig
from ..errors import EDiTError
from ..files import write_file
from ..hosts.diffusers import apply_edit
from ..runtime import DTYPES
from ..weights import EDiTWeights
from ..world import BACKBONES
from .common import Result, add_backbone_argument, add_device_arguments, backbones_of, device_of

LARGE = 1024
"""Pixels per side of the second size that is timed: the world's largest, 4096 tokens."""
TEACHER, STUDENT = "teacher", "student"
SHOWN = {TEACHER: "teacher", STUDENT: "EDiT student", WITHOUT_WEIGHTS: WITHOUT_WEIGHTS}
"""Who draws, and what they are called."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_backbone_argument(parser, BACKBONES)
    add_device_arguments(parser)
    parser.add_argument("--size", type=int, default=256, help="pixels per side of what is drawn, 128 to 512")
    parser.add_argument("--pictures", type=int, default=8, help="captions that are drawn")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps")
    parser.add_argument("--output", default="out", help="folder for the pictures")


def run(options: Any) -> Result:
    if options.size % 16 or not 128 <= options.size <= 512:
        raise EDiTError(f"--size {options.size}: sides must be multiples of 16, from 128 to 512 pixels")
    if options.steps < 1 or options.pictures < 1:
        raise EDiTError("--steps and --pictures must be at least 1")
    output, device = Path(options.output), device_of(options)
    output.mkdir(parents=True, exist_ok=True)
    rows = [_compare(one.name, options, device, output) for one in backbones_of(options, BACKBONES)]
    shown, students = ", ".join(SHOWN.values()), [who for who in SHOWN if who != TEACHER]
    others = ", ".join(SHOWN[who] for who in students)
    head = [
        f"The small world: {options.pictures} captions at {options.size}², {options.steps} steps, the same noise for "
        f"all; {options.dtype} on {device_name(device)}. {WITHOUT_WEIGHTS}: without any weights or training",
        "",
        f"| model | attributes right: {shown} | s per picture: {shown} | s per call at {options.size}²: {shown} | "
        f"s per call at {LARGE}²: {shown} | speed at {LARGE}²: {others} | bit-equal after removal |",
        "|---|---|---|---|---|---|---|",
    ]
    lines = []
    for row in rows:
        times = [", ".join(f"{row[key][who]:.3f}" for who in SHOWN) for key in ("picture", "call", "large")]
        right = ", ".join(f"{row['right'][who]:.1%}" for who in SHOWN)
        speeds = ", ".join(f"{row['speed'][who]:.2f}x" for who in students)
        lines.append(
            f"| {backbone_named(row['backbone']).title}, small | {right} | {' | '.join(times)} | {speeds} | "
            f"{'yes' if row['restored'] else 'NO'} |"
        )
    tail = ["", *(f"pictures, from above: as the captions ask, {shown}: {row['sheet']}" for row in rows)]
    return Result("\n".join([*head, *lines, *tail]), rows)


def _compare(backbone: str, options: Any, device: torch.device, output: Path) -> dict[str, Any]:
    from ..distill.plan import call_times
    from ..distill.sampling import grid, png
    from ..world.draw import call_of, held_out, pictures, real
    from ..world.files import load_teacher, shipped
    from ..world.reader import right

    transformer = load_teacher(backbone)
    torch.nn.Module.to(transformer, device, DTYPES[options.dtype])  # diffusers' own warns of layers it has none of
    students: dict[str, EDiTWeights | EDiTConfig] = {
        STUDENT: EDiTWeights.load(shipped("edit", backbone)),
        WITHOUT_WEIGHTS: EDiTConfig.preset(WITHOUT_WEIGHTS),
    }
    asked = held_out(options.pictures)
    arguments = call_of(backbone, transformer, options.size)
    drawn: dict[str, Tensor] = {"asked": real(backbone, asked, options.size)}
    row: dict[str, Any] = {"backbone": backbone, "right": {}, "picture": {}, "call": {}, "large": {}, "speed": {}}

    def draw(who: str) -> None:
        start = time.perf_counter()
        drawn[who] = pictures(backbone, transformer, asked, options.size, options.steps, batch=4)
        row["picture"][who] = (time.perf_counter() - start) / len(asked)
        row["right"][who] = right(drawn[who].numpy(), asked)["all"]

    before = transformer(**arguments)[0]
    draw(TEACHER)
    for who, student in students.items():
        with apply_edit(transformer, student) as handle:
            draw(who)
            for name, size in (("call", options.size), ("large", LARGE)):
                with torch.no_grad():
                    teacher, own = call_times(transformer, handle, call_of(backbone, transformer, size), repeats=3)
                row[name] |= {TEACHER: teacher, who: own}
            row["speed"][who] = teacher / own  # of the last, the large size
    row["restored"] = bool(torch.equal(before, transformer(**arguments)[0]))
    sheet = output / f"demo_{backbone}.png"
    write_file(sheet, png(grid([drawn[who] for who in ("asked", *SHOWN)])))
    return {**row, "sheet": str(sheet)}
