"""Transfer in minutes, from a handful of prompts: the teacher draws, and every attention learns while it does.

No data set is needed: each step of the teacher's own sampling is one step of the training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import CELL, Backbone, backbone_named
from ..errors import EDiTError
from ..hosts.diffusers import apply_edit
from ..weights import EDiTWeights
from .losses import TransferTap
from .transfer import frozen, trained_weights, transfer

__all__ = ["calibrate"]


def calibrate(
    transformer: Any,
    weights: EDiTWeights,
    conditions: Sequence[Mapping[str, Tensor]],
    negative: Mapping[str, Tensor],
    *,
    steps: int = 200,
    lr: float = 5e-3,
    height: int = 64,
    width: int = 64,
    sampler_steps: int = 20,
    guidance: float = 4.5,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[EDiTWeights, list[float]]:
    """Trains EDiT weights on what their teacher sees while it draws.

    Args:
        transformer: the teacher, a diffusers transformer; it is left as it was.
        weights: where to begin; not changed.
        conditions: per prompt, `prompt_embeds (1, T, C)` and `prompt_mask (1, T)` or `pooled (1, P)`.
        negative: the same for the negative prompt.
        steps: of the training; each is one step of the teacher's sampling.
        lr: highest learning rate; it falls to zero along a cosine.
        height: of the latent; a multiple of 2.
        width: of the latent; a multiple of 2.
        sampler_steps: of each picture that the teacher draws.
        guidance: of the teacher's sampling.
        seed: seeds the pictures' noise.
        on_step: is told each step and its mean relative error; may raise to stop, and nothing is kept then.

    Returns:
        the trained weights, and each step's mean relative error.

    Raises:
        EDiTError: no condition, a size that the teacher cannot draw, or an error that is not finite.
    """
    if not conditions:
        raise EDiTError("calibrate needs at least one prompt")
    backbone = backbone_named(weights.backbone)
    backbone.check_size(height * CELL, width * CELL, transformer)
    with apply_edit(transformer, weights) as handle, frozen(transformer):
        for trained in (handle.sides, handle.differences):
            trained.float().requires_grad_(True)
        parameters = handle.trainable()
        shape = (1, transformer.config.in_channels, height, width)
        drawing = _draw(transformer, backbone, conditions, negative, shape, sampler_steps, guidance, seed)

        def teach(tap: TransferTap) -> None:
            handle.tap = tap
            next(drawing)

        scaled = transformer.dtype == torch.float16
        losses = transfer(
            parameters, teach, steps=steps, lr=lr, device=transformer.device, scaled=scaled, on_step=on_step
        )
        recipe = {"lr": lr, "guidance": guidance}
        return trained_weights(weights, parameters, recipe, steps, f"{len(conditions)} prompts"), losses


def _draw(
    transformer: Any,
    backbone: Backbone,
    conditions: Sequence[Mapping[str, Tensor]],
    negative: Mapping[str, Tensor],
    shape: tuple[int, ...],
    sampler_steps: int,
    guidance: float,
    seed: int,
) -> Iterator[None]:
    """Samples for ever, picture after picture and prompt after prompt; every `next` is one step of the sampling."""
    device, dtype = transformer.device, transformer.dtype
    scheduler = backbone.objective.scheduler()
    for picture in itertools.count():
        scheduler.set_timesteps(sampler_steps)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed + picture)).to(device)  # (1, c, h, w)
        both = _pair(conditions[picture % len(conditions)], negative)
        for time in scheduler.timesteps:
            twice = latent.expand(2, -1, -1, -1).to(dtype)
            arguments = backbone.call_arguments(twice, time.expand(2).to(device), both, device)
            with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
                guided, plain = backbone.objective.prediction(transformer(**arguments)[0]).float().chunk(2)
            latent = scheduler.step(plain + guidance * (guided - plain), time, latent).prev_sample
            yield


def _pair(condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, negative[name]]) for name, value in condition.items()}
