"""Time a whole transformer of real dimensions with EDiT against itself without, in alternation.

The weights are random, since speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..bench import Measurement, measure, table
from ..errors import EDiTError
from ..runtime import DTYPES, progress
from .common import Result, add_config_arguments, add_model_arguments, backbones_of, config_of, device_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="pixels per side of the square pictures")
    parser.add_argument("--batch", type=int, default=1, help="pictures per call; 2 as with classifier-free guidance")
    parser.add_argument("--blocks", type=int, default=None, help="fewer blocks than the real model has")
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs of calls, after one to warm up")
    parser.add_argument("--save", default=None, help="a .json file to write the measurements to")


def run(options: Any) -> Result:
    if options.repeats < 1 or options.batch < 1:
        raise EDiTError("--repeats and --batch must be at least 1")
    device, found = device_of(options), []
    for backbone in backbones_of(options):
        for side in options.sizes:
            last: Measurement | None = None
            steps = measure(
                backbone,
                side,
                options.batch,
                DTYPES[options.dtype],
                device,
                options.repeats,
                options.blocks,
                config_of(options),
                options.layers,
            )
            for last in progress(steps, options.repeats, f"{backbone} {side}²"):  # noqa: B007 - the last is complete
                pass
            assert last is not None  # noqa: S101 - at least one repeat
            found.append(last)
    data = [m.to_json() for m in found]
    if options.save:
        Path(options.save).write_text(json.dumps(data, indent=1) + "\n")
    return Result(table(found), data)
