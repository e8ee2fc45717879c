"""Shared settings of the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 2)))
settings.register_profile("edit", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("edit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per backbone, a trained teacher and its cache; made on first use."""
    from support import training  # here, since it needs the extra `distill`, which most tests do not

    made: dict[str, dict[str, Path]] = {}

    def get(backbone: str) -> dict[str, Path]:
        if backbone not in made:
            made[backbone] = training.prepare(backbone, tmp_path_factory.mktemp(backbone))
        return made[backbone]

    return get
