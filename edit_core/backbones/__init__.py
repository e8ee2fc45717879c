"""The backbones that EDiT knows, one file each: a new one is a description beside these, and nothing else."""

from .base import CELL, Backbone, Base, BaseLinear, Condition, HostCall, Real, Shapes
from .registry import BACKBONES, PART, backbone_named, identify, identify_module, module_tensors, plain_name, unwrapped

__all__ = [
    "BACKBONES",
    "CELL",
    "PART",
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
    "plain_name",
    "unwrapped",
]
