"""How far a student is from its teacher, on noised latents: what evaluations, plans and tests all go by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..hosts.diffusers import EDiTHandle
from ..objective import Weighting
from .losses import TransferTap, relative_error

__all__ = ["Distance", "teacher_distance"]


@dataclass(frozen=True)
class Distance:
    """Squared errors relative to the teacher's mean square, means over pictures and times."""

    attentions: dict[str, float]
    """By `<block>.<site>`, each attention on the teacher's own inputs."""
    prediction: float
    """Of the student as a whole."""

    @property
    def mean_attention(self) -> float:
        return sum(self.attentions.values()) / len(self.attentions)


@torch.no_grad()
def teacher_distance(
    transformer: Any,
    handle: EDiTHandle,
    backbone: Backbone,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    weighting: Weighting | None = None,
    shift: float = 1.0,
) -> Distance:
    """Measures an applied student against the teacher that it stands in.

    Args:
        transformer: what `handle` was applied to, a diffusers transformer.
        handle: the student; its tap is put back afterwards.
        backbone: what it is of.
        batches: as :meth:`CachedLatents.collate` gives them, with `latent (B, c, h, w)`.
        seed: seeds noise and times: equal seeds compare students fairly.
        weighting: of the times, as :meth:`~edit_core.objective.Objective.noise_batch` draws them.
        shift: of the times.
    """
    objective = backbone.objective
    device, dtype, before = transformer.device, transformer.dtype, handle.tap
    attentions: dict[str, list[Tensor]] = {}
    predictions: list[Tensor] = []
    pictures = 0
    try:
        for batch in batches:
            latent = batch["latent"].to(device, dtype)  # (B, c, h, w)
            generators = [torch.Generator().manual_seed(seed + pictures + i) for i in range(len(latent))]
            noised = objective.noise_batch(latent, generators, weighting, shift)
            condition = {name: value for name, value in batch.items() if name != "latent"}
            arguments = backbone.call_arguments(noised.latent, noised.timestep, condition, device)
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                tap = TransferTap(None)
                handle.tap = tap
                teacher = objective.prediction(transformer(**arguments)[0])
                handle.tap = None
                student = objective.prediction(transformer(**arguments)[0])
            for key, loss in tap.losses.items():
                attentions.setdefault(key, []).append(loss * len(latent))
            predictions.append(relative_error(student, teacher) * len(latent))
            pictures += len(latent)
    finally:
        handle.tap = before
    means = {key: float(torch.stack(found).sum()) / pictures for key, found in attentions.items()}
    return Distance(means, float(torch.stack(predictions).sum()) / pictures)
