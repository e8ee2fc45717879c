"""What commands and trainings share of the machine they run on: dtypes, devices, a terminal's progress bar."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from .errors import EDiTError

__all__ = ["DTYPES", "TOLERANCES", "device_name", "progress", "timed", "usable_device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

T = TypeVar("T")
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative errors of a layer's outputs, projections included, that rounding explains: four times those seen on a CPU;
in float32 those of TensorFloat-32, which convolutions take on CUDA."""


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


def device_name(device: torch.device) -> str:
    """The processor's name, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {flags}"


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
