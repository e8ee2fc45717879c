"""The losses of a distillation, as taps on the replaced attentions and as functions of two predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FeatureTap", "TransferTap", "dense_tap", "relative_error", "weighted_mse"]


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of each sample's squared error relative to its teacher's mean square; float32.

    So all attentions and samples weigh alike, and a batch's loss is the mean of its parts' however it is split among
    processes and micro-batches.
    """
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)  # (B, ...)
    scale = teacher.square().mean(1).clamp(min=1e-12)  # (B,)
    return ((student - teacher).square().mean(1) / scale).mean()


def weighted_mse(student: Tensor, target: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean squared error of predictions, or of guided ones, `u + s·(c - u)`.

    Guided errors are divided by the size that independent errors would give them, `s² + (1-s)²`, which keeps the loss
    the size of a plain one's whatever the scale (ours).

    Args:
        student: `(B, c, h, w)`; for guided ones `(2B, c, h, w)`, with captions first, then with the empty prompt.
        target: likewise.
        weight: of each sample, `(B,)`.
        scale: guidance scales, `(B, 1, 1, 1)`.
    """
    error = student - target
    if scale is not None:
        caption, empty = error.chunk(2)  # (B, c, h, w)
        error = (scale * caption + (1 - scale) * empty) / (scale**2 + (1 - scale) ** 2).sqrt()  # (B, c, h, w)
    return (error.square().mean((1, 2, 3)) * weight).mean()


def _rows(output: Any) -> tuple[Tensor | None, ...]:
    """An attention's outputs: image rows, and of a joint one prompt rows (None in a last block, which drops them)."""
    return output if isinstance(output, tuple) else (output,)


def _loss(student: Any, teacher: Any) -> Tensor:
    """Mean over the kinds of rows of :func:`relative_error`."""
    pairs = zip(_rows(student), _rows(teacher), strict=True)
    return torch.stack([relative_error(s, t) for s, t in pairs if s is not None and t is not None]).mean()


def dense_tap(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
    """The teacher: every attention as it was."""
    return dense()


class TransferTap:
    """Trains every attention on the teacher's own inputs while the teacher runs (the first stage of Grafting,
    arXiv 2506.05340, "activation distillation", in one pass and without a backward through the base).

    The teacher's pass goes on with the teacher's output; each attention's graph is freed before the next begins, so
    the memory is that of one attention.

    Args:
        backward: called with each attention's loss; None only measures.
    """

    def __init__(self, backward: Callable[[Tensor], None] | None) -> None:
        self.backward = backward
        self.losses: dict[str, Tensor] = {}
        """By `<block>.<site>`, detached: reading them out waits for the device."""

    def __call__(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        teacher = dense()
        with torch.set_grad_enabled(self.backward is not None):
            loss = _loss(edit(), teacher)
            if self.backward is not None:
                self.backward(loss)
        self.losses[key] = loss.detach()
        return teacher


class FeatureTap:
    """Compares the student's attention outputs, on its own inputs, with the teacher's.

    Used twice per step: :meth:`teacher` records, :meth:`student` compares; then :meth:`total` closes it.
    """

    def __init__(self) -> None:
        self._teacher: dict[str, Any] = {}
        self._losses: list[Tensor] = []
        self._open = True

    def teacher(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        self._teacher[key] = dense()
        return self._teacher[key]

    def student(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        output = edit()
        loss = _loss(output, self._teacher[key])
        # Gradient checkpointing comes here again in the backward pass; keeping that loss would keep its graph.
        if self._open:
            self._losses.append(loss)
        return output

    def total(self) -> Tensor:
        """Mean over the attentions."""
        self._open = False
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean
