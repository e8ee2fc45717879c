"""The backbones that EDiT knows, one file each: a new one is a description beside these, and nothing else."""

from .base import CELL, Backbone, Base, BaseLinear, Condition, HostCall, Real, Shapes
from .registry import BACKBONES, backbone_named, identify, identify_module, module_tensors

__all__ = [
    "BACKBONES",
    "CELL",
    "Backbone",
    "Base",
    "BaseLinear",
    "Condition",
    "HostCall",
    "Real",
    "Shapes",
    "backbone_named",
    "identify",
    "identify_module",
    "module_tensors",
]
