"""The two small teachers, untrained: real PixArt-Σ and SD3.5-Medium architectures, a few million parameters (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import backbone_named
from ..errors import EDiTModelError
from .codec import CHANNELS
from .text import POOLED, WIDTH

__all__ = ["HEADS", "HEAD_WIDTH", "MAX_TOKENS", "build", "position_table", "scheduler"]

HEADS = {"pixart_sigma": 5, "sd35_medium": 3}
HEAD_WIDTH = {"pixart_sigma": 32, "sd35_medium": 64}
"""Channels per head; a teacher's channels are those of all its heads."""
MAX_TOKENS = 64
"""Per side of the largest picture: 1024 pixels."""


def build(backbone: str, seed: int = 0) -> Any:
    """A diffusers transformer with fresh weights.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        seed: of the weights.

    Raises:
        EDiTModelError: diffusers is not installed.
    """
    try:
        from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    except ImportError:
        raise EDiTModelError("this needs diffusers: install edit-attention[diffusers]") from None
    heads, width = HEADS[backbone], HEAD_WIDTH[backbone]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if backbone == "pixart_sigma":
            # Positions run from 0 to 32 at every size: with sample_size 64 and scale 1 ComfyUI computes the same ones.
            model: Any = PixArtTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width,
                cross_attention_dim=heads * width,
                num_layers=6,
                caption_channels=WIDTH,
                sample_size=64,
                interpolation_scale=1,
                use_additional_conditions=False,
            )
            _zero(model.adaln_single.linear)
        else:
            # ComfyUI takes width = 64 x heads and counts the blocks; three are what 10 MB hold at a width that
            # exceeds a patch's 64 values well.
            model = SD3Transformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width,
                caption_projection_dim=heads * width,
                num_layers=3,
                in_channels=CHANNELS[backbone],
                out_channels=CHANNELS[backbone],
                joint_attention_dim=WIDTH,
                pooled_projection_dim=POOLED,
                sample_size=2 * MAX_TOKENS,
                pos_embed_max_size=MAX_TOKENS,
                dual_attention_layers=(0, 1),
                qk_norm="rms_norm",
            )
            for block in model.transformer_blocks:
                _zero(block.norm1.linear)
                _zero(block.norm1_context.linear)
            _zero(model.norm_out.linear)
        # As DiT starts: every block is the identity, and the prediction is zero.
        _zero(model.proj_out)
    return model.eval()


def scheduler(backbone: str) -> Any:
    """The sampler that the teacher's noise belongs to: DPM-Solver++ on linear betas, or Euler on straight paths."""
    return backbone_named(backbone).objective.scheduler(order=2, shift=1.0)


def position_table() -> Tensor:
    """What the small SD3.5 adds to its tokens, `(1, MAX_TOKENS * MAX_TOKENS, channels)`; diffusers' to the bit.

    Sines and cosines of a token's column, then of its row (from "Attention Is All You Need", arXiv 1706.03762).
    """
    quarter = HEADS["sd35_medium"] * HEAD_WIDTH["sd35_medium"] // 4
    frequencies = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(MAX_TOKENS, dtype=torch.float64), frequencies)
    places = torch.cat([angles.sin(), angles.cos()], dim=1)  # (MAX_TOKENS, channels / 2)
    columns, rows = places.repeat(MAX_TOKENS, 1), places.repeat_interleave(MAX_TOKENS, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
