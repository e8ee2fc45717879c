"""The choices that decide what a student computes; stored as JSON in every weights file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .attention import VARIANTS
from .attention.forms import KERNELS
from .attention.modules import Parts
from .errors import EDiTConfigError, shown

__all__ = ["CHOICES", "DEFAULT", "PRESETS", "WITHOUT_WEIGHTS", "EDiTConfig"]

Normaliser = Literal["token_ratio", "exact"]
SoftmaxFeatures = Literal["pre", "post"]
Kernel = Literal["relu", "squared_relu", "elu", "softmax", "piecewise"]
Query = Literal["conv_fusion", "separable", "mlp", "plain"]
Key = Literal["compressor", "conv_fusion", "mlp", "plain"]
Joint = Literal["hybrid", "linear"]
Quality = Literal["fast", "balanced", "faithful"]

CHOICES: dict[str, tuple[str, ...]] = {field: tuple(variants) for field, variants in VARIANTS.items()}
"""Of each field of :class:`EDiTConfig` that is one of several names, these names."""


def _check_classes() -> None:
    """A name without a class would be computed as another."""
    for field, named in get_type_hints(EDiTConfig).items():
        if get_origin(named) is Literal and get_args(named) != CHOICES.get(field):
            raise TypeError(f"{field} may be one of {get_args(named)}, and there are classes for {CHOICES.get(field)}")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sana": {"query": "plain", "key": "plain", "joint": "linear"},
    "linfusion": {"kernel": "elu", "query": "mlp", "key": "mlp"},
    "kv_compression": {"kernel": "softmax", "query": "plain"},
    "local": {"kernel": "squared_relu", "query": "separable", "key": "plain", "local": True},
    "piecewise": {"kernel": "piecewise", "query": "plain", "key": "plain"},
}
"""By name, what differs from the fields' defaults; see :meth:`EDiTConfig.preset`."""

WITHOUT_WEIGHTS = "piecewise"
"""The preset that needs no weights, and no training."""

DEFAULT = "local"
"""The preset of new students: what docs/world.md found nearest to its teachers, at less than the paper's cost.

The fields' defaults are the paper's: what a file means that leaves them out."""

_LEAST_EPS = 1e-30  # its reciprocal has to fit into float32 and bfloat16: a row without a feature is 0 · 1/eps


@dataclass(frozen=True)
class EDiTConfig:
    """The choices of EDiT and MM-EDiT (arXiv 2503.16726), and of the attentions that the paper compares them with.

    Raises:
        EDiTConfigError: a field is out of range, or differs from its default where nothing reads it; the message
            names it.
    """

    compression: int = 4
    """`r`: the bottleneck of ConvFusion, and of LinFusion's MLP, has `C/r` channels. The paper leaves it open; 4 as in
    LinFusion."""
    kv_stride: int = 2
    """Stride of the SpatialCompressor: keys and values live on a grid this many times coarser per side."""
    normaliser: Normaliser = "token_ratio"
    """MM-EDiT's share of the linear branch: `token_ratio` N_I/(N_I+N_P), or the `exact` normalisers' share."""
    softmax_features: SoftmaxFeatures = "pre"
    """Which image features MM-EDiT's softmax branches see: before (`pre`) or after (`post`) the kernel."""
    groups: int = 32
    """Upper bound for ConvFusion's GroupNorm groups; the greatest common divisor with `C/r` is used."""
    eps: float = 1e-6
    """Added to the linear normaliser, which is zero where a query's features are all rectified away."""
    kernel: Kernel = "relu"
    """What makes linear attention's features of queries and keys: `relu`, `squared_relu` (sharper, ours) or `elu`
    (1 + ELU, LinFusion's). `softmax` stays quadratic, over compressed keys and values; `piecewise` is a softmax that is
    exact where it matters and pooled elsewhere, at linear cost (after PISA, arXiv 2602.01077)."""
    query: Query = "conv_fusion"
    """What is added to the base's queries: `conv_fusion`; `separable`, which is ConvFusion with a linear and a
    depthwise 3x3 convolution for its dense one, a ninth of the cost (ours); LinFusion's `mlp`; or nothing (`plain`)."""
    key: Key = "compressor"
    """What becomes of the base's keys and values: both go through a `compressor`; or the keys gain a `conv_fusion` or
    LinFusion's `mlp`, or nothing (`plain`), and the values stay as they are."""
    joint: Joint = "hybrid"
    """A joint attention is linear between image tokens alone (`hybrid`, MM-EDiT's), or between all (`linear`)."""
    local: bool = False
    """Whether each image token also gets the values around it, by a depthwise 3x3 convolution (ours): what linear
    attention blurs most is what lies nearest."""
    quality: Quality = "balanced"
    """Of `piecewise`: how much of a picture each query attends to in full."""
    cell: int = 0
    """Of `piecewise`: side of the squares of tokens that are pooled, a multiple of 4; 0 chooses one for the grid."""

    def __post_init__(self) -> None:
        for name, low, high in (("compression", 1, 64), ("kv_stride", 1, 4), ("groups", 1, 1024)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise EDiTConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r:.80}")
        if type(self.cell) is not int or self.cell % 4 or not 0 <= self.cell <= 64:
            raise EDiTConfigError(f"cell must be 0 or a multiple of 4 up to 64, not {self.cell!r:.80}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise EDiTConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r:.80}")
        if type(self.local) is not bool:
            raise EDiTConfigError(f"local must be true or false, not {self.local!r:.80}")
        if type(self.eps) not in (int, float) or not _LEAST_EPS <= self.eps < 1:
            raise EDiTConfigError(f"eps must be a number from {_LEAST_EPS:g} and under 1, not {self.eps!r:.80}")
        KERNELS[self.kernel].check(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and (why := self._why_idle(field.name)):
                raise EDiTConfigError(f"{field.name}={value} has no meaning with {why}")

    def _why_idle(self, name: str) -> str | None:
        """The choices that leave a field without a meaning; None where one of them reads it, or none has to."""
        reasons = []
        for choice, variants in VARIANTS.items():
            if any(name in variant.reads for variant in variants.values()):
                chosen = getattr(self, choice)
                why = self._why_idle(choice)
                if why is None and name in variants[chosen].reads:
                    return None
                reasons.append(why or f"{choice}={chosen}")
        return " and ".join(dict.fromkeys(reasons)) or None

    @classmethod
    def preset(cls, name: str = DEFAULT, /, **changes: Any) -> EDiTConfig:
        """A form of attention by its name, with some fields changed.

        `local` is what this project found best: a separable ConvFusion, squared ReLU, all keys, and a local branch. The
        others are published: `paper` is EDiT and MM-EDiT; `sana` the all-linear ReLU attention of SANA (arXiv
        2410.10629), `linfusion` that of LinFusion (arXiv 2409.02097), `kv_compression` PixArt-Σ's softmax over fewer
        keys (arXiv 2403.04692): what the paper compares it with. `piecewise` (after PISA, arXiv 2602.01077) needs no
        weights.

        Raises:
            EDiTConfigError: no such preset, or the changes do not go with it.
        """
        if name not in tuple(PRESETS):  # a file may name what is no key of any dictionary
            raise EDiTConfigError(f"preset must be one of {', '.join(PRESETS)}, not {name!r:.80}")
        cls._check_names(changes)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def _check_names(cls, fields: Iterable[str]) -> None:
        if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(cls)}):
            raise EDiTConfigError(f"the student's config has fields unknown to this version: {shown(unknown)}")

    @property
    def side_weights(self) -> bool:
        """Whether a student has weights of its own beside the base's; without, it is its differences on the base."""
        return bool(self.parts)

    @property
    def needs_weights(self) -> bool:
        """Whether it draws nothing of use without weights that were made for the model."""
        return self.side_weights or not KERNELS[self.kernel].as_is

    @property
    def parts(self) -> Parts:
        """The kinds of side modules of an attention, by the names that weights files give them."""
        return KERNELS[self.kernel].parts(self)

    def hidden(self, dim: int) -> int:
        """Channels of a bottleneck for a model of width `dim`.

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
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
            raise EDiTConfigError(f"config is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise EDiTConfigError(f"config must be a JSON object, not {type(fields).__name__}")
        cls._check_names(fields)
        return cls(**fields)


_check_classes()
