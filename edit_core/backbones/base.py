"""What a backbone's description has to say; one file beside this one per backbone, found by its presence."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..attention import Grid, SideAttention
from ..errors import EDiTModelError
from ..objective import Objective

__all__ = [
    "CELL",
    "Backbone",
    "Base",
    "BaseLinear",
    "Condition",
    "HostCall",
    "Real",
    "Shapes",
    "attention_linears",
    "count_blocks",
]

CELL = 8
"""Pixels per side of a latent cell, for every backbone."""

_BLOCK = re.compile(r"transformer_blocks\.(\d{1,6})\.")

Shapes = Mapping[str, tuple[int, ...]]
"""Names of a model's tensors and their shapes, without any prefix."""


class Real(NamedTuple):
    """A published model's dimensions, for what does not depend on weights: speed, memory, random inputs."""

    blocks: int
    channels: int
    heads: int
    prompt_tokens: int
    """Text tokens of a whole prompt."""
    attention_graph: int
    """Bytes that autograd keeps of one attention's graph, per image token and channel: in bfloat16 at 1024 tokens with
    a whole prompt, counted by `saved_tensors_hooks`."""
    block_graph: int
    """The same of one block's graph."""
    like_most: int = 1
    """As many blocks as it takes for the first one to be like most."""


class Condition(NamedTuple):
    """One of the tensors that a prompt becomes, and what everybody calls it."""

    name: str
    """In caches."""
    transformer: str
    """As an argument of the diffusers transformer."""
    pipeline: str
    """As an argument of the diffusers pipeline; with `negative_` before it for the negative prompt."""
    width: str = ""
    """The field of the diffusers transformer's configuration that says how wide it is; empty for a mask."""
    comfy: str = ""
    """Path, below ComfyUI's `diffusion_model`, of the linear that takes it; empty for a mask."""
    per_token: bool = True
    """Whether it is `(B, T, ...)`, and not `(B, ...)`."""


class BaseLinear(NamedTuple):
    """One of a replaced attention's own linears, and where each host keeps it."""

    name: str
    """As processors call it: `to_q`, `to_k`, `to_v`, `to_out`; for the prompt `add_q_proj`, ... and `to_add_out`."""
    diffusers: str
    """Path of the module in a diffusers transformer."""
    comfy: str
    """Path of the module below ComfyUI's `diffusion_model`; a fused one holds several linears."""
    fused: tuple[str, ...] = ()
    """Names of the linears whose rows a fused module holds, in that order; empty where it is this one alone."""
    bias: bool = True

    @property
    def part(self) -> int | None:
        """Which of a fused module's linears it is; None where it is all of it."""
        return self.fused.index(self.name) if self.fused else None


def attention_linears(
    diffusers: str, comfy: str, names: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
) -> tuple[BaseLinear, ...]:
    """The linears of an attention that ComfyUI keeps as `qkv` and `proj`, all with biases.

    Args:
        diffusers: path of the diffusers `Attention`.
        comfy: path of ComfyUI's module that holds `qkv` and `proj`.
        names: of the query, key, value and output projections in diffusers.
    """
    *inputs, output = names
    return (
        *(BaseLinear(name, f"{diffusers}.{name}", f"{comfy}.qkv", tuple(inputs)) for name in inputs),
        BaseLinear(output.removesuffix(".0"), f"{diffusers}.{output}", f"{comfy}.proj"),
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
    renamed: bool = False
    """Whether the file's own names are others than the plain ones, prefix included."""
    idle: frozenset[str] = frozenset()
    """Diffusers paths of the backbone's linears that this base lacks, or whose output nothing in it uses."""
    doubt: str = ""
    """What else these tensors may be, where they cannot tell."""

    @property
    def depth(self) -> int:
        return len(self.sites)

    def linears(self, block: int) -> tuple[BaseLinear, ...]:
        """The linears of a block's replaced attentions, without the idle ones."""
        found = (linear for site in self.sites[block] for linear in self.backbone.linears(block, site))
        return tuple(linear for linear in found if linear.diffusers not in self.idle)

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of the weight of the linear that processors call so."""
        return self.backbone.linear_shape(self, name)

    def place(self, linear: BaseLinear) -> tuple[str, slice]:
        """Where this base keeps a linear: the path of a module, prefix included, and rows of its weight and bias."""
        rows, _ = self.shape(linear.name)
        if self.host == "diffusers":
            return self.prefix + linear.diffusers, slice(0, rows)
        start = sum(self.shape(name)[0] for name in linear.fused[: linear.part or 0])
        return self.prefix + linear.comfy, slice(start, start + rows)

    def output(self, block: int) -> BaseLinear:
        """The output projection of a block's first replaced attention; every base has it in every block."""
        return next(linear for linear in self.linears(block) if linear.name == "to_out")

    def sampled(self, block: int) -> str:
        """Key, prefix included, of the tensor by whose values a block is known: its output projection's bias, which
        quantised files leave as it is, or the weight where there is no bias."""
        linear = self.output(block)
        return f"{self.place(linear)[0]}.{'bias' if linear.bias else 'weight'}"

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
    layer: ClassVar[str]
    """What the sites of one block are, for people."""
    relatives: ClassVar[tuple[tuple[str, str], ...]] = ()
    """What has all of its tensors and is not it: a part of a key that only the relative has, and what that is."""
    ends: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By host, tensors before and behind the blocks that every whole model has, the first and last of a file's parts
    among them."""
    real: ClassVar[Real]
    objective: ClassVar[Objective]
    token: ClassVar[int] = 2 * CELL
    """Pixels per side of an image token; a picture's sides are multiples of it."""
    transformer: ClassVar[str]
    """Its class in diffusers."""
    pipelines: ClassVar[tuple[str, ...]]
    """The diffusers classes that draw with it; the first is its own."""
    parts: ClassVar[tuple[str, ...]]
    """What a pipeline has beside transformer and scheduler to make latents and embeddings with."""
    conditions: ClassVar[tuple[Condition, ...]]
    """What a prompt becomes; `prompt_embeds` is the first."""
    limits: ClassVar[Mapping[str, tuple[str, int]]] = {}
    """Of a pipeline's tokenizers, what people call their limit, and how many tokens of a text are read, those of its
    begin and end included."""
    cleans: ClassVar[bool] = False
    """Whether its pipelines clean captions before they draw, where they can."""
    comfy_arguments: ClassVar[tuple[str, ...]] = ("x",)
    """The positional arguments of the forward that is replaced in ComfyUI."""
    comfy_harmless: ClassVar[frozenset[str]] = frozenset({"x", "transformer_options"})
    """What that forward may be given without attention being another."""

    # what its tensors are

    @abstractmethod
    def match(self, shapes: Shapes) -> Base | None:
        """The base that these tensors make up, or None where they are not of this backbone.

        No two backbones may claim the same tensors.
        """

    @abstractmethod
    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        """The linears that a site can have; see :meth:`Base.linears` for those that a base does have."""

    def linear_shape(self, base: Base, name: str) -> tuple[int, int]:
        """Rows and columns of a linear's weight; `C x C` unless the backbone says otherwise."""
        return base.dim, base.dim

    def site_of(self, path: str) -> tuple[int, str] | None:
        """The block and the site whose linear has this diffusers path; None where there is none."""
        if match := _BLOCK.match(path):
            block = int(match[1])
            for site in self.sites:
                if any(linear.diffusers == path for linear in self.linears(block, site)):
                    return block, site
        return None

    # sizes

    def check_size(self, height: int, width: int, transformer: Any = None) -> Grid:
        """Token grid of a picture of so many pixels.

        Args:
            height: in pixels.
            width: in pixels.
            transformer: of either host, whose own limit counts too.

        Raises:
            EDiTModelError: it cannot draw this size.
        """
        if min(height, width) < self.token or height % self.token or width % self.token:
            raise EDiTModelError(
                f"{self.title} cannot draw {width}x{height} pixels: both sides must be multiples of {self.token}"
            )
        most = None if transformer is None else self.largest_side(transformer)
        if most is not None and max(height, width) > most:
            raise EDiTModelError(
                f"this {self.title} draws at most {most} pixels per side, and cannot draw {width}x{height}"
            )
        return height // self.token, width // self.token

    def largest_side(self, transformer: Any) -> int | None:
        """Pixels per side of the largest picture that a host's transformer draws; None where there is no limit."""
        return None

    # diffusers

    @abstractmethod
    def diffusers_path(self, block: int, site: str) -> str:
        """Path of a site's `Attention` in a diffusers transformer."""

    @abstractmethod
    def model_options(self, blocks: int, side: int) -> dict[str, Any]:
        """What the real model is made of in diffusers, but of so many blocks, for pictures of up to `side` pixels."""

    def call_arguments(
        self, latent: Tensor, timestep: Tensor, condition: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Any]:
        """Keyword arguments of the diffusers transformer for a batch.

        Args:
            latent: `(B, c, h, w)`, noised.
            timestep: `(B,)`.
            condition: by the names in `conditions`; without a mask, all tokens are attended to.
            device: where the transformer is.
        """
        arguments: dict[str, Any] = {"hidden_states": latent, "timestep": timestep, "return_dict": False}
        for each in self.conditions:
            if each.name in condition:
                value = condition[each.name]
                dtype = latent.dtype if value.is_floating_point() else value.dtype
                arguments[each.transformer] = value.to(device, dtype)
        return arguments

    @abstractmethod
    def encode(self, pipeline: Any, texts: list[str], device: torch.device, clean: bool = False) -> dict[str, Tensor]:
        """A pipeline's embeddings of texts, cleaned or not, by the names in `conditions`; as many tokens for every
        text."""

    def make_pipeline(self, transformer: Any, scheduler: Any, vae: Any) -> Any:
        """A pipeline without text encoders, for embeddings."""
        import diffusers

        parts = {**dict.fromkeys(self.parts), "transformer": transformer, "scheduler": scheduler, "vae": vae}
        return getattr(diffusers, self.pipelines[0])(**parts)

    def draw_arguments(self, condition: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the pipeline's call is told of a prompt and a negative prompt, both by the names in `conditions`."""
        arguments: dict[str, Any] = {}
        for each in self.conditions:
            arguments[each.pipeline] = condition[each.name]
            arguments[f"negative_{each.pipeline}"] = negative[each.name]
        return arguments

    def random_condition(
        self, width_of: Callable[[Condition], int], normal: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        """A whole prompt of noise, without a mask.

        Args:
            width_of: how wide a host's model takes a condition.
            normal: draws a tensor, given its sizes but the batch's.
        """
        tokens = self.real.prompt_tokens
        return {
            each.name: normal(*([tokens] if each.per_token else []), width_of(each))
            for each in self.conditions
            if each.width
        }

    # ComfyUI

    @abstractmethod
    def comfy_path(self, block: int) -> str:
        """Path, below ComfyUI's `diffusion_model`, of the module whose forward is replaced."""

    def comfy_grid(self, height: int, width: int) -> Grid:
        """Token grid of a latent of this size.

        Raises:
            EDiTModelError: the backbone cannot draw this size.
        """
        return self.check_size(height * CELL, width * CELL)

    def comfy_unknown(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Names of what the replaced forward is given and is not known to leave attention as it is, such as masks."""
        names = (*self.comfy_arguments, *(f"argument {place}" for place in range(len(self.comfy_arguments), len(args))))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return [name for name, value in given.items() if value is not None and name not in self.comfy_harmless]

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
