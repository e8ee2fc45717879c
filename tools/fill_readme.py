"""Writes the tables of README.md and of docs/*.md from the measurements in docs/: `tools/fill_readme.py`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from edit_core.backbones import backbone_named
from edit_core.bench import Measurement, table
from edit_core.bench.report import series, title_of
from edit_core.world import BACKBONES
from world.compare_piecewise import FORMS
from world.table import METHODS, TEACHER

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS, TRAINING = ROOT / "docs" / "bench_cpu.json", ROOT / "docs" / "bench_training.json"
LAYERS = ROOT / "docs" / "bench_piecewise.json"
"""Of layers, with piecewise attention among the contenders."""
WORLD, PIECEWISE = ROOT / "docs" / "world.json", ROOT / "docs" / "piecewise.json"
SHOWN = {
    TEACHER: "the teacher's softmax",
    "local": "EDiT, `local` (default)",
    "piecewise": "`piecewise`, without weights",
    "edit": "EDiT, `paper`",
    "sana": "`sana`",
    "linfusion": "`linfusion`",
    "kv_compression": "`kv_compression`",
}
"""Of the small world's rows, those that the README shows, and their names there."""

Column = tuple[tuple[str, ...], str] | tuple[tuple[str, ...], str, float]
"""Where in a row a figure is, how it is written, and in what unit."""
SHARE, ERROR, TIMES = "{:.1%}", "{:.4f}", "{:.2f}×"
IN_SHORT: tuple[Column, ...] = (
    (("256", "all"), SHARE),
    (("distance 256", "prediction"), ERROR),
    (("cost 1024", "speed"), TIMES),
)
WORTH: dict[str, Column] = {
    "right, 256²": (("256", "all"), SHARE),
    "right, 384²": (("384", "all"), SHARE),
    "long-range, 256²": (("256", "long_range"), SHARE),
    "long-range, 384²": (("384", "long_range"), SHARE),
    "Fréchet, 256²": (("256", "frechet"), "{:.0f}"),
    "Fréchet, 384²": (("384", "frechet"), "{:.0f}"),
    "error, 256²": (("distance 256", "prediction"), ERROR),
    "error, 384²": (("distance 384", "prediction"), ERROR),
}
KINDS: dict[str, Column] = {
    kind: (("256", kind), "{:.0%}") for kind in ("texture", "shape", "colour", "size", "place", "mirror", "frame")
} | {"equal dots": (("256", "dots.equal"), "{:.0%}")}
COSTS: dict[str, Column] = {
    "own weights, M": (("side",), "{:.2f}", 1e6),
    "trained, M": (("trained",), "{:.2f}", 1e6),
    "GFLOPs, 256²": (("cost 256", "flops"), "{:.2f}", 1e9),
    "GFLOPs, 1024²": (("cost 1024", "flops"), "{:.1f}", 1e9),
    "seconds, 256²": (("cost 256", "seconds"), "{:.3f}"),
    "seconds, 1024²": (("cost 1024", "seconds"), "{:.2f}"),
    "speed, 256²": (("cost 256", "speed"), TIMES),
    "speed, 1024²": (("cost 1024", "speed"), TIMES),
}


def between(text: str, mark: str, new: str) -> str:
    """The text with what stands between two marks replaced."""
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->\n"
    before, rest = text.split(begin)
    return f"{before}{begin}{new}\n{end}{rest.split(end)[1]}"


def filled(readme: str) -> str:
    """The README with its tables of speed and quality."""
    rows = json.loads(WORLD.read_text(encoding="utf-8"))
    return between(between(readme, "bench", speed_table(measurements())), "quality", quality_table(rows))


def measurements(path: Path = MEASUREMENTS) -> list[Measurement]:
    return [Measurement.from_json(data) for data in json.loads(path.read_text(encoding="utf-8"))]


def speed_table(found: list[Measurement]) -> str:
    """How many times as fast as the teacher each contender is, a line for each size that the teacher was timed at."""
    timed = [m for group in series(found) for m in group.measurements if TEACHER in m.seconds]
    names = [name for name in dict.fromkeys(name for m in timed for name in m.seconds) if name != TEACHER]
    lines = [
        "How many times as fast as the model's own attention, at the real models' widths with random weights; medians "
        f"of calls that take turns. {timed[0].device}; {timed[0].dtype}; {timed[0].backend}. *The limit* has no "
        "attention at all between the projections. [All figures, memory, and larger pictures](docs/speed.md); "
        "`make bench` measures it anew.",
        "",
        f"| model | tokens | {' | '.join(map(title_of, names))} |",
        "|---|---|" + "---|" * len(names),
    ]
    for m in timed:
        speeds = [m.speed(name) if name in m.seconds else None for name in names]
        cells = [m.title, f"{m.tokens:,}", *("–" if speed is None else f"{speed:.2f}×" for speed in speeds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled_speed(page: str) -> str:
    """The page about speed with all that was measured."""
    return between(between(page, "bench", table(measurements())), "piecewise", table(measurements(LAYERS)))


def quality_table(rows: list[dict[str, Any]]) -> str:
    """What a reader finds right in the small world's pictures, of the teachers and of the students to tell apart."""
    lines = [
        "Share of the captions' attributes that are right in pictures of the [small world](docs/world.md) at 256², the "
        "squared error of the student's prediction relative to its teacher's, and speed of a call at 1024² on a CPU; "
        "means over seeds. `make world` measures it anew.",
        "",
        "| model | attention | seeds | right | error | speed |",
        "|---|---|---|---|---|---|",
    ]
    for backbone in BACKBONES:
        for method, name in SHOWN.items():
            if found := [row for row in rows if (row["backbone"], row["method"]) == (backbone, method)]:
                cells = [f"{backbone_named(backbone).title}, small", name, str(len(found))]
                cells += [_mean(found, *column) for column in IN_SHORT]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled_training(guide: str) -> str:
    """The training guide with what a training costs."""
    found = json.loads(TRAINING.read_text(encoding="utf-8"))
    lines = [
        "Memory of the shipped configurations per process, estimated from the real models' shapes, previews included "
        "(`--estimate` does it for yours; started by `accelerate launch`, for a process of as many):",
        "",
    ]
    for name, stages in found["estimates"].items():
        lines += [f"- `{name}`", *(f"  - {stage}" for stage in stages)]
    lines += [
        "",
        "Measured by `make bench-training`, real widths, random weights, batch 1. Peak GB of a process "
        "(estimate), `distill` with gradient checkpointing; on a CPU the system may drop mapped weights that wait for "
        "their turn, so that less is resident than the estimate counts:",
        "",
        "| model | blocks | picture | dtype | transfer | distill |",
        "|---|---|---|---|---|---|",
    ]
    for backbone, run in found["memory"].items():
        stages = [f"{stage['peak_gb']:.1f} ({stage['estimate_gb']:.1f})" for stage in (run["transfer"], run["distill"])]
        lines.append(_about(backbone, run) + " | ".join(stages) + " |")
    lines += [
        "",
        "The engine's overhead: the time of its step against that of the same two forwards, losses and backward by "
        "hand, in alternation:",
        "",
        "| model | blocks | picture | dtype | by hand | overhead |",
        "|---|---|---|---|---|---|",
    ]
    for backbone, run in found["overhead"].items():
        lines.append(f"{_about(backbone, run)}{run['by hand']:.2f} s | {run['overhead']:+.1%} |")
    run = found["memory"]["pixart_sigma"]
    lines += [
        "",
        f"{run['device']}; PyTorch {run['torch']}. No GPU was at hand: measure a few steps on yours, and multiply.",
    ]
    return between(guide, "training", "\n".join(lines))


def world_tables(rows: list[dict[str, Any]]) -> str:
    """Of one backbone, a line per method each: what its pictures are worth, what in them is right, what it costs."""
    methods = sorted({row["method"] for row in rows}, key=[TEACHER, *METHODS].index)
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    timed = [{name: _teachers(row[name]) for name in row if name.startswith("cost")} for row in rows if "side" in row]
    parts = []
    for columns, found in ((WORTH, by_method), (KINDS, by_method), (COSTS, {**by_method, TEACHER: timed})):
        lines = [f"| method | seeds | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for method in methods:
            cells = [_mean(found[method], *column) for column in columns.values()]
            lines.append(f"| {method.replace('_', ' ')} | {len(by_method[method])} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _teachers(cost: dict[str, float]) -> dict[str, float]:
    """The teacher's part of a cost that was measured beside a student."""
    return {"flops": cost["teacher_flops"], "seconds": cost["teacher_seconds"], "speed": 1.0}


def _mean(rows: list[dict[str, Any]], path: tuple[str, ...], form: str, unit: float = 1) -> str:
    """A figure's mean over the rows that have it, with its standard deviation where that shows."""
    found: list[Any] = rows
    for key in path:
        found = [value[key] for value in found if key in value]
    if not found:
        return "–"
    values = [value / unit for value in found]
    spread = form.format(statistics.stdev(values) if len(values) > 1 else 0)
    return form.format(statistics.fmean(values)) + (f" ± {spread}" if spread != form.format(0) else "")


def filled_world(guide: str) -> str:
    """The small world's page with its results."""
    rows = json.loads(WORLD.read_text(encoding="utf-8"))
    for backbone in BACKBONES:
        guide = between(guide, backbone, world_tables([row for row in rows if row["backbone"] == backbone]))
    return between(guide, "piecewise", piecewise_table(json.loads(PIECEWISE.read_text(encoding="utf-8"))))


def piecewise_table(rows: list[dict[str, Any]]) -> str:
    """The forms that are exact for a part of the keys, a line each: keys per query, and errors without training."""
    sizes = sorted({row["tokens"] for row in rows})
    heads = [f"{n:,} tokens: {part}" for n in sizes for part in ("keys", *(backbone_named(b).title for b in BACKBONES))]
    lines = [f"| attention | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, form in FORMS.items():
        cells = [form.title]
        for tokens in sizes:
            found = {row["backbone"]: row for row in rows if (row["form"], row["tokens"]) == (name, tokens)}
            cells += [f"{found[BACKBONES[0]]['keys']:.0f}", *(f"{found[b]['error']:.5f}" for b in BACKBONES)]
        lines.append(f"| {' | '.join(cells)} |")
    scenes = [
        f"{max(row['scenes'] for row in rows if row['tokens'] == tokens)} at {tokens:,} tokens" for tokens in sizes
    ]
    return "\n".join([*lines, "", f"Held-out scenes: {' and '.join(scenes)}."])


def _about(backbone: str, run: dict[str, Any]) -> str:
    return f"| {backbone_named(backbone).title} | {run['blocks']} | {run['resolution']}² | {run['dtype']} | "


PAGES = {
    ROOT / "README.md": filled,
    ROOT / "docs" / "speed.md": filled_speed,
    ROOT / "docs" / "training.md": filled_training,
    ROOT / "docs" / "world.md": filled_world,
}
"""Pages, and what fills their tables."""


if __name__ == "__main__":
    for path, fill in PAGES.items():
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
