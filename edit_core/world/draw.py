"""Draws the world's captions with a teacher or a student, and gives the scenes that all are asked for.

All that is random follows from fixed seeds, so two drawings with the same weights agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import CELL, backbone_named
from ..runtime import progress
from .codec import CHANNELS, decode, draw_scenes, encode, through
from .data import WorldEncoder
from .scenes import HELD_OUT, Scene
from .teachers import scheduler
from .text import WorldText

__all__ = ["batch_of", "call_of", "draw", "held_out", "pictures", "real"]


@torch.no_grad()
def draw(
    backbone: str,
    transformer: Any,
    captions: Sequence[str],
    seeds: Sequence[int],
    width: int = 256,
    height: int = 256,
    steps: int = 16,
    guidance: float = 3.0,
    batch: int = 16,
) -> Tensor:
    """Samples one picture per caption.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        transformer: of diffusers, as it is at the moment.
        captions: B of them.
        seeds: one per picture, of its noise alone, which depends on neither the device nor the batch.
        width: in pixels, a multiple of 16.
        height: likewise.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; up to 1 there is none.
        batch: pictures drawn at once.

    Returns:
        `(B, height, width, 3)` uint8 on the CPU.
    """
    known = backbone_named(backbone)
    text, device, dtype = WorldText(), transformer.device, transformer.dtype
    shape = (CHANNELS[backbone], height // CELL, width // CELL)
    pictures = []
    starts = range(0, len(captions), batch)
    for start in progress(starts, len(starts), f"{backbone}, {width}x{height}"):
        prompts = list(captions[start : start + batch])
        guided = guidance > 1
        condition = text.encode_prompts(prompts + [""] * len(prompts) * guided)
        latent = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds[start : start + batch]]
        ).to(device)
        plan = scheduler(backbone)
        plan.set_timesteps(steps, device=device)
        for time in plan.timesteps:
            latents = torch.cat([latent] * (1 + guided)).to(dtype)
            output = transformer(**known.call_arguments(latents, time.expand(len(latents)), condition, device))[0]
            output = known.objective.prediction(output).float()
            if guided:
                with_text, without = output.chunk(2)
                output = without + guidance * (with_text - without)
            latent = plan.step(output, time, latent, return_dict=False)[0]
        pictures.append(decode(backbone, latent).permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures)


def held_out(count: int) -> list[Scene]:
    """The first held-out scenes."""
    return [Scene.random(HELD_OUT + i) for i in range(count)]


def pictures(
    backbone: str, transformer: Any, asked: Sequence[Scene], size: int, steps: int = 16, batch: int = 16
) -> Tensor:
    """What a model draws of scenes' captions: `(B, size, size, 3)` uint8.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        transformer: as it is at the moment.
        asked: scenes; the noise's seed is the place in this list.
        size: pixels per side.
        steps: of the sampler.
        batch: pictures drawn at once.
    """
    captions, seeds = [scene.caption for scene in asked], range(len(asked))
    return draw(backbone, transformer, captions, seeds, size, size, steps, batch=batch)


def real(backbone: str, shown: Sequence[Scene], size: int) -> Tensor:
    """The scenes themselves through the codec, `(B, size, size, 3)` uint8: the best that a model could draw."""
    return through(backbone, draw_scenes(shown, size, size))


def batch_of(backbone: str, shown: Sequence[Scene], size: int) -> dict[str, Tensor]:
    """Latents and conditions of scenes, as a cache's samples are batched."""
    condition = WorldEncoder(backbone).encode_prompts([scene.caption for scene in shown])
    return {"latent": encode(backbone, draw_scenes(shown, size, size).permute(0, 3, 1, 2)), **condition}


def call_of(backbone: str, transformer: Any, size: int) -> dict[str, Any]:
    """Keyword arguments of a transformer's call halfway to noise, on a scene of this size, for timing and comparing."""
    batch = batch_of(backbone, held_out(1), size)
    latent = batch.pop("latent").to(transformer.device, transformer.dtype)
    time = torch.tensor([500], device=latent.device)
    return backbone_named(backbone).call_arguments(latent, time, batch, latent.device)
