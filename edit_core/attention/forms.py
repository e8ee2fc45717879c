"""The forms of attention: one class per name of the config's `kernel`, which decides what a student has and computes.

Linear attention between features, EDiT's (arXiv 2503.16726), SANA's (arXiv 2410.10629) and LinFusion's (arXiv
2409.02097); PixArt-Σ's softmax over compressed keys and values (arXiv 2403.04692); and the piecewise softmax of
:mod:`.pieces`.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..errors import EDiTConfigError
from .call import Image, Projections, Rows, Sides, Softmax
from .form import Form, StudentForm
from .joint import JOINTS, LinearCall
from .keys import CompressorKey
from .linear import merge_heads, read, split_heads
from .pieces import Piecewise
from .slices import written
from .variant import named

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = [
    "KERNELS",
    "CompressedSoftmax",
    "LinearForm",
    "OnePlusELU",
    "ReLU",
    "SquaredReLU",
    "one_plus_elu",
    "squared_relu",
]


class LinearForm(StudentForm):
    """Linear (compressed) attention between non-negative features."""

    reads = StudentForm.reads | {"joint", "eps"}
    has_kernels: ClassVar[bool] = True
    """Whether Triton kernels know these features."""

    def __init__(self, config: EDiTConfig) -> None:
        super().__init__(config)
        self.joint = JOINTS[config.joint](config)

    @staticmethod
    @abstractmethod
    def rectified(tokens: Tensor) -> Tensor:
        """Non-negative features of queries or keys, of any shape."""

    def _linear(self, sides: Sides, image: Image) -> LinearCall:
        keys, v = self.key.rows(sides, image)
        queries = partial(self.query.rows, sides, image)
        return LinearCall(self.rectified, queries, keys, v, image.heads, self.config.eps)

    def self_rows(self, sides: Sides, image: Image) -> Tensor:
        if self.has_kernels and kernels.chosen("linear", *image.base):
            from .fused import self_rows

            return self_rows(sides, self.config, image, self.features(sides, image))
        linear = self._linear(sides, image)
        of_keys, dtype = linear.state(), linear.v.dtype  # (B, h, d, d+1)
        del linear  # what a compressor made has served
        queries = self.query.rows(sides, image)

        def rows(part: slice) -> Tensor:
            q = split_heads(self.rectified(queries(part)), image.heads)  # (B, h, n, d)
            return merge_heads(read(q, of_keys, self.config.eps, dtype)[0])  # (B, n, C)

        return written(rows, self.local(sides, image), image.base.v)  # (B, N, C)

    def joint_rows(
        self, sides: Sides, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.has_kernels and self.joint.has_kernels and kernels.chosen("linear", *image.base):
            return self.joint.by_kernels(sides, self.rectified, image, self.features(sides, image), prompt, prompt_rows)
        rows, y_prompt = self._joint_parts(sides, image, prompt, prompt_rows)
        return written(rows, self.local(sides, image), image.base.v), y_prompt  # (B, N, C), (B, P, C)

    def _joint_parts(
        self, sides: Sides, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Rows, Tensor | None]:
        # By itself, so that what a compressor made goes when it has served.
        return self.joint.rows(self._linear(sides, image), image, prompt, prompt_rows)


class ReLU(LinearForm):
    """EDiT's and SANA's."""

    name = "relu"

    @staticmethod
    def rectified(tokens: Tensor) -> Tensor:
        return F.relu(tokens)


class SquaredReLU(LinearForm):
    """Sharper (ours)."""

    name = "squared_relu"

    @classmethod
    def check(cls, config: EDiTConfig) -> None:
        if config.softmax_features == "post":
            raise EDiTConfigError(
                "softmax_features=post goes with kernel=relu or elu: squares are no softmax's queries"
            )

    @staticmethod
    def rectified(tokens: Tensor) -> Tensor:
        return squared_relu(tokens)


class OnePlusELU(LinearForm):
    """LinFusion's."""

    name = "elu"

    @staticmethod
    def rectified(tokens: Tensor) -> Tensor:
        return one_plus_elu(tokens)


class CompressedSoftmax(StudentForm):
    """PixArt-Σ's KV compression: softmax, quadratic still, over compressed keys and values.

    For two kinds of tokens `SDPA([Q_I; Q_P], [K_I; K_P], [V_I; V_P])`, the image's keys and values compressed.
    """

    name = "softmax"

    @classmethod
    def check(cls, config: EDiTConfig) -> None:
        if config.key != CompressorKey.name:
            raise EDiTConfigError(
                f"kernel=softmax needs key=compressor, not {config.key}: over all keys it costs what the teacher's does"
            )

    def self_rows(self, sides: Sides, image: Image) -> Tensor:
        q, k, v = self.features(sides, image)  # (B, N or M, C)
        return self._with_local(image.softmax(q, k, v, image.heads), sides, image)  # (B, N, C)

    def joint_rows(
        self, sides: Sides, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        features = self.features(sides, image)  # (B, N or M, C)
        y_image, y_prompt = _softmax_rows(features, prompt, image.heads, image.softmax, prompt_rows)
        return self._with_local(y_image, sides, image), y_prompt  # (B, N, C), (B, P, C)

    def _with_local(self, y: Tensor, sides: Sides, image: Image) -> Tensor:
        local = self.local(sides, image)
        return y if local is None else local.add_(y)  # (B, N, C)


def _softmax_rows(
    image: Projections, prompt: Projections, heads: int, softmax: Softmax, prompt_rows: bool
) -> tuple[Tensor, Tensor | None]:
    keys, values = torch.cat([image.k, prompt.k], 1), torch.cat([image.v, prompt.v], 1)  # (B, M+P, C)
    # Two calls: the teacher's one would copy the image's queries to put the prompt's behind them.
    y_image = softmax(image.q, keys, values, heads)  # (B, N, C)
    return y_image, softmax(prompt.q, keys, values, heads) if prompt_rows else None  # (B, N, C), (B, P, C)


def one_plus_elu(tokens: Tensor) -> Tensor:
    """`1 + ELU(x)`: `exp(x)` below zero, `1 + x` above; LinFusion's features.

    Written so that half precision keeps what is small: `ELU(x) + 1` would round it against 1. Float32 for float16,
    which would lose what is under 6e-8, and with it rows that have nothing larger.
    """
    tokens = tokens.to(torch.float32 if tokens.dtype == torch.float16 else tokens.dtype)
    return (tokens.clamp(max=0).exp() + F.relu(tokens)).to(tokens.dtype)


def squared_relu(tokens: Tensor) -> Tensor:
    """`ReLU(x)²`, float32 for float16, which would overflow."""
    return F.relu(tokens).to(torch.float32 if tokens.dtype == torch.float16 else tokens.dtype).square()


KERNELS: dict[str, type[Form]] = named(ReLU, SquaredReLU, OnePlusELU, CompressedSoftmax, Piecewise)
"""By the config's name."""
