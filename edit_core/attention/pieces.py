"""Piecewise attention as a form: softmax that is exact where it matters and pooled elsewhere, trained or not.

The idea is PISA's ("Piecewise Sparse Attention", arXiv 2602.01077); what is chosen, and how, is ours. The function is
in :mod:`.piecewise`, how a grid is cut in :mod:`.plans`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import EDiTConfigError
from .call import Image, Projections, Sides
from .form import StudentForm
from .keys import PlainKey
from .piecewise import piecewise_attention
from .plans import plan_of

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["Piecewise"]


class Piecewise(StudentForm):
    """Needs no weights: with plain queries and keys it is the base's own attention, but for what is pooled.

    Prompt keys are exact, and prompt rows the base's softmax over all keys.
    """

    name = "piecewise"
    reads = StudentForm.reads | {"quality", "cell"}
    as_is = True
    keeps_masks = True

    @classmethod
    def check(cls, config: EDiTConfig) -> None:
        if config.key != PlainKey.name:
            raise EDiTConfigError(f"kernel=piecewise needs key=plain, not {config.key}: it pools the keys itself")

    def _rows(self, sides: Sides, image: Image, made: Projections, prompt: Projections | None) -> Tensor:
        more = None if prompt is None else (prompt.k, prompt.v)
        plan = plan_of(image.grid, self.config)
        y = piecewise_attention(*made, image.heads, image.grid, plan, more, image.mask)  # (B, N, C)
        local = self.local(sides, image)
        return y if local is None else local.add_(y)  # (B, N, C)

    def self_rows(self, sides: Sides, image: Image) -> Tensor:
        return self._rows(sides, image, self.features(sides, image), None)

    def joint_rows(
        self, sides: Sides, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        made = self.features(sides, image)  # (B, N, C)
        y_prompt = None
        if prompt_rows:
            keys, values = torch.cat([made.k, prompt.k], 1), torch.cat([made.v, prompt.v], 1)  # (B, N+P, C)
            y_prompt = image.softmax(prompt.q, keys, values, image.heads)  # (B, P, C)
        return self._rows(sides, image, made, prompt), y_prompt
