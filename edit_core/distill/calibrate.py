"""Transfer in minutes, from a handful of prompts: the teacher draws, and every attention learns while it does.

No data set is needed: each step of the teacher's own sampling is one step of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .. import __version__
from ..apply import apply_edit
from ..errors import EDiTError
from ..weights import EDiTWeights
from .losses import TransferTap
from .objective import call_arguments, prediction
from .optimizer import make_optimizer

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
        EDiTError: no condition, or an error that is not finite.
    """
    if not conditions:
        raise EDiTError("calibrate needs at least one prompt")
    backbone, device = weights.backbone, transformer.device
    losses: list[float] = []
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    with apply_edit(transformer, weights) as handle, _frozen(trainable):
        for trained in (handle.sides, handle.differences):
            trained.float().requires_grad_(True)
        parameters = handle.trainable()
        optimizer = make_optimizer(parameters, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        scaler = torch.amp.GradScaler(device.type, enabled=transformer.dtype == torch.float16)
        handle.tap = TransferTap(lambda loss: scaler.scale(loss).backward())
        autocast = torch.autocast(device.type, transformer.dtype, transformer.dtype != torch.float32)
        scheduler, latent, picture = _sampler(backbone), torch.empty(0), 0
        times: list[Tensor] = []
        for step in range(steps):
            if not times:  # the next picture
                scheduler.set_timesteps(sampler_steps)
                times = list(scheduler.timesteps)
                generator = torch.Generator().manual_seed(seed + picture)
                latent = torch.randn(1, transformer.config.in_channels, height, width, generator=generator).to(device)
                both = _pair(conditions[picture % len(conditions)], negative)
                picture += 1
            time = times.pop(0)
            twice = latent.expand(2, -1, -1, -1).to(transformer.dtype)
            arguments = call_arguments(backbone, twice, time.expand(2).to(device), both, device)
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad(), autocast:
                guided, plain = prediction(backbone, transformer(**arguments)[0]).float().chunk(2)
            latent = scheduler.step(plain + guidance * (guided - plain), time, latent).prev_sample
            losses.append(float(torch.stack(list(handle.tap.losses.values())).mean()))
            if losses[-1] != losses[-1] or losses[-1] == float("inf"):
                raise EDiTError(f"the error is not finite at step {step}; try a lower lr")
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            on_step(step, losses[-1])
        tensors = {name: p.detach().cpu().clone() for name, p in parameters.items()}
    training = {"recipe": {"calibrate": {"lr": lr, "guidance": guidance}}, "steps": steps, "tool_version": __version__}
    return replace(weights, tensors=tensors, training={**training, "data": f"{len(conditions)} prompts"}), losses


@contextmanager
def _frozen(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """The teacher's layers are called in every loss; they are to gather no gradients."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _sampler(backbone: str) -> Any:
    if backbone == "pixart_sigma":
        return DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=False)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _pair(condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, negative[name]]) for name, value in condition.items()}
