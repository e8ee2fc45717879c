"""Stable Diffusion 3.5-Medium (MMDiT-X): joint attention of image and prompt, plus an image-only `attn2` in some."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import Grid, Projections, SideAttention
from ..objective import Flow
from .base import CELL, Backbone, Base, BaseLinear, Condition, HostCall, Real, Shapes, attention_linears, count_blocks

_OUTPUT_BIAS = {
    "comfy": "joint_blocks.{}.x_block.attn.proj.bias",
    "diffusers": "transformer_blocks.{}.attn.to_out.0.bias",
}
_SECOND_BIAS = {
    "comfy": "joint_blocks.{}.x_block.attn2.proj.bias",
    "diffusers": "transformer_blocks.{}.attn2.to_out.0.bias",
}
_PROMPT_BIAS = {
    "comfy": "joint_blocks.{}.context_block.attn.qkv.bias",
    "diffusers": "transformer_blocks.{}.attn.add_k_proj.bias",
}
_PROMPT_OUTPUT_BIAS = {
    "comfy": "joint_blocks.{}.context_block.attn.proj.bias",
    "diffusers": "transformer_blocks.{}.attn.to_add_out.bias",
}
_MARKERS = {  # tensors that, with the blocks, tell Stable Diffusion 3 from others with blocks of the same name
    "comfy": (),
    "diffusers": ("pos_embed.proj.bias", "context_embedder.bias"),
}
_ENDS = {
    "comfy": (
        "context_embedder.bias", "final_layer.linear.bias", "t_embedder.mlp.0.bias", "x_embedder.proj.bias",
        "y_embedder.mlp.0.bias",
    ),
    "diffusers": ("norm_out.linear.bias", "proj_out.bias", "time_text_embed.timestep_embedder.linear_1.bias"),
}  # fmt: skip
_PROMPT_LINEARS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_PROMPT_ROWS = ("add_q_proj", "to_add_out")  # what only the attention's prompt rows go through


class SD35Medium(Backbone):
    name = "sd35_medium"
    title = "Stable Diffusion 3.5-Medium"
    sites: ClassVar[tuple[str, ...]] = ("joint", "self")
    layer: ClassVar[str] = "joint attention and attn2 of one block"
    relatives = (("controlnet_blocks.", "a ControlNet of Stable Diffusion 3"),)
    ends = _ENDS
    real: ClassVar[Real] = Real(
        24, 1536, 24, prompt_tokens=77 + 256, attention_graph=44, block_graph=74, like_most=2
    )  # CLIP's tokens and T5's; the last block emits no prompt rows
    objective = Flow(shift=3.0)
    transformer = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    conditions = (
        Condition("prompt_embeds", "encoder_hidden_states", "prompt_embeds", "joint_attention_dim", "context_embedder"),
        Condition(
            "pooled", "pooled_projections", "pooled_prompt_embeds", "pooled_projection_dim", "y_embedder.mlp.0", False
        ),
    )
    limits: ClassVar[dict[str, tuple[str, int]]] = {
        "tokenizer": ("CLIP's 77 tokens", 77),
        "tokenizer_2": ("CLIP's 77 tokens", 77),
        "tokenizer_3": ("T5's 256 tokens", 256),
    }
    comfy_arguments = ("context", "x", "c")
    comfy_harmless = frozenset({"context", "x", "c", "use_checkpoint", "transformer_options"})
    dual: ClassVar[int] = 13
    """How many of the real model's blocks, which are the first ones, have an `attn2`."""

    def match(self, shapes: Shapes) -> Base | None:
        for host, bias in _OUTPUT_BIAS.items():
            depth = count_blocks(shapes, bias)
            second = [_SECOND_BIAS[host].format(block) in shapes for block in range(depth)]
            markers = (_PROMPT_BIAS[host].format(0), *_MARKERS[host])
            if not depth or any(second) != bool(self.dual) or not all(key in shapes for key in markers):
                continue
            sites = tuple(("joint", "self") if both else ("joint",) for both in second)
            # A block that emits no prompt tokens (the last) has no output projection for them, and its prompt
            # queries, though there, lead nowhere.
            ends = [block for block in range(depth) if _PROMPT_OUTPUT_BIAS[host].format(block) not in shapes]
            idle = {f"transformer_blocks.{block}.attn.{name}" for block in ends for name in _PROMPT_ROWS}
            return Base(self, host, (*shapes[bias.format(0)], 0)[0], sites, idle=frozenset(idle))
        return None

    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        path, comfy = self.diffusers_path(block, site), self.comfy_path(block)
        if site == "self":
            return attention_linears(path, f"{comfy}.x_block.attn2")
        prompt = attention_linears(path, f"{comfy}.context_block.attn", _PROMPT_LINEARS)
        return attention_linears(path, f"{comfy}.x_block.attn") + prompt

    def largest_side(self, transformer: Any) -> int | None:
        """Its table of positions has an end, in ComfyUI's model as in diffusers'; without a table there is none."""
        most = getattr(getattr(transformer, "config", transformer), "pos_embed_max_size", None)
        return None if most is None else self.token * int(most)

    # diffusers

    def diffusers_path(self, block: int, site: str) -> str:
        return f"transformer_blocks.{block}.{'attn' if site == 'joint' else 'attn2'}"

    def model_options(self, blocks: int, side: int) -> dict[str, Any]:
        return {
            "num_layers": blocks,
            "num_attention_heads": self.real.heads,
            "caption_projection_dim": self.real.channels,
            "sample_size": 128,
            "pos_embed_max_size": side // self.token,
            # as many of the blocks have attn2 as in the real model
            "dual_attention_layers": tuple(range(round(blocks * self.dual / self.real.blocks))),
            "qk_norm": "rms_norm",
        }

    def encode(self, pipeline: Any, texts: list[str], device: torch.device, clean: bool = False) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, device=device
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    # ComfyUI

    def comfy_path(self, block: int) -> str:
        return f"joint_blocks.{block}"

    def comfy_grid(self, height: int, width: int) -> Grid:
        # Odd latents are padded, and the output cropped.
        return self.check_size((height + height % 2) * CELL, (width + width % 2) * CELL)

    def comfy_image_tokens(self, context: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> int:
        return x.shape[1]

    def comfy_forward(
        self,
        module: Any,
        sides: Mapping[str, SideAttention],
        call: HostCall,
        context: Tensor,
        x: Tensor,
        c: Tensor,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        prompt_block, image_block = module.context_block, module.x_block
        heads = image_block.attn.num_heads
        softmax = partial(_comfy_softmax, call.softmax, transformer_options)

        (q_p, k_p, v_p), prompt_rest = prompt_block.pre_attention(context, c)  # qk-norm done; v is (B, P, h, d)
        chunks = 9 if "self" in sides else 6
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = image_block.adaLN_modulation(c).chunk(chunks, 1)
        normed = image_block.norm1(x)  # (B, N, C)

        modulated = _modulate(normed, shift, scale)  # (B, N, C)
        y_image, y_prompt = sides["joint"](
            modulated,
            _projections(image_block.attn, modulated),
            Projections(q_p, k_p, v_p.flatten(2)),
            call.grid,
            heads,
            image_block.attn.ln_q,
            image_block.attn.ln_k,
            softmax,
            prompt_rows=not prompt_block.pre_only,
        )  # (B, N, C), (B, P, C)
        context_out = prompt_block.post_attention(y_prompt, *prompt_rest) if y_prompt is not None else None
        if not second:
            return context_out, image_block.post_attention(y_image, x, gate, shift_mlp, scale_mlp, gate_mlp)

        shift2, scale2, gate2 = second
        modulated2 = _modulate(normed, shift2, scale2)  # (B, N, C)
        attn2 = image_block.attn2
        y_self = sides["self"](
            modulated2, _projections(attn2, modulated2), call.grid, heads, attn2.ln_q, attn2.ln_k, softmax
        )  # (B, N, C)
        rest = (x, gate, shift_mlp, scale_mlp, gate_mlp, gate2)
        return context_out, image_block.post_attention_x(y_image, y_self, *rest)


def _projections(attn: Any, x: Tensor) -> Projections:
    return Projections(*attn.qkv(x).chunk(3, dim=-1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _comfy_softmax(attention: Any, options: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    # With the options ComfyUI's own attention overrides (its ModelAttentionBackend node, other packs) reach us too.
    return attention(q, k, v, heads=heads, transformer_options=options)


BACKBONE = SD35Medium()
