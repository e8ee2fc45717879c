"""EDiT as diffusers attention processors; plain PyTorch, since a processor needs nothing of diffusers itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention import EDiTAttention, Grid, Projections

__all__ = ["JointProcessor", "Processor", "SelfProcessor"]


class Processor(nn.Module):
    """What the processors share: the side weights, the grid of the running call, and the way back to softmax.

    Args:
        side: the site's side weights. As a submodule they move and are cast with the transformer.
        dense: the processor that was there before.
        current_grid: gives the running call's token grid.
        stay_dense: is told why a call could not be linear.
    """

    def __init__(
        self,
        side: EDiTAttention,
        dense: Any,
        current_grid: Callable[[], Grid | None],
        stay_dense: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.side = side
        self.original = (dense,)  # in a tuple, so that it is no submodule of ours
        self.current_grid = current_grid
        self.stay_dense = stay_dense

    def grid_for(self, x: Tensor, attention_mask: Tensor | None) -> Grid | None:
        """The grid if this call can be linear, else None, the reason having been told."""
        grid = self.current_grid()
        if grid is None:
            self.stay_dense("an attention was called from outside its transformer")
        elif attention_mask is not None:
            self.stay_dense("an attention mask on image tokens, which linear attention cannot honour")
        elif x.shape[1] != grid[0] * grid[1]:
            self.stay_dense(f"{x.shape[1]} tokens do not fill the {grid[0]}x{grid[1]} grid of the latent")
        else:
            return grid
        return None


class SelfProcessor(Processor):
    """EDiT in place of an image-only self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        grid = self.grid_for(hidden_states, attention_mask)
        if grid is None:
            return self.original[0](attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        y = self.side(
            hidden_states, _projections(attn, hidden_states), grid, attn.heads, attn.norm_q, attn.norm_k
        )  # (B, N, C)
        return attn.to_out[1](attn.to_out[0](y))


class JointProcessor(Processor):
    """MM-EDiT in place of a joint attention of image and prompt."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        grid = self.grid_for(hidden_states, attention_mask)
        if grid is None:
            return self.original[0](attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        q = attn.add_q_proj(encoder_hidden_states)  # (B, P, C)
        k = attn.add_k_proj(encoder_hidden_states)  # (B, P, C)
        v = attn.add_v_proj(encoder_hidden_states)  # (B, P, C)
        prompt = Projections(_normed(q, attn, attn.norm_added_q), _normed(k, attn, attn.norm_added_k), v)
        y_image, y_prompt = self.side(
            hidden_states,
            _projections(attn, hidden_states),
            prompt,
            grid,
            attn.heads,
            attn.norm_q,
            attn.norm_k,
            prompt_rows=not attn.context_pre_only,
        )  # (B, N, C), (B, P, C) or None
        # The last block's caller drops the prompt rows, so what stands there does not matter.
        prompt_out = encoder_hidden_states if y_prompt is None else attn.to_add_out(y_prompt)
        return attn.to_out[1](attn.to_out[0](y_image)), prompt_out


def _projections(attn: Any, x: Tensor) -> Projections:
    if attn.fused_projections:
        return Projections(*attn.to_qkv(x).chunk(3, dim=-1))
    return Projections(attn.to_q(x), attn.to_k(x), attn.to_v(x))


def _normed(tokens: Tensor, attn: Any, norm: nn.Module | None) -> Tensor:
    return tokens if norm is None else norm(tokens.unflatten(-1, (attn.heads, -1))).flatten(2)
