"""Optimisers of a training, and the step that every training takes with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import EDiTError
from ..weights.differences import PREFIX

__all__ = ["BASE_LR", "Learner", "OptimizerKind", "make_optimizer"]

OptimizerKind = Literal["adamw", "adamw8bit", "prodigy"]
BASE_LR = 0.1
"""Learning rate of differences on the base's linears, relative to the side weights' (ours)."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    base_lr: float = BASE_LR,
    kind: OptimizerKind = "adamw",
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimiser with a group for the side weights and, where there are any, one for the differences on the base.

    Args:
        parameters: by the names of a weights file, side weights first.
        lr: highest learning rate.
        base_lr: of the differences, relative to `lr`; each group notes its share under `share`.
        kind: adamw8bit needs bitsandbytes, prodigy prodigyopt.
        weight_decay: as in AdamW.

    Raises:
        EDiTError: a package is missing.
    """
    try:
        if kind == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as Optimizer
        elif kind == "prodigy":
            from prodigyopt import Prodigy as Optimizer
        else:
            from torch.optim import AdamW as Optimizer
    except ImportError:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[kind]
        raise EDiTError(f"optimizer: {kind} needs {package}; install it, or choose adamw") from None
    groups: list[dict[str, Any]] = []
    for share, of_base in ((1.0, False), (base_lr, True)):
        chosen = [p for name, p in parameters.items() if name.startswith(PREFIX) is of_base]
        if chosen:
            groups.append({"params": chosen, "lr": lr * share, "share": share})
    fast = {"fused": True} if kind == "adamw" else {}  # one pass over the weights instead of ten
    return Optimizer(groups, weight_decay=weight_decay, **fast)


class Learner:
    """What is trained, its optimiser, and float16's loss scaling: `begin`, `backward` once or more, `finish`.

    Args:
        parameters: by the names of a weights file.
        optimizer: of them; a training may replace it between two steps.
        device: of the parameters.
        scaled: whether gradients are scaled, as float16 needs it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaled: bool,
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def begin(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to those of this step."""
        self.scaler.scale(loss).backward()

    def finish(self, loss: Tensor, clip: float) -> tuple[Tensor, bool]:
        """Takes the optimiser's step unless something is not finite.

        Args:
            loss: the whole step's.
            clip: longest gradient.

        Returns:
            the gradient's length, and whether the step was taken.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip).detach()
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm, finite
