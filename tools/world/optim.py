"""Muon for the blocks' matrices and AdamW for all else, with a state of plain tensors.

Muon orthogonalises the momentum of each matrix (Jordan et al., "Muon: an optimizer for hidden layers in neural
networks", 2024); the factor that makes its steps as large as AdamW's is that of "Muon is Scalable for LLM Training"
(arXiv 2502.16982). Small transformers need markedly fewer steps with it. torch.optim.Muon works in bfloat16, which most
CPUs emulate, and on one matrix at a time; this one is float32 and takes all matrices of a shape together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Optimiser"]

_MOMENTUM, _BETAS, _EPS = 0.95, (0.9, 0.98), 1e-8
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Optimiser:
    """Steps a model's parameters.

    Args:
        model: whose `transformer_blocks` hold the matrices for Muon; modulations are left to AdamW.
        decay: of the weights, times the rate.
        muon: False for AdamW alone.
        scale: root mean square of Muon's steps, in units of the rate; 0.2 is as large as AdamW's.
    """

    def __init__(self, model: nn.Module, decay: float = 0.01, muon: bool = True, scale: float = 0.4) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.matrices = {
            name: p
            for name, p in named.items()
            if muon and p.ndim == 2 and "transformer_blocks." in name and ".norm1" not in name and "table" not in name
        }
        self.others = {name: p for name, p in named.items() if name not in self.matrices}
        self.decay, self.scale, self.steps = decay, scale, 0
        self.state = {f"momentum.{name}": torch.zeros_like(p) for name, p in self.matrices.items()}
        for name, p in self.others.items():
            self.state |= {f"first.{name}": torch.zeros_like(p), f"second.{name}": torch.zeros_like(p)}
        self._shapes: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.matrices.items():
            self._shapes.setdefault(tuple(p.shape), []).append(name)

    @torch.no_grad()
    def step(self, rate: float, clip: float = 1.0) -> float:
        """One step; returns the gradients' norm, to which `clip` sets a limit."""
        self.steps += 1
        parameters: list[Any] = [*self.matrices.values(), *self.others.values()]
        norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        for shape, names in self._shapes.items():
            moments = [self.state[f"momentum.{name}"] for name in names]
            gradients: list[Any] = [self.matrices[name].grad for name in names]
            torch._foreach_lerp_(moments, gradients, 1 - _MOMENTUM)
            update = _orthogonal(torch.stack(torch._foreach_lerp(gradients, moments, _MOMENTUM)))
            factor = self.scale * max(shape) ** 0.5
            for name, one in zip(names, update, strict=True):
                self.matrices[name].mul_(1 - rate * self.decay).add_(one, alpha=-rate * factor)
        if self.others:
            values: list[Any] = list(self.others.values())
            grads: list[Any] = [p.grad for p in values]
            first = [self.state[f"first.{name}"] for name in self.others]
            second = [self.state[f"second.{name}"] for name in self.others]
            torch._foreach_lerp_(first, grads, 1 - _BETAS[0])
            torch._foreach_mul_(second, _BETAS[1])
            torch._foreach_addcmul_(second, grads, grads, 1 - _BETAS[1])
            correct = 1 - _BETAS[0] ** self.steps, 1 - _BETAS[1] ** self.steps
            root = torch._foreach_sqrt(second)
            torch._foreach_div_(root, correct[1] ** 0.5)
            torch._foreach_add_(root, _EPS)
            torch._foreach_addcdiv_(values, first, root, -rate / correct[0])
        return norm

    def zero_grad(self) -> None:
        for p in (*self.matrices.values(), *self.others.values()):
            p.grad = None

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from a saved `state` and number of `steps`."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.steps = steps


def _orthogonal(batch: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values of (N, a, b) come to 0.7-1.2."""
    a, b, c = _QUINTIC
    wide = batch if batch.shape[1] <= batch.shape[2] else batch.mT
    x = wide / (wide.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if batch.shape[1] <= batch.shape[2] else x.mT
