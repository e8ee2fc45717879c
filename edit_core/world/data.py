"""Caches of the world for `distill`: `python -m edit_core.world.data --backbone … --output …` (ours)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..distill.cache import build_cache
from ..distill.sampling import png
from ..distill.sources import Item
from ..runtime import progress
from .codec import CHANNELS, encode
from .scenes import Scene
from .text import WorldText

__all__ = ["SceneSource", "WorldEncoder", "main"]

FIRST = 1 << 36
"""Seed of a cache's first scene: neither a teacher's training nor an evaluation has seen it."""


class SceneSource:
    """Scenes by seed, drawn at the size that they are trained on: grains of 16 pixels survive no resampling.

    Args:
        count: how many.
        size: pixels per side.
        first: the first one's seed.
    """

    def __init__(self, count: int, size: int, first: int = FIRST) -> None:
        self.count, self.size, self.first = count, size, first
        self.others: dict[str, int] = {}

    @property
    def name(self) -> str:
        return f"scenes from {self.first} on at {self.size}²"

    def __iter__(self) -> Iterator[Item]:
        for seed in range(self.first, self.first + self.count):
            scene = Scene.random(seed)
            yield Item(f"scene-{seed}", partial(self._file, scene), scene.caption)

    def _file(self, scene: Scene) -> bytes:
        return png(Image.fromarray(scene.draw(self.size, self.size)))


class WorldEncoder:
    """The world's codec and text, as `cache` takes encoders."""

    dtype = torch.float16

    def __init__(self, backbone: str) -> None:
        self.backbone = backbone
        self._text = WorldText()

    @property
    def fingerprint(self) -> str:
        """Both are fixed by this package's code."""
        return f"small world of {self.backbone}, version 1"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """`(B, 3, 8h, 8w)` uint8 -> `(B, c, h, w)` float32."""
        return encode(self.backbone, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See :meth:`WorldText.encode_prompts`; what the backbone takes of it."""
        found = self._text.encode_prompts(prompts)
        mask, pooled = found.pop("prompt_mask"), found.pop("pooled")
        found["prompt_embeds"] = found["prompt_embeds"].to(self.dtype)
        if self.backbone == "pixart_sigma":
            return found | {"prompt_mask": mask}
        return found | {"pooled": pooled.to(self.dtype)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m edit_core.world.data",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", choices=[*CHANNELS], required=True)
    parser.add_argument("--output", required=True, help="the cache's folder; it is made, or continued")
    parser.add_argument("--count", type=int, default=8192, help="scenes")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    options: Any = parser.parse_args(arguments)
    source = SceneSource(options.count, options.size)
    report = build_cache(
        source, WorldEncoder(options.backbone), options.output, [options.size], batch_size=32, shard_size=1024,
        bucket_step=32, max_aspect=1.0, progress=progress,
    )  # fmt: skip
    print(f"{options.output}: {report}")


if __name__ == "__main__":
    main()
