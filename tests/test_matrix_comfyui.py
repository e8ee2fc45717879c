"""The composition matrix: EDiT beside what people combine it with, in every ComfyUI, with figures for each cell.

The checks are `comfyui/matrix*.py`; where `EDIT_TEST_RECORD` names a folder, their figures go to matrix.json there.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
from comfyui.matrix_nodes import ROWS
from support import comfy, models, record

FOLDER = Path(__file__).parent / "comfyui"
FOUND = comfy.checkouts()
FAST = [f"check_beside_{row}" for row in ROWS]
SLOW: list[str] = []
ABOUT = {f"check_beside_{name}": f"{row.node}, before and after EDiT." for name, row in ROWS.items()}
for path in sorted(FOLDER.glob("matrix_*.py")):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
            (SLOW if path.stem == "matrix_slow" else FAST).append(node.name)
            ABOUT[node.name] = " ".join((ast.get_docstring(node) or "").split())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI),
    pytest.mark.parametrize("backbone", models.SHIPPED),
    pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base directory per ComfyUI."""

    @functools.cache
    def made(checkout: Path) -> Path:
        base = tmp_path_factory.mktemp(f"matrix-{checkout.name}")
        comfy.write_files(base)
        return base

    return made


@pytest.fixture(scope="module")
def results(bases: Any) -> Any:
    """What a script's checks gave in a ComfyUI, by name; all run at once and once, on first use, or a single one."""

    @functools.cache
    def run(script: str, checkout: Path, *only: str) -> dict[str, Any]:
        found = comfy.run_checks(FOLDER / f"{script}.py", checkout, bases(checkout), *only)
        cells = {
            cell: {"about": ABOUT[cell.partition("[")[0]]}
            | {key: outcome[key] for key in ("ok", "figures") if key in outcome}
            for cell, outcome in found.items()
        }
        record.record(script, checkout, cells, keep=bool(only))
        return found

    return run


def judge(outcome: dict[str, Any]) -> None:
    assert outcome["ok"], outcome["error"]
    assert outcome["figures"], "a cell without figures"
    if skipped := outcome["figures"].get("skipped"):
        pytest.skip(skipped)


@pytest.mark.parametrize("check", FAST)
def test_combination(checkout: Path, check: str, backbone: str, results: Any) -> None:
    judge(results("matrix", checkout)[f"{check}[{backbone}]"])


@pytest.mark.parametrize("check", SLOW)
def test_slow_combination(checkout: Path, check: str, backbone: str, results: Any) -> None:
    """Each in a ComfyUI of its own, since one may take minutes."""
    cell = f"{check}[{backbone}]"
    judge(results("matrix_slow", checkout, cell)[cell])
