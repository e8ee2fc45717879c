"""What a backbone's description has to say; one file beside this one per backbone, found by its presence."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..attention import Grid, SideAttention
from ..hosts.processors import Processor

__all__ = ["Backbone", "Base", "BaseLinear", "HostCall", "Shapes", "attention_linears", "count_blocks"]

_BLOCK = re.compile(r"transformer_blocks\.(\d{1,6})\.")

Shapes = Mapping[str, tuple[int, ...]]
"""Names of a model's tensors and their shapes, without any prefix."""


class BaseLinear(NamedTuple):
    """One of a replaced attention's own linears, `C -> C` with a bias, and where each host keeps it."""

    name: str
    """As processors call it: `to_q`, `to_k`, `to_v`, `to_out`; for the prompt `add_q_proj`, ... and `to_add_out`."""
    diffusers: str
    """Path of the module in a diffusers transformer."""
    comfy: str
    """Path of the module below ComfyUI's `diffusion_model`; a fused one holds three linears."""
    third: int | None
    """Which third of a fused module's rows it is; None where it is all of them."""


def attention_linears(
    diffusers: str, comfy: str, names: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
) -> tuple[BaseLinear, ...]:
    """The linears of an attention that ComfyUI keeps as `qkv` and `proj`.

    Args:
        diffusers: path of the diffusers `Attention`.
        comfy: path of ComfyUI's module that holds `qkv` and `proj`.
        names: of the query, key, value and output projections in diffusers.
    """
    places = (("qkv", 0), ("qkv", 1), ("qkv", 2), ("proj", None))
    return tuple(
        BaseLinear(name.removesuffix(".0"), f"{diffusers}.{name}", f"{comfy}.{layer}", third)
        for name, (layer, third) in zip(names, places, strict=True)
    )


@dataclass(frozen=True)
class Base:
    """One base transformer, as read off the names and shapes of its tensors."""

    backbone: Backbone
    host: str
    """Whose names the tensors bear: `comfy` (which are the original ones) or `diffusers`."""
    dim: int
    """Channels `C`."""
    sites: tuple[tuple[str, ...], ...]
    """Per block, the sites (`self`, `joint`) whose attention EDiT replaces."""
    prefix: str = ""
    """What a checkpoint puts before the names of the transformer's tensors."""
    idle: frozenset[str] = frozenset()
    """Diffusers paths of the backbone's linears that this base lacks, or whose output nothing in it uses."""

    @property
    def depth(self) -> int:
        return len(self.sites)

    def linears(self, block: int) -> tuple[BaseLinear, ...]:
        """The linears of a block's replaced attentions, without the idle ones."""
        found = (linear for site in self.sites[block] for linear in self.backbone.linears(block, site))
        return tuple(linear for linear in found if linear.diffusers not in self.idle)

    def place(self, linear: BaseLinear) -> tuple[str, slice]:
        """Where this base keeps a linear: the path of a module, prefix included, and rows of its weight and bias."""
        if self.host == "diffusers":
            return self.prefix + linear.diffusers, slice(0, self.dim)
        start = (linear.third or 0) * self.dim
        return self.prefix + linear.comfy, slice(start, start + self.dim)

    def __str__(self) -> str:
        return f"{self.backbone.title} ({self.depth} blocks, {self.dim} channels, {self.host} names)"


class HostCall(NamedTuple):
    """What a replaced ComfyUI forward has to know of the call it is part of."""

    grid: Grid
    softmax: Callable[..., Tensor]
    """ComfyUI's `optimized_attention`."""


class Backbone(ABC):
    """The description of one kind of diffusion transformer, for both hosts."""

    name: ClassVar[str]
    """As in a weights file's metadata."""
    title: ClassVar[str]
    """As people call it."""
    sites: ClassVar[tuple[str, ...]]
    """The sites that a block can have."""

    @abstractmethod
    def match(self, shapes: Shapes) -> Base | None:
        """The base that these tensors make up, or None where they are not of this backbone."""

    @abstractmethod
    def output_bias(self, base: Base, block: int) -> str:
        """Key, below the prefix, of the bias of a block's first replaced output projection; all formats share it."""

    @abstractmethod
    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        """The linears that a site can have; see :meth:`Base.linears` for those that a base does have."""

    def site_of(self, path: str) -> tuple[int, str] | None:
        """The block and the site whose linear has this diffusers path; None where there is none."""
        if match := _BLOCK.match(path):
            block = int(match[1])
            for site in self.sites:
                if any(linear.diffusers == path for linear in self.linears(block, site)):
                    return block, site
        return None

    # diffusers

    @abstractmethod
    def diffusers_path(self, block: int, site: str) -> str:
        """Path of a site's `Attention` in a diffusers transformer."""

    @abstractmethod
    def diffusers_processor(self, site: str) -> type[Processor]:
        """The attention processor class that runs a site's side weights."""

    # ComfyUI

    @abstractmethod
    def comfy_path(self, block: int) -> str:
        """Path, below ComfyUI's `diffusion_model`, of the module whose forward is replaced."""

    @abstractmethod
    def comfy_grid(self, height: int, width: int) -> Grid:
        """Token grid of a latent of this size.

        Raises:
            EDiTModelError: the backbone cannot draw this size.
        """

    @abstractmethod
    def comfy_image_tokens(self, *args: Any, **kwargs: Any) -> int:
        """Number of image tokens in the arguments of the replaced forward."""

    @abstractmethod
    def comfy_forward(
        self, module: Any, sides: Mapping[str, SideAttention], call: HostCall, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """The replaced forward: the module's own, with `sides` in place of its softmax attentions."""


def count_blocks(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern.format(0)`, `pattern.format(1)`, ... there are, up to the first that is missing."""
    depth = 0
    while pattern.format(depth) in shapes:
        depth += 1
    return depth
