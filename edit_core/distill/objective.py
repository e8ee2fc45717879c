"""What a teacher is trained on: how a latent is noised, what is predicted, and how a batch enters the transformer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Noised", "Weighting", "add_noise", "call_arguments", "noise_batch", "prediction", "task_target",
]  # fmt: skip

Weighting = Literal["logit_normal", "mode", "uniform"]

_TRAIN_STEPS = 1000
_BETAS = (0.0001, 0.02)  # PixArt-Σ's schedule: betas linear in time, as in its diffusers scheduler
_MODE_SCALE = 1.29
_UNIFORM = 0.15
"""Share of PixArt-Σ's times that are drawn uniformly all the same: samplers begin where no other scheme draws any."""
_QUANTILES = 1 << 16


class Noised(NamedTuple):
    """A batch somewhere on its way from picture to noise."""

    latent: Tensor
    """`(B, c, h, w)`, what the transformer sees."""
    noise: Tensor
    """`(B, c, h, w)`"""
    timestep: Tensor
    """`(B,)`, as the transformer takes it, 0-1000."""
    weight: Tensor
    """`(B,)` float32, how much a sample's squared error counts."""


def noise_batch(
    backbone: str,
    latent: Tensor,
    generators: Sequence[torch.Generator],
    weighting: Weighting | None = None,
    shift: float = 1.0,
) -> Noised:
    """Draws noise and times for a batch of clean latents.

    SD3.5: the straight path `(1-σ)·x + σ·noise`, times by SD3's weighting schemes ("Scaling Rectified Flow
    Transformers", arXiv 2403.03206, section 3.1), then shifted for the resolution, `σ' = s·σ / (1 + (s-1)·σ)`.

    PixArt-Σ: DDPM with uniform times, as it was trained; two thirds of them are nearly pure noise, so that few steps
    train what a caption is about. By another weighting (ours) its times are drawn at the same ratios of signal to noise
    as SD3.5's, a few uniformly, and errors of the noise count as those of SD3.5's velocity would.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        latent: clean latents `(B, c, h, w)`.
        generators: one per sample, on the CPU: a sample's numbers depend on neither the device nor its neighbours.
        weighting: of the times; None for `uniform` (PixArt-Σ) or `logit_normal` (SD3.5).
        shift: of the times, but for PixArt-Σ's uniform ones; SD3 takes 3 at 1024 pixels.
    """
    noise = torch.stack([torch.randn(latent.shape[1:], generator=g) for g in generators])  # (B, c, h, w)
    if backbone == "sd35_medium":
        u = torch.cat([torch.rand(1, generator=g) for g in generators])
        return add_noise(backbone, latent, noise, _sigma(weighting or "logit_normal", shift, u) * _TRAIN_STEPS)
    if weighting in (None, "uniform"):
        timestep = torch.cat([torch.randint(0, _TRAIN_STEPS, (1,), generator=g) for g in generators])
        return add_noise(backbone, latent, noise, timestep)
    chances, weights = _pixart_times(weighting, shift)
    timestep = torch.cat([torch.multinomial(chances, 1, generator=g) for g in generators])
    return add_noise(backbone, latent, noise, timestep)._replace(weight=weights[timestep].to(latent.device))


def add_noise(backbone: str, latent: Tensor, noise: Tensor, timestep: Tensor) -> Noised:
    """Brings clean latents to given times.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        latent: clean latents `(B, c, h, w)`.
        noise: of the same shape, anywhere.
        timestep: `(B,)`, 0-1000; whole numbers up to 999 for PixArt-Σ.
    """
    noise, timestep = noise.to(latent.device, latent.dtype), timestep.to(latent.device)
    if backbone == "pixart_sigma":
        alpha = _alphas_cumprod().to(latent.device)[timestep].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    else:
        sigma = (timestep / _TRAIN_STEPS).view(-1, 1, 1, 1)
        noised = (1 - sigma) * latent + sigma * noise
    return Noised(noised.to(latent.dtype), noise, timestep, torch.ones(len(latent), device=latent.device))


def task_target(backbone: str, latent: Tensor, noised: Noised) -> Tensor:
    """What a perfect model predicts: PixArt-Σ the noise, SD3.5 the velocity `noise - latent`; `(B, c, h, w)`."""
    return noised.noise if backbone == "pixart_sigma" else noised.noise - latent


def prediction(backbone: str, output: Tensor) -> Tensor:
    """The part of a transformer's output that is its prediction: PixArt-Σ adds a variance that samplers ignore."""
    return output.chunk(2, dim=1)[0] if backbone == "pixart_sigma" else output


def call_arguments(
    backbone: str, latent: Tensor, timestep: Tensor, condition: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of the diffusers transformer for a batch.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        latent: `(B, c, h, w)`, noised.
        timestep: `(B,)`.
        condition: `prompt_embeds (B, T, C)`, and `prompt_mask (B, T)` (PixArt-Σ) or `pooled (B, P)` (SD3.5).
        device: where the transformer is.
    """
    arguments: dict[str, Any] = {
        "hidden_states": latent,
        "timestep": timestep,
        "encoder_hidden_states": condition["prompt_embeds"].to(device, latent.dtype),
        "return_dict": False,
    }
    if backbone == "pixart_sigma":
        arguments["encoder_attention_mask"] = condition["prompt_mask"].to(device)
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    else:
        arguments["pooled_projections"] = condition["pooled"].to(device, latent.dtype)
    return arguments


def _sigma(weighting: Weighting, shift: float, u: Tensor) -> Tensor:
    """What makes uniform numbers SD3.5's times, 0-1."""
    if weighting == "logit_normal":
        u = torch.special.ndtri(u).sigmoid()
    elif weighting == "mode":
        u = 1 - u - _MODE_SCALE * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    return shift * u / (1 + (shift - 1) * u)


@functools.cache
def _pixart_times(weighting: Weighting, shift: float) -> tuple[Tensor, Tensor]:
    """How often each of PixArt-Σ's times is drawn, and how much its squared error counts then; both `(1000,)`."""
    alpha = _alphas_cumprod().double()
    signal = alpha.sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())  # 1 - sigma, of the straight path through x / noise
    sigma = _sigma(weighting, shift, (torch.arange(_QUANTILES).double() + 0.5) / _QUANTILES)
    nearest = torch.searchsorted((1 - signal)[:-1], sigma)
    chance = torch.bincount(nearest, minlength=_TRAIN_STEPS) / _QUANTILES
    drawn = (1 - _UNIFORM) * chance + _UNIFORM / _TRAIN_STEPS
    return drawn, ((chance / signal.square() + _UNIFORM / _TRAIN_STEPS) / drawn).float()


@functools.cache
def _alphas_cumprod() -> Tensor:
    """How much of the signal's variance is left at PixArt-Σ's times, `(1000,)`."""
    return torch.cumprod(1 - torch.linspace(*_BETAS, _TRAIN_STEPS), 0)
