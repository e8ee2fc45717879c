"""A student's weights: what they hold, their file, and what they change in a base."""

from .bare import weights_for
from .file import DTYPES, holds_weights
from .fingerprint import fingerprint, fingerprint_distance
from .weights import EDiTWeights, LoadReport, build_sides

__all__ = [
    "DTYPES",
    "EDiTWeights",
    "LoadReport",
    "build_sides",
    "fingerprint",
    "fingerprint_distance",
    "holds_weights",
    "weights_for",
]
