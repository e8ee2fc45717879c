"""Writes the README's table of speeds from the measurements in docs/: `python tests/tools/fill_readme.py`."""

from __future__ import annotations

import json
from pathlib import Path

from edit_core.bench import Measurement, table

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "bench_cpu.json"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"


def filled(readme: str) -> str:
    """The README with the table between its two marks."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    measurements = [Measurement.from_json(data) for data in json.loads(MEASUREMENTS.read_text(encoding="utf-8"))]
    text = (
        "Seconds per call of the whole transformer at full size (28 and 24 blocks, real widths, random weights), the "
        "model's own attention and EDiT in alternation; median, with the fastest and slowest. `make bench` measures "
        "it anew.\n\n" + table(measurements)
    )
    return f"{before}{BEGIN}{text}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
