"""From how many tokens on linear attention is faster here: measured when asked for, kept in the user's cache."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from .errors import EDiTError
from .files import read_json, write_file
from .runtime import device_name

__all__ = ["MinTokens", "crossover_of", "measured_at", "resolve", "save", "stored"]

logger = logging.getLogger(__name__)

MinTokens = int | Literal["auto"]
"""From how many image tokens on attention is linear; `auto` is the crossover measured on the device."""


def cache_file() -> Path:
    """Where measured crossovers are kept: `edit-attention/crossover.json` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    # The specification of base directories has relative paths ignored.
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        folder = Path(os.path.expanduser("~/.cache"))  # unlike Path.home, no error for a user without a home
    return folder / "edit-attention" / "crossover.json"


def crossover_of(speeds: Mapping[int, float]) -> int:
    """The fewest tokens from which on the student was never the slower one.

    Args:
        speeds: by number of tokens, how many times as fast as its teacher the student is.

    Returns:
        one more than the most tokens measured, if it was slower there.
    """
    slower = [tokens for tokens, speed in speeds.items() if speed < 1]
    return min((tokens for tokens in speeds if tokens > max(slower, default=0)), default=max(speeds) + 1)


def measured_at() -> float:
    """When crossovers were measured last, in seconds since 1970; 0 where nobody measured any."""
    try:
        return os.path.getmtime(cache_file())
    except OSError:
        return 0.0


def stored() -> dict[str, int]:
    """The measured crossovers, by :func:`key`.

    Raises:
        EDiTError: the file is there and is no such table.
    """
    path = cache_file()
    if not os.path.exists(path):  # Path.exists makes an error of its own of a home that is another user's
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not all(type(value) is int and value >= 0 for value in found.values()):
        raise EDiTError(f"{path}: is no table of crossovers; remove it, and measure with {_HOW}")
    return found


_HOW = "python -m edit_core bench --crossover"


def key(backbone: str, dtype: torch.dtype, device: torch.device) -> str:
    return f"{backbone}, {str(dtype).removeprefix('torch.')}, {device_name(device)}"


def save(crossovers: Mapping[str, int]) -> Path:
    """Adds to the measured crossovers, or replaces them; returns the file.

    Raises:
        EDiTError: the file is there and is no such table, or the folder cannot be written.
    """
    path = cache_file()
    text = json.dumps({**stored(), **crossovers}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    except OSError as error:
        raise EDiTError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def resolve(min_tokens: MinTokens, backbone: str, dtype: torch.dtype, device: torch.device) -> int:
    """A number of tokens; for `auto` the crossover measured here, or 0 (always linear) where nobody measured it.

    Raises:
        EDiTError: neither `auto` nor a whole number from 0 on, or the cache is damaged.
    """
    if min_tokens == "auto":
        name = key(backbone, dtype, device)
        found = stored().get(name)
        if found is None:
            _say(name)
        return found or 0
    if type(min_tokens) is not int or min_tokens < 0:
        raise EDiTError(f'min_tokens must be "auto" or a whole number from 0 on, not {min_tokens!r}')
    return min_tokens


@functools.cache
def _say(name: str) -> None:
    """Once for each."""
    logger.warning("EDiT: min_tokens=auto: always linear, since no crossover was measured for %s; %s does", name, _HOW)
