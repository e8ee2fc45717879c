"""The attentions of a block that EDiT replaces, between a base's projections: what a host calls.

A base model keeps its own linears: it hands in its projections `q, k, v` and gets back what goes into its output
projection. All tokens are `(B, N, C)`; the specifications are in :mod:`edit_core.attention.naive`, and what is computed
is the config's choice (:mod:`.forms`, :mod:`.queries`, :mod:`.keys`, :mod:`.joint`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .call import Grid, Image, Norm, Projections, Softmax, softmax_attention
from .form import StudentForm
from .forms import KERNELS
from .modules import LayerFactory

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["SITES", "EDiTAttention", "HybridAttention", "SideAttention"]


class SideAttention(nn.Module):
    """One replaced attention of either kind: its side weights, and the form that says what they are for.

    Args:
        dim: channels `C` of the base.
        config: the student's choices.
        layers: where the layers come from.
    """

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.form = KERNELS[config.kernel](config)
        for name, part in config.parts.items():
            self.add_module(name, part.make(dim, config, layers, device, dtype))

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A new student's tensors, float32, by their names in the state dict, of which only the shapes matter."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found: dict[str, Tensor] = {}
        for name, part in self.config.parts.items():
            own = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
            tensors = part.initial(own, self.config, generator)
            found.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
        return found

    def features(
        self, x: Tensor, base: Projections, grid: Grid, heads: int, norm_q: Norm | None, norm_k: Norm | None
    ) -> Projections:
        """Queries `(B, N, C)`, keys and values `(B, M, C)`, normed but not yet rectified; `M` is `N` uncompressed.

        Raises:
            TypeError: the form has no queries and keys of its own.
        """
        if not isinstance(self.form, StudentForm):
            raise TypeError(f"kernel={self.config.kernel} has no queries and keys of its own")
        return self.form.features(self, Image(x, base, grid, heads, norm_q, norm_k, softmax_attention))


class EDiTAttention(SideAttention):
    """EDiT for one self-attention: the side weights and the function."""

    def forward(
        self,
        x: Tensor,
        base: Projections,
        grid: Grid,
        heads: int,
        norm_q: Norm | None = None,
        norm_k: Norm | None = None,
        softmax: Softmax = softmax_attention,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of the image tokens to themselves, before the output projection.

        Args:
            x: the tokens that the projections were made from, `(B, N, C)`.
            base: the base's `q, k, v`, each `(B, N, C)`, before any qk-norm.
            grid: `(H, W)` with `H·W = N`.
            heads: number of heads `h`.
            norm_q: the base's query norm over `(B, N, h, d)`, or None.
            norm_k: the base's key norm, or None.
            softmax: the host's attention function, for forms that have one.
            mask: as `scaled_dot_product_attention` takes it, to `(B, h, N, N)`, for forms that keep masks.

        Returns:
            `(B, N, C)`.
        """
        return self.form.self_rows(self, Image(x, base, grid, heads, norm_q, norm_k, softmax, mask))


class HybridAttention(SideAttention):
    """MM-EDiT for one joint attention of image and prompt tokens: the side weights and the function."""

    def forward(
        self,
        x: Tensor,
        base: Projections,
        prompt: Projections,
        grid: Grid,
        heads: int,
        norm_q: Norm | None = None,
        norm_k: Norm | None = None,
        softmax: Softmax = softmax_attention,
        prompt_rows: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Joint attention of image and prompt tokens, before the output projections.

        Args:
            x: the image tokens that `base` was made from, `(B, N, C)`.
            base: the base's image projections, each `(B, N, C)`, before any qk-norm.
            prompt: the base's prompt projections, each `(B, P, C)`, after their own qk-norm.
            grid: `(H, W)` with `H·W = N`.
            heads: number of heads `h`.
            norm_q: the base's norm of image queries over `(B, N, h, d)`, or None.
            norm_k: the base's norm of image keys, or None.
            softmax: the host's attention function.
            prompt_rows: False for a block that emits no prompt tokens.

        Returns:
            image rows `(B, N, C)`, and prompt rows `(B, P, C)` or None.
        """
        image = Image(x, base, grid, heads, norm_q, norm_k, softmax)
        return self.form.joint_rows(self, image, prompt, prompt_rows)


SITES: dict[str, type[SideAttention]] = {"self": EDiTAttention, "joint": HybridAttention}
"""The kinds of attention that a block can hold, by the name that weights files use."""
