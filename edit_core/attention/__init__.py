"""EDiT and MM-EDiT as functions and modules on plain tensors; `naive` is their specification."""

from .edit import SITES, EDiTAttention, HybridAttention, Projections, Softmax, softmax_attention
from .linear import linear_attention, merge_heads, split_heads
from .modules import ConvFusion, Grid, LayerFactory, SpatialCompressor

__all__ = [
    "SITES",
    "ConvFusion",
    "EDiTAttention",
    "Grid",
    "HybridAttention",
    "LayerFactory",
    "Projections",
    "Softmax",
    "SpatialCompressor",
    "linear_attention",
    "merge_heads",
    "softmax_attention",
    "split_heads",
]
