"""Pictures to latents and back: a fixed linear code of cells of 8x8 pixels, with nothing learnt (ours).

A cell's latent is its lowest two-dimensional cosine coefficients in three decorrelated colours. Means have unit
variance; details have a half of that deviation or less, so that a diffusion settles them last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distill.encoders import CELL
from .scenes import Scene

__all__ = ["CHANNELS", "Basis", "basis", "decode", "draw_scenes", "encode", "through"]

CHANNELS = {"pixart_sigma": 4, "sd35_medium": 16}

# Mean of the world's colours, and their principal axes, each divided by its deviation over the cells of many scenes.
_MEAN = (0.485, 0.443, 0.411)
_AXES = ((2.46, 1.96, 1.30), (-2.63, 0.52, 4.18), (-3.24, 5.90, -2.78))
# Of each channel: colour axis, vertical and horizontal frequency, factor.
_MEANS = ((0, 0, 0, 1.0), (1, 0, 0, 1.0), (2, 0, 0, 1.0))
_TERMS = {
    # One detail of the first axis, which is nearly luminance: it doubles the resolution across.
    "pixart_sigma": (*_MEANS, (0, 0, 1, 3.0)),
    "sd35_medium": (
        *_MEANS,
        *((axis, down, across, 3.0 + down * across) for axis in range(3) for down, across in ((0, 1), (1, 0), (1, 1))),
        *((0, down, across, 4.0) for down, across in ((0, 2), (2, 0), (1, 2), (2, 1))),
    ),
}


def draw_scenes(scenes: Sequence[Scene], width: int, height: int) -> Tensor:
    """Scenes as pictures, `(B, height, width, 3)` uint8."""
    return torch.from_numpy(np.stack([scene.draw(width, height) for scene in scenes]))


def through(backbone: str, pictures: Tensor) -> Tensor:
    """What is left of pictures `(B, 8h, 8w, 3)` uint8 in a backbone's latents, decoded again: the same shape."""
    return decode(backbone, encode(backbone, pictures.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Basis(NamedTuple):
    """How a cell is coded, and how back."""

    analysis: Tensor
    """`(c, 3 * 64)`, for a cell's colours, rows and columns."""
    synthesis: Tensor
    """`(3 * 64, c)`, its pseudo-inverse."""
    mean: Tensor
    """`(3, 1, 1)`"""


def encode(backbone: str, pixels: Tensor) -> Tensor:
    """Latents as the transformer takes them.

    Args:
        backbone: `pixart_sigma` (4 channels) or `sd35_medium` (16).
        pixels: `(B, 3, 8h, 8w)`, uint8.

    Returns:
        `(B, c, h, w)`, float32.
    """
    code = basis(backbone)
    image = pixels.float() / 255 - code.mean.to(pixels.device)
    b, _, height, width = image.shape
    cells = image.view(b, 3, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 1, 3, 5)
    latent = cells.reshape(b, height // CELL, width // CELL, -1) @ code.analysis.to(pixels.device).T
    return latent.permute(0, 3, 1, 2).contiguous()


def decode(backbone: str, latent: Tensor) -> Tensor:
    """The least picture with these latents: `(B, c, h, w)` to `(B, 3, 8h, 8w)` uint8."""
    code = basis(backbone)
    b, _, h, w = latent.shape
    cells = latent.float().permute(0, 2, 3, 1) @ code.synthesis.to(latent.device).T  # (B, h, w, 3 * 64)
    image = cells.view(b, h, w, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * CELL, w * CELL)
    return ((image + code.mean.to(latent.device)).clamp(0, 1) * 255).round().byte()


@functools.cache
def basis(backbone: str) -> Basis:
    """The code of a backbone."""
    axes = torch.tensor(_AXES, dtype=torch.float64)
    rows = []
    for axis, down, across, factor in _TERMS[backbone]:
        wave = _cosine(down)[:, None] * _cosine(across)[None] / CELL**2  # (8, 8)
        rows.append(factor * axes[axis][:, None, None] * wave)
    analysis = torch.stack(rows).flatten(1)  # (c, 192)
    synthesis = torch.linalg.pinv(analysis)
    return Basis(analysis.float(), synthesis.float(), torch.tensor(_MEAN).view(3, 1, 1))


def _cosine(frequency: int) -> Tensor:
    """`(8,)`, of unit mean square."""
    places = torch.arange(CELL, dtype=torch.float64)
    wave = torch.cos((2 * places + 1) * frequency * math.pi / (2 * CELL))
    return wave / wave.square().mean().sqrt()
