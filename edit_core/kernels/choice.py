"""Which kernels are used: what was measured, where, and in which tensors' case."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..crossover import cache_file
from ..files import write_file

__all__ = ["PARTS", "available", "chosen", "remember", "using"]

PARTS = ("linear", "conv_fusion", "depthwise")
"""What has a kernel."""

_forced: ContextVar[frozenset[str] | None] = ContextVar("forced", default=None)


def available() -> bool:
    """Whether kernels could run here at all: a CUDA device, and a Triton that can be imported."""
    if not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("triton")
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def using(parts: Iterable[str]) -> Iterator[None]:
    """Takes these parts' kernels, and no others, whatever was measured: for measurements and tests."""
    token = _forced.set(frozenset(parts))
    try:
        yield
    finally:
        _forced.reset(token)


def chosen(part: str, *tensors: Tensor) -> bool:
    """Whether a part is to run as kernels on these tensors, the first of them tokens `(B, N, C)`.

    It is where a measurement on their device chose it for their dtype and width, and they are all of one device and
    dtype, without a wish for gradients and without autocast. Weights that a host keeps elsewhere, or in another dtype,
    are among what is refused.
    """
    if torch.compiler.is_compiling():
        return False
    first, parts = tensors[0], _forced.get()
    if parts is None:
        if not first.is_cuda:
            return False
        parts = _measured(first.device, first.dtype, first.shape[-1])
    if part not in parts or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    if any(t.device != first.device or t.dtype != first.dtype for t in tensors):
        return False
    return not torch.is_autocast_enabled(first.device.type)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, channels: int) -> frozenset[str]:
    found = _load()
    if not found or not available():
        return frozenset()
    entry = found.get(_key(device, dtype, channels), {})
    return frozenset(part for part in PARTS if entry.get(part, {}).get("chosen") is True)


def remember(device: torch.device, dtype: torch.dtype, channels: int, outcomes: dict[str, dict[str, Any]]) -> None:
    """Keeps what was measured for this device, and lets it hold from now on.

    Raises:
        OSError: the file cannot be written.
    """
    path, found = _path(), _load()
    found[_key(device, dtype, channels)] = outcomes
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(found, indent=1, sort_keys=True).encode())
    _measured.cache_clear()


def _key(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    """Whatever a measurement depends on: other versions of PyTorch or Triton measure anew."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}"
    return f"{name}, {str(dtype).removeprefix('torch.')}, {channels} channels, {versions}"


def _path() -> Path:
    return cache_file().with_name("kernels.json")


def _load() -> dict[str, Any]:
    """What was measured so far; nothing, where there is no file or not a readable one."""
    try:
        found = json.loads(_path().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
