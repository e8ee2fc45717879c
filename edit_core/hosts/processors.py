"""EDiT as diffusers attention processors; plain PyTorch, since a processor needs nothing of diffusers itself."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..attention import Grid, Projections, SideAttention

__all__ = ["Host", "JointProcessor", "Processor", "SelfProcessor", "Tap"]


class Tap(Protocol):
    """Stands in for a replaced attention's call: may run the original, EDiT, or both, and says what comes out."""

    def __call__(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any: ...


class Host(Protocol):
    """What processors ask of whoever applied them."""

    grid: Grid | None
    """The running call's token grid."""
    tap: Tap | None
    min_tokens: int
    """Pictures of fewer image tokens keep the original attention."""

    def stay_dense(self, reason: str) -> None:
        """Is told why a call could not be linear."""


class Processor(nn.Module):
    """What the processors share: the side weights, the grid of the running call, and the way back to softmax.

    Args:
        key: `<block>.<site>`, as in weights files.
        side: the site's side weights. As a submodule they move and are cast with the transformer.
        original: the processor that was there before. Where it has weights, it is a submodule as it was before.
        host: gives the running call's grid and tap.
        differences: what to add to the outputs of the attention's own linears, by the linear's name, if anything. The
            linears stay as they are, so the original processor computes what it always did.
    """

    def __init__(self, key: str, side: SideAttention, original: Any, host: Host, differences: nn.ModuleDict) -> None:
        super().__init__()
        self.key = key
        self.side = side
        self.differences = differences
        self.original = original
        self.sees_pictures = "ip_hidden_states" in inspect.signature(original.__call__).parameters
        self.host = host

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Of all that a pipeline hands to processors, diffusers passes on what their signatures name.
        if self.sees_pictures:
            kwargs.update(ip_hidden_states=ip_hidden_states, temb=temb)
        grid = self._grid(hidden_states, attention_mask, ip_hidden_states)
        if grid is not None and self.host.tap is None:
            return self.edit(attn, hidden_states, encoder_hidden_states, grid)
        dense = partial(self.original, attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if grid is None or self.host.tap is None:
            return dense()
        return self.host.tap(self.key, dense, partial(self.edit, attn, hidden_states, encoder_hidden_states, grid))

    @abstractmethod
    def edit(self, attn: Any, x: Tensor, prompt: Any, grid: Grid) -> Any:
        """The replaced attention, output projection included."""

    def changed(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """A linear's output `y` for `x`, with the linear's difference if it has one; all `(B, N, C)`."""
        return y + self.differences[name](x) if name in self.differences else y

    def projections(self, attn: Any, x: Tensor) -> Projections:
        """The base's `q, k, v` of image tokens `(B, N, C)`."""
        q, k, v = attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        return Projections(self.changed("to_q", x, q), self.changed("to_k", x, k), self.changed("to_v", x, v))

    def output(self, attn: Any, y: Tensor) -> Tensor:
        """The base's output projection of image tokens `(B, N, C)`."""
        return attn.to_out[1](self.changed("to_out", y, attn.to_out[0](y)))

    def _grid(self, x: Tensor, attention_mask: Tensor | None, pictures: Tensor | None) -> Grid | None:
        """The grid if this call can be linear, else None, the reason having been told."""
        grid = self.host.grid
        if grid is None:
            self.host.stay_dense("an attention was called from outside its transformer")
        elif attention_mask is not None:
            self.host.stay_dense("an attention mask on image tokens, which linear attention cannot honour")
        elif pictures is not None and self.sees_pictures:
            self.host.stay_dense("an IP-Adapter's picture, which the attention that was there before EDiT sees")
        elif x.shape[1] != grid[0] * grid[1]:
            self.host.stay_dense(f"{x.shape[1]} tokens do not fill the {grid[0]}x{grid[1]} grid of the latent")
        elif x.shape[1] < self.host.min_tokens:
            self.host.stay_dense(f"{x.shape[1]} tokens are fewer than min_tokens={self.host.min_tokens}")
        else:
            return grid
        return None


class SelfProcessor(Processor):
    """EDiT in place of an image-only self-attention: `(B, N, C)` -> `(B, N, C)`."""

    def edit(self, attn: Any, x: Tensor, prompt: Any, grid: Grid) -> Tensor:
        y = self.side(x, self.projections(attn, x), grid, attn.heads, attn.norm_q, attn.norm_k)  # (B, N, C)
        return self.output(attn, y)


class JointProcessor(Processor):
    """MM-EDiT in place of a joint attention: image `(B, N, C)`, prompt `(B, P, C)` -> the same two."""

    def edit(self, attn: Any, x: Tensor, prompt: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        q_p = self.changed("add_q_proj", prompt, attn.add_q_proj(prompt))  # (B, P, C)
        k_p = self.changed("add_k_proj", prompt, attn.add_k_proj(prompt))  # (B, P, C)
        v_p = self.changed("add_v_proj", prompt, attn.add_v_proj(prompt))  # (B, P, C)
        y_image, y_prompt = self.side(
            x,
            self.projections(attn, x),
            Projections(_normed(q_p, attn, attn.norm_added_q), _normed(k_p, attn, attn.norm_added_k), v_p),
            grid,
            attn.heads,
            attn.norm_q,
            attn.norm_k,
            prompt_rows=not attn.context_pre_only,
        )  # (B, N, C), (B, P, C) or None
        # The last block's caller drops the prompt rows.
        prompt_out = None if y_prompt is None else self.changed("to_add_out", y_prompt, attn.to_add_out(y_prompt))
        return self.output(attn, y_image), prompt_out


def _normed(tokens: Tensor, attn: Any, norm: nn.Module | None) -> Tensor:
    return tokens if norm is None else norm(tokens.unflatten(-1, (attn.heads, -1))).flatten(2)
