"""Shared settings of the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import Phase, settings

from support import comfy, models

# The models are small, and processes run side by side: more threads would only wait for one another.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
settings.register_profile("edit", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("unshrunk", settings.get_profile("edit"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("edit")


LONGEST = ("test_teaching_comfyui", "test_workflows", "test_end_to_end", "test_comfyui", "test_faults")
"""Files that take a minute or two each; the other workers would wait for one of these if it came last."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test` has no time for: all but the newest ComfyUI, what a module's `PIXART_SLOW` names, and of the two
    backbones that are relatives what its `RELATIVES`, where it has that, does not name.

    Those checks and tests look at code that is the same for all models, and take seconds each.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # stable
    found = comfy.checkouts()
    older = set(found) - {max(found, key=comfy.version)} if found else set()
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        named = getattr(item.module, "PIXART_SLOW", ())
        slow = given.get("check", item.name.partition("[")[0]) in named
        old = any(isinstance(value, Path) and value in older for value in given.values())
        relatives = getattr(item.module, "RELATIVES", None)
        related = relatives is not None and given.get("backbone") not in (None, *models.SHIPPED)
        left = related and given.get("check", item.name.partition("[")[0]) not in relatives
        if old or left or (slow and given["backbone"] != "sd35_medium"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per backbone, a trained teacher and its cache; made on first use."""
    from support import training  # here, since it needs the extra `distill`, which most tests do not

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(backbone: str) -> dict[str, Path]:
        folder = shared / f"prepared-{backbone}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "done").exists():
                training.prepare(backbone, folder)
                (folder / "done").touch()
        return {"model": folder / "model", "cache": folder / "cache"}

    return get
