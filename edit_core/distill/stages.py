"""The stages of a training: the fields that a configuration gives each, and its loss.

Whoever runs them calls a stage's `losses` for every micro-batch, which adds up the gradients, and takes the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..backbones import Backbone
from ..hosts.diffusers import EDiTHandle
from ..objective import Noised, Weighting
from .losses import FeatureTap, weighted_mse
from .optimizer import Learner
from .transfer import transfer_step

__all__ = ["Count", "DistillStage", "Positive", "Stage", "Strict", "Student", "TransferStage"]

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Student:
    """A student in its teacher, as the losses call the two."""

    transformer: Any
    """The teacher, a diffusers transformer with the student applied."""
    handle: EDiTHandle
    """The student."""
    backbone: Backbone
    learner: Learner
    empty_prompt: dict[str, Tensor]
    """A sample's tensors of the empty prompt."""
    device: torch.device
    dtype: torch.dtype
    """What the transformer computes in."""

    def call(self, arguments: dict[str, Any], tap: Any, grad: bool) -> Tensor:
        """The transformer's output, with a tap in every replaced attention.

        With gradients it stays there for the backward pass, which calls the attentions once more where it checkpoints.
        """
        self.handle.tap = tap
        try:
            with torch.set_grad_enabled(grad):
                return self.transformer(**arguments)[0]
        finally:
            if not grad:
                self.handle.tap = None

    @contextmanager
    def training(self, checkpointing: bool) -> Iterator[None]:
        """Around a call with gradients and its backward pass."""
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.handle.tap = None
            self.transformer.disable_gradient_checkpointing()


class StageBase(Strict):
    resolution: Count = 512
    """Which of the cache's resolutions to train on; pixels per side of a square picture."""
    steps: Count
    """Optimiser steps."""
    batch_size: Count = 1
    """Pictures per step, over all processes and accumulated micro-batches."""
    accumulation: Count = 1
    """Micro-batches per step and process; more of them need less memory."""
    lr: Positive = 1e-4
    """Highest learning rate."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What the rate does after the warm-up; cosine falls to zero at the last step."""
    clip: Positive = 1.0
    """Longest gradient."""
    caption_dropout: Share = 0.1
    """How often a caption is replaced by the empty one, so that guidance keeps working."""
    weighting: Weighting | None = None
    """How times are drawn: as the model was trained (uniform for PixArt-Σ, logit_normal for SD3.5), or by one of SD3's
    schemes; PixArt-Σ's are then those of the same ratio of signal to noise."""
    shift: Positive = 1.0
    """How far times are shifted towards noise, but for PixArt-Σ's uniform ones; SD3 takes 3 at 1024 pixels."""

    @model_validator(mode="after")
    def _divides(self) -> StageBase:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")
        return self

    def rate(self, step: int) -> float:
        """Share of the highest learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    def _noised(
        self, student: Student, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Noised, dict[str, Tensor]]:
        """A micro-batch's latents, these with noise, and its conditions, some captions replaced by the empty one."""
        latent = batch["latent"].to(student.device, student.dtype)  # (B, c, h, w)
        condition = {name: value for name, value in batch.items() if name != "latent"}
        drop = [float(torch.rand(1, generator=g)) < self.caption_dropout for g in generators]
        if any(drop):
            empty = student.empty_prompt
            condition = {
                name: torch.stack([empty[name] if d else value for d, value in zip(drop, values, strict=True)])
                for name, values in condition.items()
            }
        noised = student.backbone.objective.noise_batch(latent, generators, self.weighting, self.shift)
        return latent, noised, condition


class TransferStage(StageBase):
    """Every replaced attention regresses the teacher's output on the teacher's own inputs, in one teacher pass."""

    kind: Literal["transfer"]
    lr: Positive = 1e-3

    def losses(
        self, student: Student, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Adds up a micro-batch's gradients; returns its mean relative error as `loss`, detached.

        Args:
            student: what is trained.
            batch: as :meth:`CachedLatents.collate` gives it, with `latent (B, c, h, w)`.
            generators: one per sample, on the CPU.
        """
        _, noised, condition = self._noised(student, batch, generators)
        arguments = student.backbone.call_arguments(noised.latent, noised.timestep, condition, student.device)
        loss = transfer_step(student.learner, lambda tap: student.call(arguments, tap, grad=False), self.accumulation)
        return {"loss": loss}


class DistillStage(StageBase):
    """The student as a whole: its task, its teacher's prediction, and its teacher's attention outputs."""

    kind: Literal["distill"]
    task: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the task loss: noise prediction (PixArt-Σ) or rectified flow (SD3.5)."""
    prediction: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the teacher's prediction."""
    feature: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the distance to the teacher's attention outputs, relative to their size, mean over attentions."""
    guidance: tuple[Positive, Positive] | None = None
    """Lowest and highest guidance scale. The predictions that are compared are then guided ones, as sampling uses them;
    every picture goes through the model twice, with its caption and with the empty one."""
    gradient_checkpointing: bool = True
    """Computes activations again in the backward pass: slower, far less memory."""

    @model_validator(mode="after")
    def _ordered(self) -> DistillStage:
        if self.guidance and self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance goes from the lowest to the highest scale, not {list(self.guidance)}")
        return self

    def losses(
        self, student: Student, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Adds up a micro-batch's gradients; returns `loss` and its three parts, detached.

        Args:
            student: what is trained.
            batch: as :meth:`CachedLatents.collate` gives it, with `latent (B, c, h, w)`.
            generators: one per sample, on the CPU.
        """
        backbone, device = student.backbone, student.device
        objective = backbone.objective
        latent, noised, condition = self._noised(student, batch, generators)
        seen, time, scale = noised.latent, noised.timestep, None
        if self.guidance:
            low, high = self.guidance
            draws = torch.cat([torch.rand(1, generator=g) for g in generators])
            scale = (low + (high - low) * draws).to(device).view(-1, 1, 1, 1)
            condition = {k: torch.cat([v, student.empty_prompt[k].expand_as(v)]) for k, v in condition.items()}
            seen, time = torch.cat([seen, seen]), torch.cat([time, time])  # (2B, c, h, w), (2B,)
        arguments = backbone.call_arguments(seen, time, condition, device)
        features = FeatureTap()
        wanted = objective.prediction(student.call(arguments, features.teacher, grad=False)).float()
        with student.training(self.gradient_checkpointing):
            found = objective.prediction(student.call(arguments, features.student, grad=True)).float()
            target = objective.target(latent, noised).float()
            losses = {
                "task": weighted_mse(found[: len(latent)], target, noised.weight),
                "prediction": weighted_mse(found, wanted, noised.weight, scale),
                "feature": features.total(),
            }
            loss = self.task * losses["task"] + self.prediction * losses["prediction"]
            loss = loss + self.feature * losses["feature"]
            student.learner.backward(loss * (1 / self.accumulation))
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}


Stage = Annotated[TransferStage | DistillStage, Field(discriminator="kind")]
