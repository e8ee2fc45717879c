"""Fingerprints of base models: a few of their values, by which weights know the base that they were made for."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backbones import Base
from ..errors import EDiTModelError

__all__ = ["SAME_BASE", "added", "fingerprint", "fingerprint_distance"]

SAME_BASE = 0.5
"""Relative distance of fingerprints; unrelated bases are near 1.4, an fp8 copy is under 0.2."""
_SAMPLES = 8  # values per block


def fingerprint(base: Base, tensor: Callable[[str], Tensor]) -> str:
    """What a base's `base_hash` is: a few values of one tensor of every block, as bfloat16 in base64.

    The tensor is the description's choice: where there are any, biases, which bear the same values in ComfyUI's, the
    original and diffusers' files, and stay unquantised in GGUF and scaled fp8 files. Values, unlike a digest, can be
    compared when the base was cast to another dtype.

    Raises:
        EDiTModelError: the base has no values just now, but only shapes.
    """
    samples = []
    for block in range(base.depth):
        values = tensor(base.sampled(block))
        if values.is_meta:
            raise EDiTModelError(
                f"the model's block {block} is not in memory, as accelerate's offloading leaves it between calls; "
                "use EDiT first, and offload the model then"
            )
        flat = values.detach().flatten()  # of a matrix the rows one after the other
        places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).round().long().to(flat.device)
        samples.append(flat[places].float().cpu())
    return _encoded(torch.cat(samples))


def added(fingerprints: tuple[str, str]) -> str:
    """The fingerprint of the sum of two bases' tensors."""
    a, b = map(_decoded, fingerprints)
    return _encoded(a + b)


def fingerprint_distance(a: str, b: str) -> float:
    """Relative distance of two fingerprints: 0 for the same base, near 1.4 for unrelated ones, inf for other sizes."""
    try:
        left, right = _decoded(a), _decoded(b)
    except ValueError:
        return math.inf
    if left.shape != right.shape:
        return math.inf
    scale = max(float(left.norm()), float(right.norm()))
    return float((left - right).norm()) / scale if scale else 0.0


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.bfloat16().view(torch.uint8).numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()
