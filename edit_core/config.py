"""The choices that decide what a student computes; stored as JSON in every weights file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import EDiTConfigError

__all__ = ["EDiTConfig"]

Normaliser = Literal["token_ratio", "exact"]
SoftmaxFeatures = Literal["pre", "post"]


@dataclass(frozen=True)
class EDiTConfig:
    """Hyper-parameters of EDiT and MM-EDiT (arXiv 2503.16726).

    Raises:
        EDiTConfigError: a field is out of range; the message names it.
    """

    compression: int = 4
    """`r`: ConvFusion's 3x3 convolution maps `C -> C/r` channels. The paper leaves it open; 4 as in LinFusion."""
    kv_stride: int = 2
    """Stride of the SpatialCompressor: keys and values live on a grid this many times coarser per side."""
    normaliser: Normaliser = "token_ratio"
    """MM-EDiT's share of the linear branch: `token_ratio` N_I/(N_I+N_P), or the `exact` normalisers' share."""
    softmax_features: SoftmaxFeatures = "pre"
    """Which image features MM-EDiT's softmax branches see: before (`pre`) or after (`post`) the ReLU."""
    groups: int = 32
    """Upper bound for ConvFusion's GroupNorm groups; the greatest common divisor with `C/r` is used."""
    eps: float = 1e-6
    """Added to the linear normaliser, which is zero where a query's features are all rectified away."""

    def __post_init__(self) -> None:
        for name, low, high in (("compression", 1, 64), ("kv_stride", 1, 4), ("groups", 1, 1024)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise EDiTConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        for name, choices in (("normaliser", get_args(Normaliser)), ("softmax_features", get_args(SoftmaxFeatures))):
            value = getattr(self, name)
            if value not in choices:
                raise EDiTConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if type(self.eps) not in (int, float) or not math.isfinite(self.eps) or not 0 < self.eps < 1:
            raise EDiTConfigError(f"eps must be a number between 0 and 1, not {self.eps!r}")

    def hidden(self, dim: int) -> int:
        """Channels of ConvFusion's bottleneck for a model of width `dim`.

        Raises:
            EDiTConfigError: `compression` does not divide `dim`.
        """
        if dim % self.compression:
            raise EDiTConfigError(f"compression={self.compression} does not divide the model's {dim} channels")
        return dim // self.compression

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EDiTConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            EDiTConfigError: not a JSON object, or a field that this version does not know.
        """
        try:
            fields: Any = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise EDiTConfigError(f"config is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise EDiTConfigError(f"config must be a JSON object, not {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise EDiTConfigError(f"config has fields unknown to this version: {', '.join(unknown)}")
        return cls(**fields)
