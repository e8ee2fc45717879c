"""Checkpoints of a training: complete, written whole or not at all, limited in number."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..basefile import BaseFile
from ..errors import EDiTError
from ..files import read_json, sync_folder, write_file
from ..weights import EDiTWeights

__all__ = ["from_checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes `folder/<step>` and removes the oldest beyond `keep`.

    A checkpoint appears by one rename, after all of it is on the disk: a kill at any moment leaves the earlier ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for dead in folder.glob(".part-*"):  # of a process that was killed while it wrote
        shutil.rmtree(dead)
    part = folder / f".part-{secrets.token_hex(4)}"
    part.mkdir()
    try:
        write_file(part / TENSORS, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
        write_file(part / STATE, json.dumps(dict(state), indent=1).encode())
        target = folder / f"{step:08d}"
        if target.exists():  # a run that was resumed from further back passes here again
            _remove(target)
        os.rename(part, target)
        sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _finished(folder)[:-keep]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    """Takes a checkpoint away by one rename first, so that a kill leaves no half of it under its name."""
    dead = path.with_name(f".part-{secrets.token_hex(4)}")
    os.rename(path, dead)
    shutil.rmtree(dead)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    finished = _finished(folder)
    return finished[-1] if finished else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and state.

    Raises:
        EDiTError: it is damaged; the message says what to do.
    """
    try:
        return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise EDiTError(f"{path} is damaged ({error}); delete it to resume from the checkpoint before it") from None


def from_checkpoint(folder: Path, raw: bool = False) -> EDiTWeights:
    """The student in a training's checkpoint, without its teacher.

    Args:
        folder: one checkpoint.
        raw: take the weights as trained, and not their average.

    Raises:
        EDiTError: not a checkpoint, or one of a version that did not keep what a weights file needs.
        EDiTWeightsError: its tensors do not make up a student.
    """
    state = read_json(folder / STATE)
    metadata = state.get("weights") if isinstance(state, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise EDiTError(f"{folder / STATE} does not say what its weights are for; an older version wrote it")
    averaged = any(name.startswith("ema.") for name in BaseFile(folder / TENSORS).shapes)
    prefix = "ema." if averaged and not raw else "weights."
    return EDiTWeights.load_from_checkpoint(folder / TENSORS, metadata, prefix)


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if (path / STATE).is_file())
