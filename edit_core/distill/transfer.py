"""Training attentions while their teacher runs: the loop that every host's calibration shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import EDiTError
from ..weights import EDiTWeights
from .losses import TransferTap
from .optimizer import make_optimizer

__all__ = ["frozen", "trained_weights", "transfer"]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """For as long as this lasts a teacher's parameters gather no gradients: its layers are called in every loss."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            with torch.inference_mode(parameter.is_inference()):  # the only mode that allows it
                parameter.requires_grad_(True)


def transfer(
    parameters: Mapping[str, nn.Parameter],
    teach: Callable[[TransferTap], None],
    *,
    steps: int,
    lr: float,
    device: torch.device,
    scaled: bool,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains attentions on what their teacher sees.

    Args:
        parameters: what to train, by the names of a weights file, side weights first; float32.
        teach: makes the teacher's next call, or its next few, with the given tap in every attention to be replaced.
        steps: of the training; each asks `teach` once.
        lr: highest learning rate; it falls to zero along a cosine.
        device: of the parameters.
        scaled: whether gradients are scaled, as float16 needs it.
        on_step: is told each step and its mean relative error; may raise to stop.

    Returns:
        each step's mean relative error.

    Raises:
        EDiTError: an error that is not finite, or the teacher came by no attention.
    """
    optimizer = make_optimizer(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    found: list[Tensor] = []
    losses: list[float] = []

    def backward(loss: Tensor) -> None:
        found.append(loss.detach())
        scaler.scale(loss).backward()

    tap = TransferTap(backward)
    for step in range(steps):
        found.clear()
        optimizer.zero_grad(set_to_none=True)
        teach(tap)
        if not found:
            raise EDiTError("the teacher ran without any of the attentions that are to be trained")
        losses.append(float(torch.stack(found).mean()))
        if not math.isfinite(losses[-1]):
            raise EDiTError(f"the error is not finite at step {step}; try a lower lr")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        on_step(step, losses[-1])
    return losses


def trained_weights(
    weights: EDiTWeights, parameters: Mapping[str, nn.Parameter], recipe: dict[str, Any], steps: int, data: str
) -> EDiTWeights:
    """Weights with these values in place of their own, on the CPU, and a note of how they came about.

    Args:
        weights: where the training began; not changed. What `parameters` lacks stays as it is there.
        parameters: by the names of a weights file.
        recipe: of the training.
        steps: of the training.
        data: what it was trained on.
    """
    tensors = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    training = {"recipe": {"calibrate": recipe}, "steps": steps, "tool_version": __version__, "data": data}
    return replace(weights, tensors={**weights.tensors, **tensors}, training=training)
