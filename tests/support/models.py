"""Small models of all backbones with random weights, as diffusers makes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from edit_core import EDiTWeights

BACKBONES = ("pixart_sigma", "sd35_medium", "sd3", "pixart_alpha")
SHIPPED = ("pixart_sigma", "sd35_medium")
"""Those that the configurations and the small world are for."""
SD35_FIRST = [pytest.param("pixart_sigma", marks=pytest.mark.slow), "sd35_medium"]
PIXART_FIRST = ["pixart_sigma", pytest.param("sd35_medium", marks=pytest.mark.slow)]
"""One of each kind, for tests of which `make test` has time for one."""


def randomise(module: nn.Module, seed: int) -> None:
    """Makes every parameter matter: no zero biases, no unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def pixart(seed: int = 0, heads: int = 4, head_dim: int = 18, blocks: int = 2, caption: int = 64,
           sized: bool = False) -> Any:  # fmt: skip
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, cross_attention_dim=heads * head_dim,
        num_layers=blocks, caption_channels=caption, use_additional_conditions=sized,
        # The pipeline of PixArt-α hands on sizes where sample_size is 128. The positions are the same ones in both.
        sample_size=128 if sized else 64, interpolation_scale=2 if sized else 1,
    )  # fmt: skip
    randomise(model, seed + 1)
    return model.eval()


def sd35(seed: int = 0, heads: int = 3, blocks: int = 3, dual: tuple[int, ...] = (0, 1), context: int = 64,
         pooled: int = 32, qk_norm: str | None = "rms_norm") -> Any:  # fmt: skip
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads, num_layers=blocks,
        joint_attention_dim=context, pooled_projection_dim=pooled, sample_size=64, pos_embed_max_size=48,
        dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    randomise(model, seed + 1)
    return model.eval()


def make(backbone: str, **kwargs: Any) -> Any:
    return _MAKERS[backbone](**kwargs)


_MAKERS: dict[str, Any] = {
    "pixart_sigma": pixart,
    "sd35_medium": sd35,
    "sd3": partial(sd35, dual=(), qk_norm=None),  # as SD3-Medium
    "pixart_alpha": partial(pixart, sized=True),
}


def forward(
    model: Any, height: int = 34, width: int = 40, batch: int = 2, prompt: int = 7, seed: int = 5, **more: Any
) -> Tensor:
    """The transformer's output on random inputs."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.dtype
    if isinstance(model, PixArtTransformer2DModel):
        extra: dict[str, Any] = {"added_cond_kwargs": sizes(model, batch, height, width)}
        channels, context = 4, model.config.caption_channels
    else:
        extra = {"pooled_projections": torch.randn(batch, model.config.pooled_projection_dim, generator=generator)}
        extra["pooled_projections"] = extra["pooled_projections"].to(dtype)
        channels, context = 16, model.config.joint_attention_dim
    latent = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    caption = torch.randn(batch, prompt, context, generator=generator).to(dtype)
    timestep = torch.tensor([300] * batch)
    return model(latent, encoder_hidden_states=caption, timestep=timestep, **extra, **more).sample


def sizes(model: Any, batch: int, height: int, width: int) -> dict[str, Tensor | None]:
    """What a PixArt is told of a latent's size."""
    if not model.config.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    resolution, ratio = torch.tensor([[8.0 * height, 8.0 * width]]), torch.tensor([[height / width]])
    return {
        "resolution": resolution.expand(batch, 2).to(model.dtype),
        "aspect_ratio": ratio.expand(batch, 1).to(model.dtype),
    }


def trained_like(model: Any, seed: int = 3, **kwargs: Any) -> EDiTWeights:
    """Weights none of whose parts is the identity, as after a training."""
    weights = EDiTWeights.init(model, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.tensors.values():
        tensor += 0.1 * tensor.std().nan_to_num(0.0).clamp(min=0.2) * torch.randn(tensor.shape, generator=generator)
    return weights


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
