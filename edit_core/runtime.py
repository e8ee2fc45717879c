"""What commands and trainings share of the machine they run on: dtypes, devices, a terminal's progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

import torch

from .errors import EDiTError

__all__ = ["DTYPES", "progress", "usable_device"]

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
        raise EDiTError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def progress(steps: Iterable[T], total: int, label: str) -> Iterable[T]:
    """A progress bar on a terminal; nothing where stderr is not one."""
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=label, total=total, leave=False, disable=not sys.stderr.isatty())
