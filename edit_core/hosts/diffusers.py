"""EDiT on diffusers transformers, through their attention processors."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..attention import Grid, SideAttention
from ..backbones import identify_module, module_tensors, unwrapped
from ..config import EDiTConfig
from ..crossover import MinTokens, resolve
from ..errors import EDiTModelError
from ..layers import format_layers
from ..weights import EDiTWeights, weights_for
from ..weights.differences import PREFIX, module_tree
from .dense import DenseLog
from .processors import (
    CALL,
    Call,
    JointProcessor,
    Processor,
    SelfProcessor,
    Site,
    Tap,
    is_fused,
    make_processor,
    pass_arguments,
)

__all__ = ["EDiTHandle", "apply_edit"]

logger = logging.getLogger(__name__)

PROCESSORS: dict[str, type[Processor]] = {"self": SelfProcessor, "joint": JointProcessor}
"""By site."""


class EDiTHandle:
    """An applied EDiT; :meth:`remove` undoes it. As a context manager it does so at the end of the block."""

    def __init__(
        self,
        transformer: nn.Module,
        sides: nn.ModuleDict,
        differences: nn.ModuleDict,
        min_tokens: int = 0,
    ) -> None:
        self.sides = sides
        """The side modules, `sides[str(block)][site]`: what a training would optimise."""
        self.differences = differences
        """The differences on the base's linears, nested as the transformer is; without parameters if there are none."""
        self.tap: Tap | None = None
        """What the next calls have for every replaced attention in place of its own call, for who trains or compares;
        None for EDiT itself. A call keeps the one that it began with, in a backward pass too."""
        self.min_tokens = min_tokens
        """Pictures of fewer image tokens keep the transformer's own attention."""
        self.log: DenseLog | None = DenseLog()
        self._replaced: list[tuple[Any, Processor, Any]] = []
        self._said: set[str] = set()
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._place, self._kwargs = next(x for x in enumerate(names) if x[1].endswith("attention_kwargs"))
        self._hooks = [transformer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for module in transformer.modules():
            if hasattr(module, "get_processor"):
                self._hooks.append(module.register_forward_pre_hook(pass_arguments, with_kwargs=True))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are linear: all of their processors are still EDiT's."""
        there = {_block(ours) for _, ours, _ in self._replaced}
        return tuple(sorted(there - {_block(ours) for _, ours, _ in self._lost()}))

    def _lost(self) -> list[tuple[Any, Processor, Any]]:
        """Whose processor somebody else has replaced."""
        return [each for each in self._replaced if each[0].processor is not each[1]]

    def _note(self, grid: Grid) -> None:
        """Says what nobody else would: who has replaced EDiT's processors, and how small a picture is drawn."""
        if lost := self._lost():
            names = sorted({type(attention.processor).__name__ for attention, _, _ in lost})
            blocks = format_layers(_block(ours) for _, ours, _ in lost)
            self._warn(
                f"blocks {blocks} are not linear any more: {' and '.join(names)} took the place of EDiT's processors; "
                "load or fuse first, and apply EDiT after it"
            )
        for attention, ours, original in self._replaced:
            if not is_fused(original) or attention.processor is not ours:
                continue
            name = type(original).__name__
            if isinstance(ours, JointProcessor) and attention.norm_q is not None:
                self._warn(
                    f"{name} leaves out this model's norms of queries and keys: without EDiT it is another model than "
                    "with it; call unfuse_qkv_projections() before EDiT is applied"
                )
            if hasattr(attention.to_q, "base_layer"):
                self._warn(
                    f"{name} runs one fused layer, which the adapters on to_q, to_k and to_v are not in; call "
                    "unfuse_qkv_projections() before EDiT is applied"
                )
        if asked := _binned():
            height, width = asked
            self._warn(
                f"the pipeline draws {grid[1]}x{grid[0]} tokens and scales the picture to the {width}x{height} pixels "
                "that were asked for; pass use_resolution_binning=False to draw that size"
            )

    def _warn(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("EDiT: %s", sentence)

    def call(self, grid: Grid) -> Call:
        """What a call of the transformer is: also to be given, as `edit_call`, to an attention that is called alone."""
        return Call(self, grid, self.tap)

    def _enter(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        latent = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        height, width = latent.shape[-2:]
        patch = transformer.config.patch_size
        if height % patch or width % patch:
            raise EDiTModelError(
                f"a latent of {height}x{width} cannot be cut into {patch}x{patch} patches; "
                f"make both sides multiples of {patch}"
            )
        grid = (height // patch, width // patch)
        if not torch.compiler.is_compiling():
            self._note(grid)
        # Among what diffusers hands from block to block to every processor.
        given = args[self._place] if self._place < len(args) else kwargs.get(self._kwargs)
        mine = {**(given or {}), CALL: self.call(grid)}
        if self._place < len(args):
            return (*args[: self._place], mine, *args[self._place + 1 :]), kwargs
        return args, {**kwargs, self._kwargs: mine}

    def trainable(self) -> dict[str, nn.Parameter]:
        """All that a training may optimise, side weights and differences, by its name in a weights file.

        The same parameters as those of :attr:`sides` and :attr:`differences`, on which `float()` and
        `requires_grad_()` act.
        """
        changes = {PREFIX + name: parameter for name, parameter in self.differences.named_parameters()}
        return {**dict(self.sides.named_parameters()), **changes}

    def install(
        self,
        key: str,
        attention: Any,
        processor_class: type[Processor],
        side: SideAttention,
        differences: Mapping[str, nn.Module],
    ) -> None:
        """Replaces one attention's processor; `key` is its `<block>.<site>`."""
        original = attention.processor
        attention.edit = Site(side, differences)
        processor = make_processor(processor_class, key, attention.edit, original, self)
        _put(attention, processor)
        self._replaced.append((attention, processor, original))

    def remove(self) -> None:
        """Puts the original processors back; the transformer's outputs are then bit-equal to before. Idempotent."""
        for attention, ours, original in self._replaced:
            if attention.processor is ours:  # nobody has replaced it since
                _put(attention, original)
            if attention._modules.get("edit") is ours.site:  # nor applied EDiT again
                del attention.edit
        self._replaced.clear()
        for hook in self._hooks:
            hook.remove()
        self.log = None  # one of ours that somebody kept and puts back, as unfuse_qkv_projections does, stays dense

    def __enter__(self) -> EDiTHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _put(attention: Any, processor: Any) -> None:
    """Sets a processor where there may be a module, which `set_processor` would warn of losing."""
    attention._modules.pop("processor", None)
    attention.processor = processor


def _block(processor: Processor) -> int:
    return int(processor.key.partition(".")[0])


def _binned() -> tuple[int, int] | None:
    """Height and width that a pipeline was asked for, where it draws others and scales the picture afterwards.

    A transformer is not told of it, so this looks at the callers, for the names by which diffusers' pipelines keep it.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if "orig_height" in frame.f_code.co_varnames and "use_resolution_binning" in frame.f_code.co_varnames:
            names = frame.f_locals
            asked = (names.get("orig_height"), names.get("orig_width"))
            return None if None in asked or asked == (names.get("height"), names.get("width")) else asked  # type: ignore[return-value]
    return None


def apply_edit(
    transformer: Any, weights: EDiTWeights | EDiTConfig, layers: str = "all", min_tokens: MinTokens = 0
) -> EDiTHandle:
    """Makes a diffusers transformer run EDiT or MM-EDiT with these weights, or piecewise attention, which needs none.

    Works under `PixArtSigmaPipeline` and `StableDiffusion3Pipeline`, which call the transformer as before. The side
    weights take the transformer's device and dtype, and follow it where it moves. So do differences on the base's
    linears, if the weights hold any; they are added to the linears' outputs, and the linears stay as they are. The
    transformer's state dict holds all of them, too, until they are removed: save the base itself after that.

    Args:
        transformer: a `PixArtTransformer2DModel` or `SD3Transformer2DModel`, or what torch.compile made of one.
        weights: EDiT weights for it; or the config of an attention that needs none, `EDiTConfig.preset("piecewise")`.
        layers: the blocks to make linear: `"all"`, `"none"` or a list such as `"0, 3-9, 27"`.
        min_tokens: pictures of fewer image tokens keep the transformer's own attention; `"auto"` for the crossover that
            `python -m edit_core bench --crossover` measured on the transformer's device, in its dtype: 0 before that.

    Returns:
        A handle whose `remove()` restores the transformer.

    Raises:
        EDiTModelError: not such a transformer, or its weights are not in memory, or EDiT is applied to it already.
        EDiTConfigError: a config's attention needs weights.
        EDiTWeightsError: the weights do not fit it.
        EDiTError: a bad `layers` text or `min_tokens`, or a damaged cache of crossovers.
    """
    transformer = unwrapped(transformer)
    base = identify_module(transformer)
    if base.host != "diffusers":
        raise EDiTModelError(f"apply_edit takes a diffusers transformer, and this is {base}")
    if base.prefix:
        raise EDiTModelError(
            f"this {type(transformer).__name__} holds a {base.backbone.title} as its {base.prefix.rstrip('.')}; "
            "hand in that one"
        )
    weights = weights_for(base, weights)
    blocks = weights.choose(layers, base)
    tokens = resolve(min_tokens, base.backbone.name, transformer.dtype, transformer.device)
    if any(isinstance(getattr(module, "processor", None), Processor) for module in transformer.modules()):
        raise EDiTModelError("EDiT is applied to this transformer already; call remove() on its handle first")
    if warning := weights.warning(base, module_tensors(transformer).__getitem__):
        logger.warning("EDiT: %s", warning)
    sides, state = weights.build(blocks, device=transformer.device, dtype=transformer.dtype)
    sides.load_state_dict(state)
    changes = weights.build_differences(blocks, transformer.device, transformer.dtype)
    differences = module_tree(changes)
    for module in (sides, differences):
        module.requires_grad_(False).train(transformer.training)
    handle = EDiTHandle(transformer, sides, differences, tokens)
    for block in blocks:
        for site, side in sides[str(block)].items():  # type: ignore[operator]
            own = {x.name: changes[x.diffusers] for x in base.backbone.linears(block, site) if x.diffusers in changes}
            attention = unwrapped(transformer.get_submodule(base.backbone.diffusers_path(block, site)))
            handle.install(f"{block}.{site}", attention, PROCESSORS[site], side, own)
    dense = set(range(base.depth)) - set(blocks)
    if dense:
        logger.info("EDiT: blocks %s stay dense: not listed or without weights", format_layers(dense))
    return handle
