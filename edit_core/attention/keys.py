"""What becomes of the base's keys and values: one class per name of the config's `key`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .call import Image, Places, Rows, Sides
from .modules import ConvFusion, Fusion, MLPFusion, Parts, SpatialCompressor
from .queries import fused, plain
from .variant import Variant, named

__all__ = ["KEYS", "CompressorKey", "ConvFusionKey", "Key", "MLPKey", "PlainKey"]


class Key(Variant):
    """What becomes of the base's keys and values."""

    parts: ClassVar[Parts] = {}
    """The side modules, by the names that weights files give them."""

    def rows(self, sides: Sides, image: Image) -> tuple[Rows, Tensor]:
        """Normed keys by slices of them, and the values `(B, M, C)`; `sides` holds the parts."""
        raise NotImplementedError


class PlainKey(Key):
    name = "plain"

    def rows(self, sides: Sides, image: Image) -> tuple[Rows, Tensor]:
        return plain(image.base.k, Places(image.grid), image.heads, image.norm_k), image.base.v


class CompressorKey(Key):
    """The paper's: keys and values both go through a compressor."""

    name = "compressor"
    reads = SpatialCompressor.reads
    parts: ClassVar[Parts] = {"compress_k": SpatialCompressor, "compress_v": SpatialCompressor}

    def rows(self, sides: Sides, image: Image) -> tuple[Rows, Tensor]:
        k, v = sides.compress_k(image.base.k, image.grid), sides.compress_v(image.base.v, image.grid)  # (B, M, C)
        stride = self.config.kv_stride
        height, width = image.grid
        places = Places((-(-height // stride), -(-width // stride)), stride)
        return plain(k, places, image.heads, image.norm_k), v


class _FusedKey(Key):
    """One fusion, the only part; the values stay as they are."""

    def rows(self, sides: Sides, image: Image) -> tuple[Rows, Tensor]:
        (name,) = self.parts
        fusion: Fusion = getattr(sides, name)
        return fused(fusion, image.x, image.base.k, Places(image.grid), image.heads, image.norm_k), image.base.v


class ConvFusionKey(_FusedKey):
    """An ablation of the paper."""

    name = "conv_fusion"
    reads = ConvFusion.reads
    parts: ClassVar[Parts] = {"conv_fusion_k": ConvFusion}


class MLPKey(_FusedKey):
    """LinFusion's."""

    name = "mlp"
    reads = MLPFusion.reads
    parts: ClassVar[Parts] = {"mlp_k": MLPFusion}


KEYS = named(CompressorKey, ConvFusionKey, MLPKey, PlainKey)
"""By the config's name."""
