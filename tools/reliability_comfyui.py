"""Writes docs/reliability-comfyui.md from docs/matrix.json, docs/matrix_slow.json and docs/soak.json, which
`make matrix` and `make soak` measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
BACKBONES = {"pixart_sigma": "PixArt-Σ", "sd35_medium": "SD3.5-M"}
HEAD = """# Beside everything else in ComfyUI

The figures on this page were measured by the tests that `make matrix` and `make soak` run, in real ComfyUI processes
on a CPU, and written by `tools/reliability_comfyui.py`; a cell may be from a later run than its neighbours. The
models are the pack's small trained teachers and students, unless a cell says otherwise. A *change* is the relative
difference that a node makes to the latent that KSampler gives; *cosine* says how far the teacher's and the student's
change point the same way (unrelated ones have 0). A cell passes only if the base is bit-equal afterwards, the student
too, and its figures are within its bounds. Those follow from what is compared, not from what was measured:

- the same computation by another way differs by less than 1e-4 where float32 adds up in another order, and by nothing
  where it does not;
- what a node does to the teacher and to the student has one direction, a cosine over 0.2 where unrelated pictures have
  under 0.05, and one strength, within a factor of five: a node that one of them ignores, or has twice, would show;
- from a picture at half the noise, the cosine is over 0.7: half of the change is handed to both, and the rest alike;
- rounding the base to 8 or 4 bits costs the student at most half as much again as the teacher; and a LoRA, which is
  rounded with the base, meets at most twice the noise, since the student's own differences are rounded too;
- sizes that are not square cost at most half as much again as the size that the student was trained on, and 0.6.
"""


def load(name: str) -> dict[str, Any]:
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def cell(outcome: dict[str, Any]) -> str:
    if not outcome["ok"]:
        return "**fails**"
    return "; ".join(f"{name} {shown(value)}" for name, value in outcome["figures"].items())


def matrix() -> list[str]:
    held = [load(name) for name in ("matrix", "matrix_slow")]
    versions = sorted({version for part in held for version in part})
    lines = ["## The composition matrix", ""]
    for version in versions:
        cells = {name: outcome for part in held for name, outcome in part.get(version, {}).items()}
        empty = sum(is_empty(outcome) for outcome in cells.values())
        passed = sum(outcome["ok"] for outcome in cells.values()) - empty
        lines += [f"- ComfyUI {version}: {passed} of {len(cells) - empty} cells pass; {empty} do not exist there."]
        unmeasured = sorted({f"{name}[{backbone}]" for name in checks() for backbone in BACKBONES} - cells.keys())
        lines += [f"  Without figures as yet: {', '.join(unmeasured)}."] if unmeasured else []
    for version in versions:
        for backbone, title in BACKBONES.items():
            lines += ["", f"### ComfyUI {version}, {title}", "", "| combination | figures |", "|---|---|"]
            for part in held:
                for name, outcome in part.get(version, {}).items():
                    if name.endswith(f"[{backbone}]"):
                        lines.append(f"| {outcome['about']} | {cell(outcome)} |".replace("\n", " "))
    return lines


def checks() -> list[str]:
    """The names of all checks but the table's."""
    return [
        name
        for path in (DOCS.parent / "tests/comfyui").glob("matrix_*.py")
        for name in re.findall(r"^def (check_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def is_empty(outcome: dict[str, Any]) -> bool:
    """Whether a cell only says why there is nothing to combine."""
    return outcome["ok"] and set(outcome["figures"]) <= {"not in this ComfyUI", "not for this model", "skipped"}


def soak() -> list[str]:
    lines = ["", "## The soak", "", "One server, both backbones in random order; megabytes are of 2^20 bytes.", ""]
    for version, figures in load("soak").items():
        lines.append(
            f"- ComfyUI {version}: {figures['prompts']} prompts, {figures['interrupted']} of them interrupted; "
            f"{figures['drawn, each bit-equal to its first']} latents of {figures['different prompts']} different "
            f"prompts, each bit-equal to the first of its kind. After {figures['warm-up, prompts']} prompts the server "
            f"held {figures['memory after the warm-up, bytes'] / 2**20:.0f} MB, later at most "
            f"{figures['growth, bytes'] / 2**20:.1f} MB more (bound: {figures['bound, bytes'] / 2**20:.0f})."
        )
    return lines


if __name__ == "__main__":
    text = "\n".join([HEAD, *matrix(), *soak()]) + "\n"
    (DOCS / "reliability-comfyui.md").write_text(text, encoding="utf-8")
