"""What a teacher is trained on: how a latent is noised, and what is predicted. Each backbone has one of these."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Diffusion", "Flow", "Noised", "Objective", "Weighting"]

Weighting = Literal["logit_normal", "mode", "uniform"]

_TRAIN_STEPS = 1000
_BETAS = (0.0001, 0.02)  # linear in time, as in PixArt's diffusers scheduler
_MODE_SCALE = 1.29
_UNIFORM = 0.15
"""Share of a diffusion's times that are drawn uniformly all the same: samplers begin where no other scheme draws."""
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


class Objective(ABC):
    """How latents are noised for a teacher, what a perfect one predicts, and what samples with it."""

    def noise_batch(
        self,
        latent: Tensor,
        generators: Sequence[torch.Generator],
        weighting: Weighting | None = None,
        shift: float = 1.0,
    ) -> Noised:
        """Draws noise and times for a batch of clean latents.

        Args:
            latent: clean latents `(B, c, h, w)`.
            generators: one per sample, on the CPU: a sample's numbers depend on neither the device nor its neighbours.
            weighting: of the times; None for the teacher's own.
            shift: of the times towards noise, `σ' = s·σ / (1 + (s-1)·σ)`; SD3 takes 3 at 1024 pixels.

        Raises:
            ValueError: an unknown weighting.
        """
        noise = torch.stack([torch.randn(latent.shape[1:], generator=g) for g in generators])  # (B, c, h, w)
        timestep, weight = self.times(generators, weighting, shift)
        noise, timestep = noise.to(latent.device, latent.dtype), timestep.to(latent.device)
        noised = self.mix(latent, noise, timestep).to(latent.dtype)
        return Noised(noised, noise, timestep, weight.to(latent.device))

    @abstractmethod
    def times(
        self, generators: Sequence[torch.Generator], weighting: Weighting | None, shift: float
    ) -> tuple[Tensor, Tensor]:
        """A time and a weight per sample, `(B,)` each."""

    @abstractmethod
    def mix(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What lies between latents and noise, `(B, c, h, w)` each, at times `(B,)`; in float32 or the latents' own."""

    @abstractmethod
    def target(self, latent: Tensor, noised: Noised) -> Tensor:
        """What a perfect model predicts, `(B, c, h, w)`."""

    @abstractmethod
    def prediction(self, output: Tensor) -> Tensor:
        """The part of a transformer's output that is its prediction."""

    @abstractmethod
    def scheduler(self, order: Literal[1, 2] = 1, shift: float | None = None) -> Any:
        """A diffusers sampler.

        Args:
            order: 2 for one that needs few steps.
            shift: of a flow's times; by default the backbone's own.
        """


class Flow(Objective):
    """The straight path `(1-σ)·x + σ·noise` and its velocity `noise - x`.

    Times by SD3's weighting schemes ("Scaling Rectified Flow Transformers", arXiv 2403.03206, section 3.1),
    `logit_normal` by default.

    Args:
        shift: of the sampler's times.
    """

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def times(
        self, generators: Sequence[torch.Generator], weighting: Weighting | None, shift: float
    ) -> tuple[Tensor, Tensor]:
        u = torch.cat([torch.rand(1, generator=g) for g in generators])
        return _sigma(weighting or "logit_normal", shift, u) * _TRAIN_STEPS, torch.ones(len(generators))

    def mix(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / _TRAIN_STEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * latent + sigma * noise

    def target(self, latent: Tensor, noised: Noised) -> Tensor:
        return noised.noise - latent

    def prediction(self, output: Tensor) -> Tensor:
        return output

    def scheduler(self, order: Literal[1, 2] = 1, shift: float | None = None) -> Any:
        """See :meth:`Objective.scheduler`; straight paths need no more than Euler's."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=self.shift if shift is None else shift)


class Diffusion(Objective):
    """DDPM on linear betas: the noise is predicted, and beside it a variance that samplers ignore.

    Times are uniform; two thirds of them are nearly pure noise, so that few steps train what a caption is about. By
    another weighting (ours) they are drawn at the same ratios of signal to noise as a :class:`Flow`'s, a few uniformly,
    and errors of the noise count as those of the flow's velocity would.
    """

    def times(
        self, generators: Sequence[torch.Generator], weighting: Weighting | None, shift: float
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Objective.times`; uniform ones are not shifted."""
        if weighting in (None, "uniform"):
            timestep = torch.cat([torch.randint(0, _TRAIN_STEPS, (1,), generator=g) for g in generators])
            return timestep, torch.ones(len(generators))
        chances, weights = _diffusion_times(weighting, shift)
        timestep = torch.cat([torch.multinomial(chances, 1, generator=g) for g in generators])
        return timestep, weights[timestep]

    def mix(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        alpha = _alphas_cumprod().to(latent.device)[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt() * latent + (1 - alpha).sqrt() * noise

    def target(self, latent: Tensor, noised: Noised) -> Tensor:
        return noised.noise

    def prediction(self, output: Tensor) -> Tensor:
        return output.chunk(2, dim=1)[0]

    def scheduler(self, order: Literal[1, 2] = 1, shift: float | None = None) -> Any:
        """See :meth:`Objective.scheduler`: DDIM, or DPM-Solver++."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        first, last = _BETAS
        if order == 2:
            return DPMSolverMultistepScheduler(beta_start=first, beta_end=last, beta_schedule="linear")
        return DDIMScheduler(beta_start=first, beta_end=last, clip_sample=False, set_alpha_to_one=False)


def _sigma(weighting: Weighting, shift: float, u: Tensor) -> Tensor:
    """What makes uniform numbers a flow's times, 0-1."""
    if weighting == "logit_normal":
        u = torch.special.ndtri(u).sigmoid()
    elif weighting == "mode":
        u = 1 - u - _MODE_SCALE * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    elif weighting != "uniform":
        raise ValueError(f"there is no weighting {weighting!r}")
    return shift * u / (1 + (shift - 1) * u)


@functools.cache
def _diffusion_times(weighting: Weighting, shift: float) -> tuple[Tensor, Tensor]:
    """How often each of a diffusion's times is drawn, and how much its squared error counts then; both `(1000,)`."""
    alpha = _alphas_cumprod().double()
    signal = alpha.sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())  # 1 - sigma, of the straight path through x / noise
    sigma = _sigma(weighting, shift, (torch.arange(_QUANTILES).double() + 0.5) / _QUANTILES)
    nearest = torch.searchsorted((1 - signal)[:-1], sigma)
    chance = torch.bincount(nearest, minlength=_TRAIN_STEPS) / _QUANTILES
    drawn = (1 - _UNIFORM) * chance + _UNIFORM / _TRAIN_STEPS
    return drawn, ((chance / signal.square() + _UNIFORM / _TRAIN_STEPS) / drawn).float()


@functools.cache
def _alphas_cumprod() -> Tensor:
    """How much of the signal's variance is left at a diffusion's times, `(1000,)`."""
    return torch.cumprod(1 - torch.linspace(*_BETAS, _TRAIN_STEPS), 0)
