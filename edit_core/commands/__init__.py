"""The commands of the command line, one module each: `add_arguments(parser)`, `run(options) -> Result`, and help.

A module's docstring is its command's help.
"""

from __future__ import annotations

from types import ModuleType

from . import bench, cache, calibrate, convert, demo, distill, eval, info, init, plan
from .common import Result

__all__ = ["COMMANDS", "Result"]


COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "init": init,
    "info": info,
    "cache": cache,
    "distill": distill,
    "calibrate": calibrate,
    "eval": eval,
    "convert": convert,
    "bench": bench,
    "plan": plan,
}
