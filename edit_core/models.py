"""Transformers of real dimensions with random weights, for what does not depend on the weights: speed and structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones import BACKBONES
from .errors import EDiTModelError

__all__ = ["PROMPT_TOKENS", "empty_transformer", "random_inputs", "random_transformer"]

PROMPT_TOKENS = {"pixart_sigma": 300, "sd35_medium": 77 + 256}
"""Text tokens of a real prompt: T5's 300; CLIP's 77 and T5's 256."""


def random_transformer(
    backbone: str,
    blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
    side: int = 1024,
    seed: int = 0,
) -> Any:
    """PixArt-Σ XL/2 or SD3.5-Medium as diffusers builds them, with random weights.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        blocks: fewer blocks than the real model's 28 or 24.
        dtype: of weights and computation.
        side: pixels per side of the largest picture to draw; SD3.5's table of positions is made no larger.
        seed: seeds the weights.

    Raises:
        EDiTModelError: diffusers is not installed, or a bad number of blocks.
    """
    model = empty_transformer(backbone, blocks, side)
    generator = torch.Generator().manual_seed(seed)
    state = {name: _random(name, parameter, dtype, generator) for name, parameter in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    nn.Module.to(model, dtype)  # diffusers' own warns of layers it has none of
    return model.eval().requires_grad_(False)


def empty_transformer(backbone: str, blocks: int | None = None, side: int = 1024) -> Any:
    """:func:`random_transformer` without its weights, which are on the `meta` device; buffers are there.

    Raises:
        EDiTModelError: as there.
    """
    try:
        from accelerate import init_empty_weights
        from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    except ImportError:
        raise EDiTModelError("this needs diffusers and accelerate: install edit-attention[diffusers]") from None
    depth = {"pixart_sigma": 28, "sd35_medium": 24}[backbone]
    blocks = depth if blocks is None else blocks
    if not 1 <= blocks <= depth:
        raise EDiTModelError(f"{BACKBONES[backbone].title} has 1 to {depth} blocks, not {blocks}")
    with init_empty_weights(include_buffers=False):  # initialising billions of weights would take minutes
        if backbone == "pixart_sigma":
            model: Any = PixArtTransformer2DModel(
                num_layers=blocks,
                sample_size=128,
                interpolation_scale=2,
                caption_channels=4096,
                use_additional_conditions=False,
            )
        else:
            model = SD3Transformer2DModel(
                num_layers=blocks,
                num_attention_heads=24,
                caption_projection_dim=1536,
                sample_size=128,
                pos_embed_max_size=side // 16,
                # as many of the blocks have attn2 as in the real model, 13 of 24
                dual_attention_layers=tuple(range(round(blocks * 13 / 24))),
                qk_norm="rms_norm",
            )
    return model


def _random(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Norms near one, biases small, weights so that activations keep their size."""
    tensor = torch.empty(like.shape, dtype=dtype)
    if tensor.ndim < 2:
        return tensor.uniform_(-0.02, 0.02, generator=generator).add_(float("norm" in name and "weight" in name))
    bound = (3 / tensor[0].numel()) ** 0.5
    return tensor.uniform_(-bound, bound, generator=generator)


def random_inputs(transformer: nn.Module, backbone: str, side: int, batch: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one call of the transformer on a square picture.

    Args:
        transformer: from :func:`random_transformer`.
        backbone: as above.
        side: pixels per side.
        batch: pictures per call (2 for classifier-free guidance).
        seed: seeds the inputs.

    Raises:
        EDiTModelError: the side is not a multiple of 16 pixels.
    """
    if side < 16 or side % 16:
        raise EDiTModelError(f"{side} pixels cannot be drawn: sides must be multiples of 16")
    model: Any = transformer
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, Any] = {
        "hidden_states": normal(model.config.in_channels, side // 8, side // 8),
        "timestep": torch.full((batch,), 500, device=model.device),
        "return_dict": False,
    }
    prompt = PROMPT_TOKENS[backbone]
    if backbone == "pixart_sigma":
        inputs["encoder_hidden_states"] = normal(prompt, model.config.caption_channels)
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    else:
        inputs["encoder_hidden_states"] = normal(prompt, model.config.joint_attention_dim)
        inputs["pooled_projections"] = normal(model.config.pooled_projection_dim)
    return inputs
