"""EDiT on diffusers transformers, through their attention processors."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Grid, SideAttention
from ..backbones import identify_module, module_tensors
from ..crossover import MinTokens, resolve
from ..errors import EDiTModelError
from ..layers import format_layers
from ..weights import EDiTWeights
from ..weights.differences import PREFIX, module_tree
from .processors import Processor, Tap

__all__ = ["EDiTHandle", "apply_edit"]

logger = logging.getLogger(__name__)


class EDiTHandle:
    """An applied EDiT; :meth:`remove` undoes it. As a context manager it does so at the end of the block."""

    def __init__(
        self,
        transformer: nn.Module,
        blocks: tuple[int, ...],
        sides: nn.ModuleDict,
        differences: nn.ModuleDict,
        min_tokens: int = 0,
    ) -> None:
        self.blocks = blocks
        """The blocks that are linear."""
        self.sides = sides
        """The side modules, `sides[str(block)][site]`: what a training would optimise."""
        self.differences = differences
        """The differences on the base's linears, nested as the transformer is; without parameters if there are none."""
        self._extent: Tensor | None = None
        self.tap: Tap | None = None
        """Stands in for every replaced attention's call, for who trains or compares; None for EDiT itself."""
        self.min_tokens = min_tokens
        """Pictures of fewer image tokens keep the transformer's own attention."""
        self._said: set[str] = set()
        self._replaced: list[tuple[Any, Any]] = []
        self._hook = transformer.register_forward_pre_hook(self._enter, with_kwargs=True)

    @property
    def grid(self) -> Grid | None:
        """The running call's token grid; it outlives the call, since gradient checkpointing runs attentions again."""
        return None if self._extent is None else (self._extent.shape[0], self._extent.shape[1])

    @grid.setter
    def grid(self, grid: Grid | None) -> None:
        # An empty tensor's shape: a compiled graph would take a pair of numbers for constants, and be one per size.
        self._extent = None if grid is None else torch.empty((*grid, 0))

    def _enter(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        height, width = latent.shape[-2:]
        patch = transformer.config.patch_size
        if height % patch or width % patch:
            raise EDiTModelError(
                f"a latent of {height}x{width} cannot be cut into {patch}x{patch} patches; "
                f"make both sides multiples of {patch}"
            )
        self.grid = (height // patch, width // patch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All that a training may optimise, side weights and differences, by its name in a weights file.

        The same parameters as those of :attr:`sides` and :attr:`differences`, on which `float()` and
        `requires_grad_()` act.
        """
        changes = {PREFIX + name: parameter for name, parameter in self.differences.named_parameters()}
        return {**dict(self.sides.named_parameters()), **changes}

    def stay_dense(self, reason: str) -> None:
        """Logs why a call could not be linear, once per reason; not from compiled graphs, which cannot log."""
        if not torch.compiler.is_compiling() and reason not in self._said:
            self._said.add(reason)
            logger.warning("EDiT: stays dense: %s", reason)

    def install(
        self,
        key: str,
        attention: Any,
        processor_class: type[Processor],
        side: SideAttention,
        differences: nn.ModuleDict,
    ) -> None:
        """Replaces one attention's processor; `key` is its `<block>.<site>`."""
        original = attention.processor
        attention.set_processor(processor_class(key, side, original, self, differences))
        self._replaced.append((attention, original))

    def remove(self) -> None:
        """Puts the original processors back; the transformer's outputs are then bit-equal to before. Idempotent."""
        for attention, original in self._replaced:
            if isinstance(attention.processor, Processor):  # nobody has replaced ours since
                attention._modules.pop("processor")  # set_processor would warn of losing a module
                attention.set_processor(original)
        self._replaced.clear()
        self._hook.remove()
        self.grid = None  # one of ours that somebody kept and puts back, as unfuse_qkv_projections does, stays dense

    def __enter__(self) -> EDiTHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply_edit(transformer: Any, weights: EDiTWeights, layers: str = "all", min_tokens: MinTokens = 0) -> EDiTHandle:
    """Makes a diffusers transformer run EDiT (PixArt-Σ) or MM-EDiT (SD3.5-M) with these weights.

    Works under `PixArtSigmaPipeline` and `StableDiffusion3Pipeline`, which call the transformer as before. The side
    weights take the transformer's device and dtype, and follow it where it moves. So do differences on the base's
    linears, if the weights hold any; they are added to the linears' outputs, and the linears stay as they are. The
    transformer's state dict holds all of them, too, until they are removed: save the base itself after that.

    Args:
        transformer: a `PixArtTransformer2DModel` or `SD3Transformer2DModel`.
        weights: EDiT weights for it.
        layers: the blocks to make linear: `"all"`, `"none"` or a list such as `"0, 3-9, 27"`.
        min_tokens: pictures of fewer image tokens keep the transformer's own attention; `"auto"` for the crossover that
            `python -m edit_core bench --crossover` measured on the transformer's device, in its dtype: 0 before that.

    Returns:
        A handle whose `remove()` restores the transformer.

    Raises:
        EDiTModelError: not such a transformer, or its weights are not in memory, or EDiT is applied to it already.
        EDiTWeightsError: the weights do not fit it.
        EDiTError: a bad `layers` text or `min_tokens`, or a damaged cache of crossovers.
    """
    base = identify_module(transformer)
    if base.host != "diffusers":
        raise EDiTModelError(f"apply_edit takes a diffusers transformer, and this is {base}")
    blocks = weights.choose(layers, base)
    tokens = resolve(min_tokens, base.backbone.name, transformer.dtype, transformer.device)
    if any(isinstance(module, Processor) for module in transformer.modules()):
        raise EDiTModelError("EDiT is applied to this transformer already; call remove() on its handle first")
    if warning := weights.warning(base, module_tensors(transformer).__getitem__):
        logger.warning("EDiT: %s", warning)
    sides, state = weights.build(blocks, device=transformer.device, dtype=transformer.dtype)
    sides.load_state_dict(state)
    changes = weights.build_differences(blocks, transformer.device, transformer.dtype)
    differences = module_tree(changes)
    for module in (sides, differences):
        module.requires_grad_(False).train(transformer.training)
    handle = EDiTHandle(transformer, blocks, sides, differences, tokens)
    for block in blocks:
        for site, side in sides[str(block)].items():  # type: ignore[operator]
            own = {x.name: changes[x.diffusers] for x in base.backbone.linears(block, site) if x.diffusers in changes}
            attention = transformer.get_submodule(base.backbone.diffusers_path(block, site))
            processor = base.backbone.diffusers_processor(site)
            handle.install(f"{block}.{site}", attention, processor, side, nn.ModuleDict(own))
    dense = set(range(base.depth)) - set(blocks)
    if dense:
        logger.info("EDiT: blocks %s stay dense: not listed or without weights", format_layers(dense))
    return handle
