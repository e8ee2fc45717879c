"""Measures what docs/reliability.md tells, and writes it there: `tools/reliability.py faults`, `… fuzz 200000`.

Each section of docs/reliability.json is what one command found; the page's tables are filled from that file alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from fill_readme import between
from support import fuzz
from support.models import BACKBONES

RESULTS, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
SHARES = {"weights": 0.7, "base": 0.15, "cache": 0.1, "config": 0.05}
"""Of the kinds of files, as in `make test`."""
KILLS = "tests/test_distill.py::test_kills_at_random_moments_lose_nothing_but_steps_since_the_last_checkpoint"
SUITES: dict[str, list[str]] = {
    "numbers": ["tests/test_numbers.py"],
    "hostile": ["tests/test_hostile_files.py"],
    "faults": ["tests/test_faults.py", "tests/test_cache_restarts.py", *(f"{KILLS}[{b}]" for b in BACKBONES)],
}
"""Sections that are what tests found, and the tests, each of which may run by itself."""


def tests(path: str) -> dict[str, Any]:
    """Runs tests; how many passed, and the figures that they recorded, summed by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-q", f"--junitxml={report}", path]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    figures: dict[str, int] = {}
    for entry in suite.iter("property"):
        if not entry.attrib["name"].startswith("hypothesis-statistics"):  # hypothesis adds a text of its own
            figures[entry.attrib["name"]] = figures.get(entry.attrib["name"], 0) + int(entry.attrib["value"])
    skipped = int(suite.attrib["skipped"])
    return {"tests": int(suite.attrib["tests"]) - skipped, "skipped": skipped, "figures": figures}


def fuzzed(count: int) -> dict[str, Any]:
    """Tries so many mutated files in all, in pieces that are told apart where one of them ends its process."""
    found: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kind, share in SHARES.items():
            starts = range(0, round(count * share), piece := 25_000)
            ends = [min(start + piece, round(count * share)) for start in starts]
            parts = pool.map(lambda a, b, kind=kind: fuzz.run(kind, b - a, a), starts, ends)
            total: dict[str, int] = {}
            for part in parts:
                total = {what: total.get(what, 0) + part.get(what, 0) for what in ("files", "refused", "read")}
            found[kind] = total
            print(kind, total, flush=True)
    return found


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of those sections that there are results of."""
    if "fuzz" in results:
        rows = ["| files | tried | refused by a sentence | read | crashed, hung, or else |", "|---|---|---|---|---|"]
        names = {"weights": "EDiT weights", "base": "base models", "cache": "caches", "config": "configurations"}
        for kind, found in results["fuzz"].items():
            rows.append(f"| {names[kind]} | {found['files']:,} | {found['refused']:,} | {found['read']:,} | 0 |")
        rows.append(f"| all | {sum(found['files'] for found in results['fuzz'].values()):,} | | | 0 |")
        page = between(page, "fuzz", "\n".join(rows))
    for section in SUITES:
        if section in results:
            found = results[section].values()
            figures = {name: value for part in found for name, value in part["figures"].items()}
            lines = [f"{sum(part['tests'] for part in found)} tests passed."]
            lines += [f"- {name}: {value:,}" for name, value in sorted(figures.items())]
            if section == "faults":
                ended = sum(value for name, value in figures.items() if name.startswith(("kills", "deaths")))
                lines.append(f"- **ended at some moment in all: {ended}; lost: 0**")
            page = between(page, section, "\n".join([lines[0], *([""] if lines[1:] else []), *lines[1:]]))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=["fuzz", "page", *SUITES])
    parser.add_argument("count", nargs="?", type=int, default=200_000, help="of mutated files")
    parser.add_argument("--only", default="", metavar="PART", help="tests whose path holds this; the others' stay")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.section == "fuzz":
        results["fuzz"] = fuzzed(options.count)
    elif options.section != "page":
        held = results.setdefault(options.section, {})
        held |= {path: tests(path) for path in SUITES[options.section] if options.only in path}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
