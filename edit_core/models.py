"""Transformers of real dimensions with random weights, for what does not depend on the weights: speed and structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones import CELL, Backbone
from .errors import EDiTModelError

__all__ = ["empty_transformer", "random_inputs", "random_transformer"]


def random_transformer(
    backbone: Backbone,
    blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
    side: int = 1024,
    seed: int = 0,
) -> Any:
    """A backbone's published model as diffusers builds it, with random weights.

    Args:
        backbone: which.
        blocks: fewer blocks than the real model's.
        dtype: of weights and computation.
        side: pixels per side of the largest picture to draw; a table of positions is made no larger.
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


def empty_transformer(backbone: Backbone, blocks: int | None = None, side: int = 1024) -> Any:
    """:func:`random_transformer` without its weights, which are on the `meta` device; buffers are there.

    Raises:
        EDiTModelError: as there.
    """
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError:
        raise EDiTModelError("this needs diffusers and accelerate: install edit-attention[diffusers]") from None
    depth = backbone.real.blocks
    blocks = depth if blocks is None else blocks
    if not 1 <= blocks <= depth:
        raise EDiTModelError(f"{backbone.title} has 1 to {depth} blocks, not {blocks}")
    model_class = getattr(diffusers, backbone.transformer)
    with init_empty_weights(include_buffers=False):  # initialising billions of weights would take minutes
        return model_class(**backbone.model_options(blocks, side))


def _random(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Norms near one, biases small, weights so that activations keep their size."""
    tensor = torch.empty(like.shape, dtype=dtype)
    if tensor.ndim < 2:
        return tensor.uniform_(-0.02, 0.02, generator=generator).add_(float("norm" in name and "weight" in name))
    bound = (3 / tensor[0].numel()) ** 0.5
    return tensor.uniform_(-bound, bound, generator=generator)


def random_inputs(transformer: nn.Module, backbone: Backbone, side: int, batch: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one call of the transformer on a square picture.

    Args:
        transformer: from :func:`random_transformer`, or any other of the backbone in diffusers.
        backbone: which it is of.
        side: pixels per side.
        batch: pictures per call (2 for classifier-free guidance).
        seed: seeds the inputs.

    Raises:
        EDiTModelError: the transformer cannot draw this size.
    """
    backbone.check_size(side, side, transformer)
    model: Any = transformer
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    latent = normal(model.config.in_channels, side // CELL, side // CELL)
    condition = backbone.random_condition(lambda each: model.config[each.width], normal)
    timestep = torch.full((batch,), 500, device=model.device)
    return backbone.call_arguments(latent, timestep, condition, model.device)
