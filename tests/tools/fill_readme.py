"""Writes the tables of README.md and docs/training.md from the measurements in docs/: `tests/tools/fill_readme.py`."""

from __future__ import annotations

import json
from pathlib import Path

from edit_core.backbones import BACKBONES
from edit_core.bench import Measurement, table

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS, TRAINING = ROOT / "docs" / "bench_cpu.json", ROOT / "docs" / "bench_training.json"


def between(text: str, mark: str, new: str) -> str:
    """The text with what stands between two marks replaced."""
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->\n"
    before, rest = text.split(begin)
    return f"{before}{begin}{new}\n{end}{rest.split(end)[1]}"


def filled(readme: str) -> str:
    """The README with its table of speeds."""
    measurements = [Measurement.from_json(data) for data in json.loads(MEASUREMENTS.read_text(encoding="utf-8"))]
    text = (
        "Seconds per call of the whole transformer at full size (28 and 24 blocks, real widths, random weights), the "
        "model's own attention and EDiT in alternation; median, with the fastest and slowest. `make bench` measures "
        "it anew.\n\n" + table(measurements)
    )
    return between(readme, "bench", text)


def filled_training(guide: str) -> str:
    """The training guide with what a training costs."""
    found = json.loads(TRAINING.read_text(encoding="utf-8"))
    lines = [
        "Memory of the shipped configurations per process, estimated from the real models' shapes (`--estimate` does "
        "it for yours):",
        "",
    ]
    for name, stages in found["estimates"].items():
        lines += [f"- `{name}`", *(f"  - {stage}" for stage in stages)]
    lines += [
        "",
        "Measured by `make bench-training`, real widths, random weights, batch 1; overhead is an engine's step against "
        "the same two forwards, losses and backward by hand:",
        "",
        "| model | blocks | picture | dtype | transfer: s per step, peak GB (estimate) | distill, checkpointed: s per "
        "step, peak GB (estimate) | engine's overhead |",
        "|---|---|---|---|---|---|---|",
    ]
    for backbone, run in found.items():
        if backbone == "estimates":
            continue
        stages = [
            f"{s['seconds']:.1f} s, {s['peak_gb']:.1f} ({s['estimate_gb']:.1f})"
            for s in (run["transfer"], run["distill"])
        ]
        title, overhead = BACKBONES[backbone].title, run["overhead"]["overhead"]
        lines.append(
            f"| {title} | {run['blocks']} | {run['resolution']}² | {run['dtype']} | {' | '.join(stages)} | "
            f"{overhead:+.1%} |"
        )
    device, version = found["pixart_sigma"]["device"], found["pixart_sigma"]["torch"]
    lines += ["", f"{device}; PyTorch {version}. No GPU was at hand: measure a few steps on yours, and multiply."]
    return between(guide, "training", "\n".join(lines))


if __name__ == "__main__":
    for path, fill in ((ROOT / "README.md", filled), (ROOT / "docs" / "training.md", filled_training)):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
