"""PixArt-Σ: one image-only self-attention per block; the caption enters through a cross-attention that stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..attention import Grid, Projections, SideAttention
from ..errors import EDiTModelError
from ..hosts.processors import Processor, SelfProcessor
from .base import Backbone, Base, BaseLinear, HostCall, Shapes, attention_linears, count_blocks

_PATCH = 2
_MARKERS = {  # tensors that, with the blocks, tell PixArt's transformer from others with blocks of the same name
    "comfy": ("t_block.1.bias", "blocks.0.cross_attn.kv_linear.bias"),
    "diffusers": ("adaln_single.linear.bias", "pos_embed.proj.bias", "caption_projection.linear_1.bias"),
}
_OUTPUT_BIAS = {"comfy": "blocks.{}.attn.proj.bias", "diffusers": "transformer_blocks.{}.attn1.to_out.0.bias"}


class PixArtSigma(Backbone):
    name = "pixart_sigma"
    title = "PixArt-Σ"
    sites = ("self",)

    def match(self, shapes: Shapes) -> Base | None:
        for host, bias in _OUTPUT_BIAS.items():
            depth = count_blocks(shapes, bias)
            if depth and all(key in shapes for key in _MARKERS[host]):
                return Base(self, host, (*shapes[bias.format(0)], 0)[0], (("self",),) * depth)
        return None

    def output_bias(self, base: Base, block: int) -> str:
        return _OUTPUT_BIAS[base.host].format(block)

    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        return attention_linears(self.diffusers_path(block, site), self.comfy_path(block))

    def diffusers_path(self, block: int, site: str) -> str:
        return f"transformer_blocks.{block}.attn1"

    def diffusers_processor(self, site: str) -> type[Processor]:
        return SelfProcessor

    def comfy_path(self, block: int) -> str:
        return f"blocks.{block}.attn"

    def comfy_grid(self, height: int, width: int) -> Grid:
        if height % _PATCH or width % _PATCH:
            raise EDiTModelError(
                f"PixArt-Σ cannot draw {width * 8}x{height * 8} pixels: both sides must be multiples of 16"
            )
        if height + width <= 64:  # ComfyUI's position embedding divides by round(mean side / 64 latent pixels)
            raise EDiTModelError(
                f"PixArt-Σ in ComfyUI cannot draw {width * 8}x{height * 8} pixels: the mean side must be over 256"
            )
        return height // _PATCH, width // _PATCH

    def comfy_image_tokens(self, x: Tensor, *args: Any, **kwargs: Any) -> int:
        return x.shape[1]

    def comfy_forward(
        self, module: Any, sides: Mapping[str, SideAttention], call: HostCall, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        base = Projections(*module.qkv(x).chunk(3, dim=-1))  # 3 x (B, N, C)
        y = sides["self"](x, base, call.grid, module.num_heads, softmax=call.softmax)  # (B, N, C)
        return module.proj(y)


BACKBONE = PixArtSigma()
