"""What is timed: the attentions of one block, or a whole transformer, of real dimensions with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import Grid
from ..backbones import identify_module
from ..errors import EDiTModelError
from ..layers import parse_layers
from ..models import PROMPT_TOKENS, random_inputs, random_transformer

__all__ = ["LEVELS", "Subject", "grid_of", "layer", "transformer"]

LEVELS = ("layer", "transformer")
"""`layer`: PixArt-Σ's self-attention, or the joint attention and `attn2` of one of SD3.5-M's blocks, projections
included. `transformer`: all of it."""

_BLOCKS = {"pixart_sigma": 1, "sd35_medium": 2}
"""As many blocks as it takes for the first one to be like most: SD3.5's last emits no prompt rows."""


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


def grid_of(side: int) -> Grid:
    """The token grid of a square picture.

    Raises:
        EDiTModelError: the side is not a multiple of 16 pixels.
    """
    if side < 16 or side % 16:
        raise EDiTModelError(f"{side} pixels cannot be drawn: sides must be multiples of 16")
    return side // 16, side // 16


def layer(
    backbone: str, grid: Grid, batch: int, dtype: torch.dtype, device: torch.device, prompt: int | None = None
) -> Subject:
    """The self-attentions of one block; the prompt is as long as a real one unless said otherwise."""
    model = random_transformer(backbone, _BLOCKS[backbone], dtype).to(device)
    attentions = _attentions(model, (0,))
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, attentions[0].inner_dim, generator=generator).to(device, dtype)

    inputs = {"x": normal(grid[0] * grid[1])}
    if backbone == "pixart_sigma":

        def call() -> tuple[Tensor, ...]:
            return (attentions[0](inputs["x"]),)

    else:
        inputs["prompt"] = normal(prompt or PROMPT_TOKENS[backbone])

        def call() -> tuple[Tensor, ...]:
            return *attentions[0](inputs["x"], inputs["prompt"]), attentions[1](inputs["x"])

    return Subject(model, "0", attentions, grid, call, inputs)


def transformer(
    backbone: str,
    side: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    blocks: int | None = None,
    layers: str = "all",
) -> Subject:
    """A whole transformer on a square picture.

    Raises:
        EDiTModelError: the side is not a multiple of 16 pixels, or a bad number of blocks.
        EDiTError: a bad `layers` text.
    """
    model = random_transformer(backbone, blocks, dtype, side).to(device)
    call = partial(model, **random_inputs(model, backbone, side, batch))
    attentions = _attentions(model, parse_layers(layers, len(model.transformer_blocks)))
    return Subject(model, layers, attentions, grid_of(side), call, {})


def _attentions(model: Any, blocks: tuple[int, ...]) -> list[Any]:
    base = identify_module(model)
    return [
        model.get_submodule(base.backbone.diffusers_path(block, site)) for block in blocks for site in base.sites[block]
    ]
