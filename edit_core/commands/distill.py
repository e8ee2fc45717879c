"""Train EDiT weights from a teacher and a cache.

Ctrl-C and SIGTERM write a checkpoint and stop; --resume latest goes on from the newest one, exactly as if it had not
been stopped. On several devices: accelerate launch --multi_gpu (or --use_fsdp --fsdp_version 2) -m edit_core distill.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from ..errors import EDiTError
from .common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="a field to change, as stages.0.steps=100")
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one that ships in this package")
    parser.add_argument(
        "--estimate", action="store_true", help="say how much memory it will take per process, and stop"
    )
    parser.add_argument("--resume", choices=["latest"], help="go on from the newest checkpoint, if there is one")


def run(options: Any) -> Result | None:
    try:
        from ..distill.config import load_config
        from ..distill.engine import Engine
        from ..distill.memory import estimate
        from ..distill.parallel import sharded
    except ImportError as error:
        raise EDiTError(f"distill needs {error.name}: install edit-attention[distill]") from None
    config = load_config(options.config, options.overrides)
    if options.estimate:
        # As the launcher says it: nothing is started for an estimate, so that the devices need not be there.
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if rank:
            return None
        found = estimate(config, world, sharded(world))
        return Result("\n".join(map(str, found)), [{**asdict(e), "total": e.total} for e in found])
    checkpoints = config.output / "checkpoints"
    if options.resume is None and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise EDiTError(f"{config.output} holds an earlier run; add --resume latest, or choose another output")
    engine = Engine(config)
    resumed = engine.resume() if options.resume else False
    path = engine.run()
    if not engine.processes.first:
        return None
    data = {"file": str(path), "steps": engine.total, "skipped": engine.skipped, "resumed": resumed}
    if path.is_dir():  # a checkpoint's
        return Result(f"stopped after {engine.total} steps; {path} goes on with --resume latest", data)
    return Result(f"{path}: a student after {engine.total} steps ({engine.skipped} skipped)", data)
