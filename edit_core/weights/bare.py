"""A form of attention that needs no weights, as whoever applies it takes weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..backbones import Base
from ..config import WITHOUT_WEIGHTS, EDiTConfig
from ..errors import EDiTConfigError
from .weights import EDiTWeights

__all__ = ["weights_for"]


class _Bare(EDiTWeights):
    """Weights of a whole base that hold nothing."""

    def __init__(self, base: Base, config: EDiTConfig) -> None:
        super().__init__(base.backbone.name, config, {}, "")
        self._base = base

    @property
    def sites(self) -> dict[int, tuple[str, ...]]:
        return {block: tuple(sorted(sites)) for block, sites in enumerate(self._base.sites)}

    @property
    def dim(self) -> int:
        return self._base.dim

    def warning(self, base: Base, tensor: Callable[[str], Tensor]) -> None:
        """None: what holds nothing fits every base."""


def weights_for(base: Base, given: EDiTWeights | EDiTConfig) -> EDiTWeights:
    """Weights as they are; for a config that needs none, such as the preset `piecewise`, those that hold nothing.

    Raises:
        EDiTConfigError: the config's attention needs weights.
    """
    if isinstance(given, EDiTWeights):
        return given
    if given.needs_weights:
        raise EDiTConfigError(
            f"this config's attention (kernel={given.kernel}, query={given.query}, key={given.key}) needs weights made "
            f"for the model: hand in EDiTWeights, of a file or of EDiTWeights.init, or the preset {WITHOUT_WEIGHTS}"
        )
    return _Bare(base, given)
