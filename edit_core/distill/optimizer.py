"""Optimisers of a training, and how their learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import EDiTError
from ..weights.differences import PREFIX
from .config import BASE_LR, OptimizerKind, Stage

__all__ = ["make_optimizer", "rate"]


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


def rate(stage: Stage, step: int) -> float:
    """Share of the highest learning rate at a step."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - stage.warmup) / max(1, stage.steps - stage.warmup)))
