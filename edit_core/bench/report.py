"""What was measured, as data and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any, NamedTuple

from ..backbones import backbone_named

__all__ = ["TITLES", "Measurement", "Series", "series", "table"]

TITLES = {
    "paper": "EDiT",
    "local": "EDiT, local",
    "sana": "SANA-style",
    "linfusion": "LinFusion",
    "kv_compression": "KV compression",
    "sage": "SageAttention",
    "flash_attn": "FlashAttention",
    "limit": "the limit",
}
"""Contenders as people call them, where that is not their name."""


@dataclass(frozen=True)
class Measurement:
    """Seconds per call and memory of contenders that took turns, at one size."""

    level: str
    """`layer` or `transformer`."""
    backbone: str
    side: int
    """Pixels per side of the square picture."""
    tokens: int
    batch: int
    blocks: int
    dtype: str
    device: str
    backend: str
    """What the teacher's softmax attention runs on."""
    versions: dict[str, str]
    seconds: dict[str, list[float]]
    """Of each contender, one figure per round."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes that a call holds at most beyond weights and inputs, where that was measured."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that could not run, and why."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of students, the relative error against the specification, where that was checked."""

    def speed(self, name: str, against: str = "teacher") -> float | None:
        """Median over the rounds of how many times as fast as another a contender is; None if that one is not here."""
        if against not in self.seconds:
            return None
        pairs = zip(self.seconds[against], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)

    @property
    def title(self) -> str:
        """What was called, for people."""
        backbone = backbone_named(self.backbone)
        part = backbone.layer if self.level == "layer" else f"{self.blocks} block{'s' * (self.blocks > 1)}"
        return f"{backbone.title}, {part}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "speed": {name: self.speed(name) for name in self.seconds}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        return cls(**{name: value for name, value in data.items() if name != "speed"})


class Series(NamedTuple):
    """Measurements that differ in nothing but their size."""

    title: str
    measurements: list[Measurement]

    def medians(self, name: str) -> dict[int, float]:
        """A contender's median seconds by the number of tokens."""
        found = {m.tokens: statistics.median(m.seconds[name]) for m in self.measurements if name in m.seconds}
        return dict(sorted(found.items()))

    def exponent(self, name: str) -> float | None:
        """The slope of a contender's line, log time over log tokens; None with fewer than two sizes."""
        medians = self.medians(name)
        if len(medians) < 2:
            return None
        return statistics.linear_regression([log(n) for n in medians], [log(t) for t in medians.values()]).slope


def series(measurements: Sequence[Measurement]) -> list[Series]:
    found: dict[tuple[Any, ...], Series] = {}
    for m in measurements:
        title = f"{m.title}, batch {m.batch}, {m.dtype}"
        found.setdefault((title, m.device, m.backend), Series(title, [])).measurements.append(m)
    return list(found.values())


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table, without columns that hold nothing, under a line for each device, dtype and backend in it."""
    heads: dict[str, None] = {}  # in order, and each once
    for m in measurements:
        versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
        heads[f"{m.device}; {m.dtype}; {versions}; teacher on {m.backend}."] = None
        heads |= {f"Left out: {reason}.": None for reason in m.missing.values()}
    rows = [row for group in series(measurements) for m in group.measurements for row in _rows(group, m)]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[name] or "–" for name in columns) + " |" for row in rows]
    return "\n".join([*heads, "", *lines])


def _rows(group: Series, m: Measurement) -> list[dict[str, str]]:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    rows = []
    for name, seconds in m.seconds.items():
        times = f"{statistics.median(seconds):.4g} ({min(seconds):.4g}–{max(seconds):.4g})"
        peak = m.peak[name] / 1e9 if name in m.peak else None
        rows.append(
            {
                "model": m.title,
                "picture": f"{m.side}²",
                "tokens": str(m.tokens),
                "batch": str(m.batch),
                "attention": title_of(name),
                "s per call": times,
                "speed": figure(m.speed(name), "{:.2f}×"),
                "of the limit": figure(m.speed(name, "limit"), "{:.0%}"),
                "exponent": figure(group.exponent(name), "{:.2f}"),
                "memory of a call, GB": figure(peak, "{:.3g}"),
                "error": figure(m.errors.get(name), "{:.1e}"),
            }
        )
    return rows


def title_of(name: str) -> str:
    """A contender as people call it; what differs from a preset stays behind its name."""
    preset, colon, changes = name.partition(":")
    return TITLES.get(preset, preset) + colon + changes
