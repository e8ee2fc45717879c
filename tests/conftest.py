"""Shared settings of the tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(max(1, (os.cpu_count() or 2)))
settings.register_profile("edit", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("edit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
