"""What is added to the base's queries: one class per name of the config's `query`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .call import Image, Norm, Places, Rows, Sides, normed, of_part
from .modules import ConvFusion, Fusion, MLPFusion, Parts, SeparableFusion
from .variant import Variant, named

__all__ = ["QUERIES", "ConvFusionQuery", "MLPQuery", "PlainQuery", "Query", "SeparableQuery", "fused", "plain"]


def plain(tokens: Tensor, places: Places, heads: int, norm: Norm | None) -> Rows:
    """Queries or keys `(B, N, C)` as they are, normed."""
    return lambda part: normed(of_part(tokens, part), part, places, heads, norm)


def fused(module: Fusion, x: Tensor, tokens: Tensor, places: Places, heads: int, norm: Norm | None) -> Rows:
    """Queries or keys `(B, N, C)` with what a fusion adds to them from `x`, normed."""
    whole = module.by_kernels(x, tokens, places.grid)
    if whole is not None:
        return plain(whole, places, heads, norm)
    gathered = module.gather(x, places.grid)  # (B, N, C/r) or (B, N, C)
    return lambda part: normed(module.add(of_part(gathered, part), of_part(tokens, part)), part, places, heads, norm)


class Query(Variant):
    """What becomes of the base's queries."""

    parts: ClassVar[Parts] = {}
    """The side modules, by the names that weights files give them."""

    def rows(self, sides: Sides, image: Image) -> Rows:
        """Normed queries, by slices of the tokens; `sides` holds the parts."""
        raise NotImplementedError


class PlainQuery(Query):
    name = "plain"

    def rows(self, sides: Sides, image: Image) -> Rows:
        return plain(image.base.q, Places(image.grid), image.heads, image.norm_q)


class _FusedQuery(Query):
    """One fusion, the only part."""

    def rows(self, sides: Sides, image: Image) -> Rows:
        (name,) = self.parts
        fusion: Fusion = getattr(sides, name)
        return fused(fusion, image.x, image.base.q, Places(image.grid), image.heads, image.norm_q)


class ConvFusionQuery(_FusedQuery):
    """The paper's."""

    name = "conv_fusion"
    reads = ConvFusion.reads
    parts: ClassVar[Parts] = {"conv_fusion": ConvFusion}


class SeparableQuery(_FusedQuery):
    """Ours, a ninth of the cost."""

    name = "separable"
    reads = SeparableFusion.reads
    parts: ClassVar[Parts] = {"conv_fusion": SeparableFusion}


class MLPQuery(_FusedQuery):
    """LinFusion's."""

    name = "mlp"
    reads = MLPFusion.reads
    parts: ClassVar[Parts] = {"mlp_q": MLPFusion}


QUERIES = named(ConvFusionQuery, SeparableQuery, MLPQuery, PlainQuery)
"""By the config's name."""
