"""PixArt-α at 1024 pixels (arXiv 2310.00426): PixArt-Σ's blocks, shorter captions, and a transformer that is told the
picture's size. What was trained at 256 or 512 pixels is not told it, and has the tensors of a PixArt-Σ."""

from __future__ import annotations

from typing import ClassVar

from .base import Real
from .pixart_sigma import PixArtSigma


class PixArtAlpha(PixArtSigma):
    name = "pixart_alpha"
    title = "PixArt-α"
    real = Real(28, 1152, 16, prompt_tokens=120, attention_graph=24, block_graph=41)
    pipelines = ("PixArtAlphaPipeline",)
    limits: ClassVar[dict[str, tuple[str, int]]] = {"tokenizer": ("T5's 120 tokens", 120)}
    sized = True


BACKBONE = PixArtAlpha()
