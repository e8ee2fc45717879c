"""What is timed: the attentions of one block, or a whole transformer, of real dimensions with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import Grid
from ..backbones import Backbone, identify_module
from ..layers import parse_layers
from ..models import random_inputs, random_transformer

__all__ = ["LEVELS", "Subject", "layer", "transformer"]

LEVELS = ("layer", "transformer")
"""`layer`: what EDiT replaces in one block, as PixArt-Σ's self-attention, projections included. `transformer`: all."""


@dataclass(frozen=True)
class Subject:
    """A call, and the attentions in it that contenders replace."""

    transformer: Any
    layers: str
    """The blocks that contenders replace."""
    attentions: list[Any]
    grid: Grid
    call: Callable[[], Any]
    """A layer's gives a tuple of all outputs, a transformer's whatever diffusers does."""
    inputs: dict[str, Tensor]
    """A layer's: `x` and, for a joint attention, `prompt`."""

    @property
    def heads(self) -> int:
        return self.attentions[0].heads

    @property
    def head_dim(self) -> int:
        return self.attentions[0].inner_dim // self.heads


def layer(
    backbone: Backbone, grid: Grid, batch: int, dtype: torch.dtype, device: torch.device, prompt: int | None = None
) -> Subject:
    """The self-attentions of one block; the prompt is as long as a real one unless said otherwise."""
    model = random_transformer(backbone, backbone.real.like_most, dtype).to(device)
    attentions = _attentions(model, (0,))
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, attentions[0].inner_dim, generator=generator).to(device, dtype)

    inputs = {"x": normal(grid[0] * grid[1])}
    sites = identify_module(model).sites[0]
    if "joint" in sites:
        inputs["prompt"] = normal(prompt or backbone.real.prompt_tokens)

    def call() -> tuple[Tensor, ...]:
        rows: list[Tensor] = []
        for site, attention in zip(sites, attentions, strict=True):
            rows += attention(inputs["x"], inputs["prompt"]) if site == "joint" else [attention(inputs["x"])]
        return tuple(rows)

    return Subject(model, "0", attentions, grid, call, inputs)


def transformer(
    backbone: Backbone,
    side: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    blocks: int | None = None,
    layers: str = "all",
) -> Subject:
    """A whole transformer on a square picture.

    Raises:
        EDiTModelError: a size that cannot be drawn, or a bad number of blocks.
        EDiTError: a bad `layers` text.
    """
    model = random_transformer(backbone, blocks, dtype, side).to(device)
    call = partial(model, **random_inputs(model, backbone, side, batch))
    attentions = _attentions(model, parse_layers(layers, len(model.transformer_blocks)))
    return Subject(model, layers, attentions, backbone.check_size(side, side), call, {})


def _attentions(model: Any, blocks: tuple[int, ...]) -> list[Any]:
    base = identify_module(model)
    return [
        model.get_submodule(base.backbone.diffusers_path(block, site)) for block in blocks for site in base.sites[block]
    ]
