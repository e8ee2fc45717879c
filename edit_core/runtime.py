"""What commands and trainings share of the machine they run on: dtypes, devices, a terminal's progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from .errors import EDiTError

__all__ = ["DTYPES", "progress", "timed", "usable_device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

T = TypeVar("T")


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        EDiTError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        usable = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise EDiTError(
            f"device {name} cannot be used here: {str(error).splitlines()[0]}; choose {' or '.join(usable)}"
        ) from None
    return device


def progress(steps: Iterable[T], total: int, label: str) -> Iterable[T]:
    """A progress bar on a terminal; nothing where stderr is not one."""
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=label, total=total, leave=False, disable=not sys.stderr.isatty())


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call gives, and its seconds; on CUDA until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    output = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return output, time.perf_counter() - start
