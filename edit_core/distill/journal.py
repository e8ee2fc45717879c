"""What a training leaves to be looked at: one JSON line per step, tensorboard's curves, and pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ..files import write_file
from .sampling import png

__all__ = ["Journal"]


class Journal:
    """Appends to `metrics.jsonl`, `tensorboard/` and `pictures/` in a training's folder.

    Tensorboard's own SummaryWriter writes from a thread of its own, where a full disk would go unnoticed; here each
    record is written when it is given.

    Args:
        folder: the training's.
        total: how many steps are done; records of later ones, which a killed run left, are taken out.

    Raises:
        OSError: here and later, the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder = folder
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, total)
        self._lines = path.open("a", encoding="utf-8")
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        # Tensorboard reads its files in the order of their names, which a clock that was set back must not change.
        last = max((int(found.suffix[1:]) for found in board.glob("events.out.tfevents.*")), default=0)
        self._events = (board / f"events.out.tfevents.{max(time.time_ns(), last + 1):020d}").open("xb")
        self._board = RecordWriter(self._events)
        self._event(file_version="brain.Event:2")
        self._event(step=total + 1, session_log=SessionLog(status=SessionLog.START))  # what came after is void

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; it has `step`, `stage` and `kind`, and what is a float in it becomes a curve."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        curves = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in record.items()
            if isinstance(value, float)
        ]
        self._event(step=record["step"], summary=Summary(value=curves))

    def picture(self, image: Any, step: int) -> Path:
        """Keeps a PIL image of a step; returns where."""
        data = png(image)
        path = self.folder / "pictures" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        write_file(path, data)
        drawn = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=data)
        value = Summary.Value(tag="teacher above student", image=drawn)
        self._event(step=step, summary=Summary(value=[value]))
        return path

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _event(self, **content: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._events.flush()


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
