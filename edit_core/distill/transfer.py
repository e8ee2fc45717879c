"""Training attentions while their teacher runs: the step that transfer stages take, and every host's calibration."""

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
from .optimizer import Learner, make_optimizer

__all__ = ["frozen", "trained_weights", "transfer", "transfer_step"]


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


def transfer_step(learner: Learner, teach: Callable[[TransferTap], object], parts: int = 1) -> Tensor:
    """Adds the gradients of every attention's error, on what its teacher sees, to those of this step.

    Args:
        learner: of the attentions.
        teach: makes a call of the teacher, or a few, with the given tap in every attention to be replaced.
        parts: how many of these make up a step; each counts that share.

    Returns:
        the mean relative error, detached.

    Raises:
        EDiTError: the teacher came by no attention.
    """
    found: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        found.append(loss.detach())
        learner.backward(loss * (1 / parts))

    teach(TransferTap(backward))
    if not found:
        raise EDiTError("the teacher ran without any of the attentions that are to be trained")
    return torch.stack(found).mean()


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
    learner = Learner(parameters, make_optimizer(parameters, lr), device, scaled)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner.optimizer, steps)
    losses: list[float] = []
    for step in range(steps):
        learner.begin()
        loss = transfer_step(learner, teach)
        losses.append(float(loss))
        _, taken = learner.finish(loss, clip=1.0)
        if not (taken or (scaled and math.isfinite(losses[-1]))):  # scaling finds its scale by gradients too large
            raise EDiTError(f"the error is not finite at step {step}; try a lower lr")
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
