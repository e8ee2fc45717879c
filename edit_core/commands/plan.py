"""Find out which blocks to make linear, or piecewise, from measured errors and measured times.

Prints every block's error and times, the errors and speeds of the sets that trade one for the other, and the list that
`layers` takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..backbones import identify_module
from ..distill.dataset import BatchPlan, CachedLatents
from ..distill.plan import DEFAULT_BUDGET, make_plan
from ..distill.teacher import load_teacher
from ..errors import EDiTError
from ..files import write_file
from ..runtime import DTYPES
from ..weights import EDiTWeights
from .common import Result, add_device_arguments, add_student_arguments, device_of, student_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the teacher: a diffusers pipeline's folder")
    add_student_arguments(parser)
    parser.add_argument("--cache", required=True, help="what `cache` wrote for the teacher: a folder or a URL")
    parser.add_argument("--resolution", type=int, default=512, help="which of the cache's, for the errors")
    parser.add_argument("--size", type=int, default=1024, help="pixels per side of the pictures to be fast at")
    budget = f"highest error of the prediction, squared and relative; {DEFAULT_BUDGET:g} if there is no --speed either"
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--budget", type=float, help=budget)
    goal.add_argument("--speed", type=float, help="how many times as fast as the teacher to be, at the least error")
    parser.add_argument("--batches", type=int, default=4, help="batches of up to 4 pictures for the errors")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, after one to warm up")
    parser.add_argument("--shift", type=float, default=3.0, help="SD3.5 only: shift of the times towards noise")
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of pictures, noise and times")
    add_device_arguments(parser)
    parser.add_argument("--output", default=None, help="a .json file to write everything to")


def run(options: Any) -> Result:
    if options.batches < 1 or options.repeats < 1 or options.shift <= 0:
        raise EDiTError("--batches and --repeats must be at least 1, and --shift above 0")
    if options.output and not Path(options.output).parent.is_dir():  # known now, not after all was measured
        raise EDiTError(f"{options.output}: cannot be written (there is no such folder)")
    device = device_of(options)
    student = student_of(options)
    data = CachedLatents(options.cache, options.resolution)
    if isinstance(student, EDiTWeights):
        _check_cache(data, options.weights, student.backbone)
    pictures = BatchPlan(data, min(4, max(map(len, data.buckets.values()))), options.seed)
    try:
        transformer = load_teacher(Path(options.model), DTYPES[options.dtype], device)
    except ImportError as error:
        raise EDiTError(f"plan needs {error.name}: install edit-attention[distill]") from None
    _check_cache(data, options.model, identify_module(transformer).backbone.name)
    plan = make_plan(
        transformer,
        student,
        [data.collate(pictures.batch(step)) for step in range(options.batches)],
        options.size,
        budget=options.budget,
        speed=options.speed,
        repeats=options.repeats,
        seed=options.seed,
        shift=options.shift,
    )
    if options.output:
        try:
            write_file(Path(options.output), (json.dumps(plan.to_json(), indent=1) + "\n").encode())
        except OSError as error:
            raise EDiTError(f"{options.output}: cannot be written ({error.strerror or error})") from None
    return Result(str(plan), plan.to_json())


def _check_cache(data: CachedLatents, file: str, backbone: str) -> None:
    if data.backbone != backbone:
        raise EDiTError(f"{data.folder} was made for {data.backbone}, but {file} is for {backbone}")
