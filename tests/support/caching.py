"""Pictures, tars, a stand-in for a pipeline, and what tests of caches share."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import pipelines
from support.models import BACKBONES
from torch import Tensor

from edit_core.distill.dataset import CachedLatents
from edit_core.distill.encoders import PipelineEncoder

SIZES = [(200, 100), (100, 200), (128, 128), (70, 72), (60, 60), (300, 220), (150, 140), (129, 300)]  # width, height
STEP = {"bucket_step": 16, "batch_size": 4}


class PoolEncoder:
    """Stands in for a pipeline where only the files matter: a latent cell is the mean colour of its pixels."""

    backbone = "pixart_sigma"
    dtype = torch.float32
    fingerprint = "pool"

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 8) / 255

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = [torch.frombuffer(bytearray(hashlib.sha256(p.encode()).digest()), dtype=torch.uint8) for p in prompts]
        embeds = torch.stack(rows).float().view(-1, 4, 8)
        return {"prompt_embeds": embeds, "prompt_mask": torch.ones(len(rows), 4, dtype=torch.bool)}

    def too_long(self, caption: str) -> list[str]:
        return ["20 words"] if len(caption.split()) > 20 else []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {backbone: pipelines.build(backbone, root / backbone) for backbone in BACKBONES}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, PipelineEncoder]:
    return {name: PipelineEncoder(folder, torch.device("cpu"), torch.float32) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("images"), SIZES * 3)


def draw(folder: Path, sizes: Iterable[tuple[int, int]]) -> Path:
    """Smooth random pictures with captions, every third one in a subfolder."""
    generator = np.random.default_rng(0)
    for index, (width, height) in enumerate(sizes):
        path = folder / ("sub.dir" if index % 3 == 2 else "") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"an old painting of ships, number {index}\n")
    return folder


def contents(folder: str | Path, resolutions: Sequence[int]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """All samples, by resolution and source."""
    found = {}
    for resolution in resolutions:
        data = CachedLatents(folder, resolution, verify=True)
        for index in range(len(data)):
            found[resolution, data.info(index)["source"]] = data[index]
    return found


def assert_same(actual: dict[Any, dict[str, Tensor]], expected: dict[Any, dict[str, Tensor]]) -> None:
    assert sorted(actual) == sorted(expected)
    for key, sample in expected.items():
        assert actual[key].keys() == sample.keys()
        for name, tensor in sample.items():  # other batches are other sums in the VAE and the text encoders
            torch.testing.assert_close(actual[key][name], tensor, rtol=1e-4, atol=1e-4)


def encoded(size: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
