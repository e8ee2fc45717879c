"""EDiT and MM-EDiT as functions and modules on plain tensors; `naive` is their specification."""

from collections.abc import Mapping

from .call import Grid, Image, Norm, PlacedNorm, Projections, Softmax, softmax_attention
from .form import Form
from .forms import KERNELS
from .joint import JOINTS, NORMALISERS, SOFTMAX_FEATURES
from .keys import KEYS
from .linear import linear_attention, merge_heads, split_heads
from .modules import ConvFusion, LayerFactory, SpatialCompressor
from .plans import QUALITIES
from .queries import QUERIES
from .sites import SITES, EDiTAttention, HybridAttention, SideAttention
from .variant import Variant

__all__ = [
    "SIDE_TENSORS",
    "SITES",
    "VARIANTS",
    "ConvFusion",
    "EDiTAttention",
    "Form",
    "Grid",
    "HybridAttention",
    "Image",
    "LayerFactory",
    "Norm",
    "PlacedNorm",
    "Projections",
    "SideAttention",
    "Softmax",
    "SpatialCompressor",
    "linear_attention",
    "merge_heads",
    "softmax_attention",
    "split_heads",
]

VARIANTS: Mapping[str, Mapping[str, type[Variant]]] = {
    "normaliser": NORMALISERS,
    "softmax_features": SOFTMAX_FEATURES,
    "kernel": KERNELS,
    "query": QUERIES,
    "key": KEYS,
    "joint": JOINTS,
    "quality": QUALITIES,
}
"""Of each field of the config that is one of several names, the class of each name."""

_PARTS = {name for registry in (QUERIES, KEYS) for variant in registry.values() for name in variant.parts}
SIDE_TENSORS = (*sorted(f"{name}." for name in _PARTS), *(f"{site}.local." for site in SITES))
"""Parts of names that only side weights' tensors have."""
