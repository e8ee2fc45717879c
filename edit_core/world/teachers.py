"""The two small teachers, untrained: real PixArt-Σ and SD3.5-Medium architectures, a few million parameters (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import EDiTModelError
from .codec import CHANNELS
from .text import POOLED, WIDTH

__all__ = ["MAX_TOKENS", "build", "scheduler"]

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if backbone == "pixart_sigma":
            # Positions run from 0 to 32 at every size: with sample_size 64 and scale 1 ComfyUI computes the same ones.
            model: Any = PixArtTransformer2DModel(
                num_attention_heads=5,
                attention_head_dim=32,
                cross_attention_dim=160,
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
                num_attention_heads=3,
                attention_head_dim=64,
                caption_projection_dim=192,
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
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if backbone == "pixart_sigma":
        return DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
