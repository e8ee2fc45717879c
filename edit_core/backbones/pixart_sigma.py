"""PixArt-Σ: one image-only self-attention per block; the caption enters through a cross-attention that stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import Grid, Projections, SideAttention
from ..errors import EDiTModelError
from ..objective import Diffusion
from .base import CELL, Backbone, Base, BaseLinear, Condition, HostCall, Real, Shapes, attention_linears, count_blocks

_MARKERS = {  # tensors that, with the blocks, tell PixArt's transformer from others with blocks of the same name
    "comfy": ("t_block.1.bias", "blocks.0.cross_attn.kv_linear.bias"),
    "diffusers": ("adaln_single.linear.bias", "pos_embed.proj.bias", "caption_projection.linear_1.bias"),
}
_OUTPUT_BIAS = {"comfy": "blocks.{}.attn.proj.bias", "diffusers": "transformer_blocks.{}.attn1.to_out.0.bias"}
_SIZE = {"comfy": "csize_embedder.mlp.0.weight", "diffusers": "adaln_single.emb.resolution_embedder.linear_1.weight"}
_CAPTION = "y_embedder.y_embedding"  # the empty caption, one row per token; diffusers' files lack it


_ENDS = {
    "comfy": ("final_layer.linear.bias", "t_embedder.mlp.0.bias", "x_embedder.proj.bias", "y_embedder.y_proj.fc1.bias"),
    "diffusers": ("adaln_single.emb.timestep_embedder.linear_1.bias", "proj_out.bias", "scale_shift_table"),
}


class PixArtSigma(Backbone):
    name = "pixart_sigma"
    title = "PixArt-Σ"
    sites = ("self",)
    layer = "one attention"
    relatives = (
        (".attn.sr.", "a PixArt with its own key/value compression"),
        (".attn.q_norm.", "a PixArt variant with query/key norms"),
        (".attn1.norm_q.", "a PixArt variant with query/key norms (diffusers names)"),
    )
    ends = _ENDS
    real: ClassVar[Real] = Real(28, 1152, 16, prompt_tokens=300, attention_graph=24, block_graph=41)
    objective = Diffusion()
    transformer = "PixArtTransformer2DModel"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    parts = ("vae", "text_encoder", "tokenizer")
    conditions = (
        Condition(
            "prompt_embeds", "encoder_hidden_states", "prompt_embeds", "caption_channels", "y_embedder.y_proj.fc1"
        ),
        Condition("prompt_mask", "encoder_attention_mask", "prompt_attention_mask"),
    )
    limits: ClassVar[dict[str, tuple[str, int]]] = {"tokenizer": ("T5's 300 tokens", 300)}
    cleans = True
    comfy_arguments = ("x", "mask", "HW", "block_id")
    comfy_harmless = frozenset({"x", "HW", "block_id", "transformer_options"})
    sized: ClassVar[bool] = False
    """Whether the transformer is told the picture's size."""

    def match(self, shapes: Shapes) -> Base | None:
        for host, bias in _OUTPUT_BIAS.items():
            depth = count_blocks(shapes, bias)
            if depth and all(key in shapes for key in _MARKERS[host]) and (_SIZE[host] in shapes) == self.sized:
                dim = (*shapes[bias.format(0)], 0)[0]
                return Base(self, host, dim, (("self",),) * depth, doubt=self._doubt(shapes))
        return None

    def _doubt(self, shapes: Shapes) -> str:
        # ComfyUI makes up an empty caption of PixArt-α's 120 tokens where a file has none: only 300 tell anything.
        if self.sized or shapes.get(_CAPTION, ())[:1] == (self.real.prompt_tokens,):
            return ""
        return "a PixArt-α without size conditioning has the same tensors, and cannot be told from it"

    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        return attention_linears(self.diffusers_path(block, site), self.comfy_path(block))

    # diffusers

    def diffusers_path(self, block: int, site: str) -> str:
        return f"transformer_blocks.{block}.attn1"

    def model_options(self, blocks: int, side: int) -> dict[str, Any]:
        return {
            "num_layers": blocks,
            "sample_size": 128,
            "interpolation_scale": 2,
            "caption_channels": 4096,
            "use_additional_conditions": self.sized,
        }

    def call_arguments(
        self, latent: Tensor, timestep: Tensor, condition: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Any]:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            batch, _, height, width = latent.shape
            sizes["resolution"] = latent.new_tensor([[height * CELL, width * CELL]]).expand(batch, 2)
            sizes["aspect_ratio"] = latent.new_tensor([[height / width]]).expand(batch, 1)
        return {**super().call_arguments(latent, timestep, condition, device), "added_cond_kwargs": sizes}

    def encode(self, pipeline: Any, texts: list[str], device: torch.device, clean: bool = False) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device, clean_caption=clean
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}

    def draw_arguments(self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        # A negative prompt's default is a text, which may not come with embeddings; binning would change the size.
        own = {"negative_prompt": None, "use_resolution_binning": False}
        return {**super().draw_arguments(condition, negative), **own}

    # ComfyUI

    def comfy_path(self, block: int) -> str:
        return f"blocks.{block}.attn"

    def comfy_grid(self, height: int, width: int) -> Grid:
        grid = super().comfy_grid(height, width)
        if height + width <= 64:  # ComfyUI's position embedding divides by round(mean side / 64 latent pixels)
            raise EDiTModelError(
                f"{self.title} in ComfyUI cannot draw {width * CELL}x{height * CELL} pixels: the mean side must be "
                "over 256"
            )
        return grid

    def comfy_image_tokens(self, x: Tensor, *args: Any, **kwargs: Any) -> int:
        return x.shape[1]

    def comfy_forward(
        self, module: Any, sides: Mapping[str, SideAttention], call: HostCall, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        base = Projections(*module.qkv(x).chunk(3, dim=-1))  # 3 x (B, N, C)
        y = sides["self"](x, base, call.grid, module.num_heads, softmax=call.softmax)  # (B, N, C)
        return module.proj(y)


BACKBONE = PixArtSigma()
