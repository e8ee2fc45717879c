"""A student's weights: what they hold, their file, and what they change in a base."""

from .weights import DTYPES, EDiTWeights, LoadReport, build_sides, fingerprint, fingerprint_distance, holds_weights

__all__ = [
    "DTYPES",
    "EDiTWeights",
    "LoadReport",
    "build_sides",
    "fingerprint",
    "fingerprint_distance",
    "holds_weights",
]
