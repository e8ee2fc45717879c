"""What a backbone's description has to say; one file beside this one per backbone, found by its presence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..attention import EDiTAttention, Grid
from ..processors import Processor

__all__ = ["Backbone", "Base", "HostCall", "Shapes", "count_blocks"]

Shapes = Mapping[str, tuple[int, ...]]
"""Names of a model's tensors and their shapes, without any prefix."""


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

    @property
    def depth(self) -> int:
        return len(self.sites)

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

    @abstractmethod
    def match(self, shapes: Shapes) -> Base | None:
        """The base that these tensors make up, or None where they are not of this backbone."""

    @abstractmethod
    def output_bias(self, base: Base, block: int) -> str:
        """Key, below the prefix, of the bias of a block's first replaced output projection; all formats share it."""

    # diffusers

    @abstractmethod
    def diffusers_attention(self, transformer: nn.Module, block: int, site: str) -> Any:
        """The diffusers `Attention` module of a site."""

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
        self, module: Any, sides: Mapping[str, EDiTAttention], call: HostCall, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """The replaced forward: the module's own, with `sides` in place of its softmax attentions."""


def count_blocks(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern.format(0)`, `pattern.format(1)`, ... there are, up to the first that is missing."""
    depth = 0
    while pattern.format(depth) in shapes:
        depth += 1
    return depth
