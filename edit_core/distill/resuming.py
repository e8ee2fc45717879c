"""What a training may change where it goes on, what it may not, and what its student's file says of it.

What was trained cannot be undone: where a change would take effect on it alone, the run is refused. What is yet to come
may change, and the change is noted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EDiTError

__all__ = ["Continuation", "continue_from"]

_FIXED = ("student", "layers", "trainable", "rank", "optimizer", "ema", "precision", "seed")
_FREE = (
    "model", "cache", "output", "device", "stages", "checkpoint_every", "keep_checkpoints", "max_skipped",
    "watch.evaluate_every", "watch.preview_every", "watch.preview_pictures", "watch.preview_steps",
    "watch.preview_guidance",
)  # fmt: skip
"""They change nothing in the student, or are looked at by themselves."""
_FREE_OF_STAGES = ("accumulation", "gradient_checkpointing")
_OTHER_FOLDER = "choose another output folder, or what it was made with"


class Continuation(NamedTuple):
    """Where a run goes on."""

    stage: int
    step: int
    """Within the stage."""
    fresh: bool
    """Whether the stage begins with an optimiser of its own, though the checkpoint holds one."""
    notes: list[dict[str, Any]]
    """What was changed on the way, and after which step of all; for the student's file."""
    changed: dict[str, list[Any]]
    """What is changed now: field -> before and after."""

    def __str__(self) -> str:
        return ", ".join(f"{field} {after} (it was {before})" for field, (before, after) in self.changed.items())


def continue_from(
    path: Path, state: Mapping[str, Any], now: Mapping[str, Any], base_hash: str, data: Mapping[str, Any]
) -> Continuation:
    """Compares a run with the checkpoint that it goes on from.

    Args:
        path: the checkpoint, for messages.
        state: what it says.
        now: the configuration, as JSON has it.
        base_hash: of the teacher.
        data: what is noted of the cache.

    Raises:
        EDiTError: the checkpoint is of another training, or a change would come too late.
    """
    before, metadata = state["config"], state["weights"]
    for field in _FIXED:
        if before[field] != now[field]:
            raise EDiTError(f"{path} was made with another {field} ({before[field]!r}); {_OTHER_FOLDER}")
    if metadata.get("base_hash", base_hash) != base_hash:
        raise EDiTError(f"{path} was made with another teacher; {_OTHER_FOLDER}")
    stage, step = state["stage"], state["step"]
    old, new = before["stages"], now["stages"]
    if len(new) < min(stage + 1, len(old)):
        raise EDiTError(f"{path}: its run had {len(old)} stages, and {len(new)} are too few now; {_OTHER_FOLDER}")
    if stage == len(old) and new[stage - 1]["steps"] > old[-1]["steps"]:
        stage, step = stage - 1, old[-1]["steps"]  # there is more of the last stage now
    changed = {name: [a, b] for name, a, b in _differences(before, now) if name not in _FREE}
    for index, (a, b) in enumerate(zip(old, new, strict=False)):
        if (index, 0) < (stage, step):
            changed.update(_stage_changes(path, index, a, b, finished=index < stage, done=step))
    changed.update(_data_changes(path, metadata, data))
    if len(new) != len(old):
        changed["stages"] = [len(old), len(new)]
    if changed and stage == len(new):
        name, (a, b) = next(iter(changed.items()))
        raise EDiTError(
            f"{path}: the run is finished, so that {name} cannot become {b!r} any more (it was {a!r}); change it back, "
            f"or raise stages.{stage - 1}.steps to go on"
        )
    notes = [*state.get("resumed", ()), *([{"step": state["total"], "changed": changed}] if changed else ())]
    return Continuation(stage, step, stage == len(old), notes, changed)


def _stage_changes(
    path: Path, index: int, before: Mapping[str, Any], now: Mapping[str, Any], finished: bool, done: int
) -> dict[str, list[Any]]:
    """Of a stage that was begun."""
    place = f"stages.{index}"
    if before["kind"] != now["kind"]:
        raise EDiTError(
            f"{path}: {place} was begun as {before['kind']}, and is {now['kind']} now; change it back, or choose "
            "another output folder"
        )
    found = {name: [a, b] for name, a, b in _differences(before, now) if name not in _FREE_OF_STAGES}
    if finished and found:
        name, (a, b) = next(iter(found.items()))
        raise EDiTError(
            f"{path}: {place} is finished, so that its {name} cannot become {b!r} any more (it was {a!r}); change it "
            "back, or add a stage"
        )
    if not finished and now["steps"] < done:
        raise EDiTError(
            f"{path}: {done} steps of {place} are done, and {place}.steps={now['steps']} asks for fewer; choose "
            f"{done} or more"
        )
    return {f"{place}.{name}": pair for name, pair in found.items()}


def _data_changes(path: Path, metadata: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, list[Any]]:
    before = json.loads(metadata.get("training", "{}")).get("data", data)
    for name in ("backbone", "encoder", "dtype"):
        if before.get(name) != data[name]:
            raise EDiTError(
                f"{path} was made with another cache, whose {name} is {before.get(name)!r} and not {data[name]!r}; "
                f"{_OTHER_FOLDER}"
            )
    return {f"data.{name}": [before[name], data[name]] for name in ("images", "shards") if before[name] != data[name]}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields of two configurations that differ; one that only one version of this package has is not compared."""
    for name in (name for name in before if name in now):
        a, b = before[name], now[name]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", a, b
