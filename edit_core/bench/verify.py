"""Holds every student of a bench against the specification, so that no fast path can win by being wrong."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import HybridAttention, naive
from ..backbones import Backbone
from ..config import PRESETS
from ..errors import EDiTResultError
from ..runtime import TOLERANCES
from .contenders import contender, install, processors
from .subjects import Subject, layer

__all__ = ["verify"]

_GRID, _BATCH, _PROMPT = (9, 12), 2, 20  # an odd side, and small enough for quadratic formulas in float64


@torch.inference_mode()
def verify(backbone: Backbone, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative errors of students' layers at the backbone's width, against :mod:`edit_core.attention.naive`.

    Args:
        backbone: whose width.
        names: contenders; those that are no student of EDiT's are passed over.
        dtype: what the students compute in.
        device: where.

    Returns:
        by name, the largest error of a layer's outputs.

    Raises:
        EDiTResultError: an error is larger than rounding explains.
        EDiTConfigError: what a student's name says of its config is wrong.
    """
    subject = layer(backbone, _GRID, _BATCH, dtype, device, _PROMPT)
    own, found = [attention.processor for attention in subject.attentions], {}
    for name in dict.fromkeys(names):
        if name.partition(":")[0] not in PRESETS:
            continue
        one = contender(name, device, dtype, subject.heads, subject.head_dim)
        students = processors(subject, one)
        install(subject.attentions, students)
        outputs = subject.call()
        install(subject.attentions, own)
        wanted = _reference(subject, students)
        found[name] = max(_error(y, z) for y, z in zip(outputs, wanted, strict=True))
        if not found[name] <= TOLERANCES[dtype]:
            raise EDiTResultError(
                f"{name} on {backbone.name} is off its specification by {found[name]:.2g}, more than the "
                f"{TOLERANCES[dtype]:.2g} that {str(dtype).removeprefix('torch.')} explains: its times mean nothing"
            )
    return found


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def _reference(subject: Subject, students: Sequence[Any]) -> list[Tensor]:
    """The outputs of a layer's call by the formulas, in float64, of projections and norms as the base rounds them.

    These are no student's, and by other ones piecewise attention would choose other tokens.
    """
    rows: list[Tensor] = []
    x = subject.inputs["x"].double()  # (B, N, C)
    for own, student in zip(subject.attentions, students, strict=True):
        out, side = copy.deepcopy(own).double(), student.func.site.side
        state = {name: tensor.double() for name, tensor in side.state_dict().items()}
        norms = [None if norm is None else partial(_rounded, norm) for norm in (own.norm_q, own.norm_k)]
        base = (_rounded(own.to_q, x), _rounded(own.to_k, x), _rounded(own.to_v, x))  # (B, N, C)
        rest = (state, subject.grid, own.heads, side.config, *norms)
        if isinstance(side, HybridAttention):
            text = subject.inputs["prompt"].double()  # (B, P, C)
            q_p = _normed(_rounded(own.add_q_proj, text), own.heads, own.norm_added_q)
            k_p = _normed(_rounded(own.add_k_proj, text), own.heads, own.norm_added_k)
            y, y_prompt = naive.hybrid_attention(x, base, (q_p, k_p, _rounded(own.add_v_proj, text)), *rest)
            rows += [out.to_out[0](y), out.to_add_out(y_prompt)]
        else:
            rows.append(out.to_out[0](naive.edit_attention(x, base, *rest)))
    return rows


def _normed(tokens: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    return tokens if norm is None else _rounded(norm, tokens.unflatten(-1, (heads, -1))).flatten(2)


def _rounded(module: Any, tokens: Tensor) -> Tensor:
    """What a base's linear or norm gives with its own rounding, in float64."""
    rounded: Tensor = module(tokens.to(module.weight.dtype))
    return rounded.double()
