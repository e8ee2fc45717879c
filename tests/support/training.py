"""A small teacher that was trained a little, its cache, and configurations to distil it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from edit_core.backbones import backbone_named
from edit_core.distill.cache import build_cache
from edit_core.distill.config import RunConfig
from edit_core.distill.dataset import BatchPlan, CachedLatents
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.sources import FolderSource

from . import pipelines

RESOLUTION = 128
PROMPT_TOKENS = 96  # CLIP's 77, and what there is of T5's


def draw_images(folder: Path, count: int = 16) -> Path:
    """Coloured shapes on textured grounds, with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        size = (160, 160) if i % 2 else (200, 140)
        ground = rng.integers(0, 90, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize(size)
        colour, name = [((220, 40, 40), "red"), ((40, 200, 60), "green")][i % 2]
        x, y = rng.integers(10, 90, 2)
        ImageDraw.Draw(image).ellipse((x, y, x + 45, y + 45), fill=colour)
        image.save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"a {name} ship in the snow")
    return folder


class ShortPrompts(PipelineEncoder):
    """Keeps the beginning of the embeddings: over 300 tokens of padding would take most of a small model's time."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: value[:, :PROMPT_TOKENS] for name, value in super().encode_prompts(prompts).items()}


def prepare(backbone: str, folder: Path, teacher_steps: int = 250) -> dict[str, Path]:
    """A pipeline whose transformer was trained on the cache for a while, and the cache."""
    model = pipelines.build(backbone, folder / "model")
    encoder = ShortPrompts(model, torch.device("cpu"), torch.float32)
    build_cache(FolderSource(draw_images(folder / "images")), encoder, folder / "cache", [RESOLUTION], bucket_step=32)
    torch.manual_seed(2)
    known = backbone_named(backbone)
    transformer_class = getattr(diffusers, known.transformer)
    transformer: Any = transformer_class.from_config(transformer_class.load_config(model / "transformer"))
    transformer.train()
    data = CachedLatents(folder / "cache", RESOLUTION)
    plan = BatchPlan(data, 4, seed=1)
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-3)
    for step in range(teacher_steps):
        batch = data.collate(plan.batch(step))
        generators = [torch.Generator().manual_seed(1000 * step + i) for i in range(4)]
        noised = known.objective.noise_batch(batch["latent"].float(), generators)
        arguments = known.call_arguments(noised.latent, noised.timestep, batch, torch.device("cpu"))
        output = known.objective.prediction(transformer(**arguments)[0])
        loss = F.mse_loss(output, known.objective.target(batch["latent"].float(), noised))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    transformer.eval().save_pretrained(model / "transformer")
    return {"model": model, "cache": folder / "cache"}


def config(prepared: dict[str, Path], output: Path, *stages: dict[str, Any], **fields: Any) -> RunConfig:
    common = {"resolution": RESOLUTION, "batch_size": 4, "steps": 6}
    return RunConfig.model_validate(
        {
            "model": prepared["model"],
            "cache": str(prepared["cache"]),
            "output": output,
            "precision": "float32",
            "device": "cpu",
            "ema": 0.9,
            "checkpoint_every": 3,
            "watch": {"held_out": 0, "evaluate_every": 0, "preview_every": 0},
            "stages": [{**common, **stage} for stage in stages],
            **fields,
        }
    )


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def write_yaml(config: RunConfig, path: Path) -> Path:
    path.write_text(config.model_dump_json())  # JSON is YAML
    return path
