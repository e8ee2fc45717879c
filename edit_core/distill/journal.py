"""What a training leaves to be looked at: one JSON line per step, tensorboard's curves, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_file

__all__ = ["Journal"]


class Journal:
    """Appends to `metrics.jsonl`, `tensorboard/` and `pictures/` in a training's folder.

    Args:
        folder: the training's.
        total: how many steps are done; records of later ones, which a killed run left, are taken out.
    """

    def __init__(self, folder: Path, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes a second to import

        self.folder = folder
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, total)
        self._lines = path.open("a", encoding="utf-8")
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=total + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; it has `step`, `stage` and `kind`, and what is a float in it becomes a curve."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def picture(self, image: Any, step: int) -> Path:
        """Keeps a PIL image of a step; returns where."""
        path = self.folder / "pictures" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self._board.add_image("teacher above student", np.asarray(image), step, dataformats="HWC")
        return path

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _keep_until(path: Path, total: int) -> None:
    """Drops records of steps after `total`, and a last line that a kill cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= total:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_file(path, "".join(kept).encode())
