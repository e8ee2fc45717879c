"""The backbones that EDiT knows. Each file beside this one that defines `BACKBONE` is one: adding it is enough."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from ..attention import SIDE_TENSORS
from ..errors import EDiTModelError, shown
from .base import Backbone, Base, BaseLinear, HostCall, Shapes

__all__ = [
    "BACKBONES",
    "Backbone",
    "Base",
    "BaseLinear",
    "HostCall",
    "Shapes",
    "identify",
    "identify_module",
    "module_tensors",
]


def _discover() -> dict[str, Backbone]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    found = (importlib.import_module(f".{name}", __name__).BACKBONE for name in names)
    return {backbone.name: backbone for backbone in found}


BACKBONES: dict[str, Backbone] = _discover()
"""By the name that weights files use."""

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")

# What people will try, by a part of a key that nothing above it has. Near relatives of our two come first.
_FOREIGN: tuple[tuple[str, str], ...] = (
    ("csize_embedder.", "PixArt-α (its size conditioning is not in PixArt-Σ)"),
    ("adaln_single.emb.resolution_embedder.", "PixArt-α (its size conditioning is not in PixArt-Σ)"),
    (".attn.sr.", "a PixArt-Σ with its own key/value compression"),
    (".attn.q_norm.", "a PixArt-Σ variant with query/key norms"),
    ("double_stream_layers.", "AuraFlow"),
    ("single_transformer_blocks.", "FLUX or a relative (diffusers names)"),
    ("double_blocks.", "FLUX or a relative"),
    ("joint_blocks.", "a Stable Diffusion 3 without attn2 (SD3-Medium or SD3.5-Large)"),
    ("attn.add_k_proj.", "a Stable Diffusion 3 without attn2 (SD3-Medium or SD3.5-Large, diffusers names)"),
    ("input_blocks.", "a UNet (Stable Diffusion 1, 2 or XL)"),
    ("down_blocks.0.", "a UNet or a VAE (diffusers names)"),
    *(
        (part, "EDiT weights; these go to EDiTLoadWeights or --weights, and are not a base model")
        for part in (*SIDE_TENSORS, "base.transformer_blocks.")
    ),
    ("lora", "a LoRA, not a base model"),
    ("encoder.block.", "a T5 text encoder, not a base model"),
    ("text_model.", "a CLIP text encoder, not a base model"),
    ("decoder.conv_in.", "a VAE, not a base model"),
)


def identify(shapes: Shapes, source: str) -> Base:
    """Which base transformer these tensors make up, in ComfyUI's, the original or diffusers' names.

    Args:
        shapes: names and shapes of a file's or a module's tensors; a checkpoint's prefix is taken off.
        source: what to call it in an error.

    Raises:
        EDiTModelError: it is none that EDiT knows; the message says what was found.
    """
    foreign = _foreign(shapes)
    for prefix in ("", *_PREFIXES):
        own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        for backbone in BACKBONES.values():
            base = backbone.match(own)
            # The first four relatives have all tensors of PixArt-Σ, and some more.
            if base is not None and foreign not in [name for _, name in _FOREIGN[:4]]:
                _check_width(base, own, source)
                return replace(base, prefix=prefix)
    titles = " and ".join(backbone.title for backbone in BACKBONES.values())
    raise EDiTModelError(f"{source} is {foreign}; EDiT works on {titles}")


def _check_width(base: Base, shapes: Shapes, source: str) -> None:
    """What the rest relies on: every block's output projection has a bias of the base's channels."""
    for block in range(base.depth):
        key = base.backbone.output_bias(base, block)
        if not base.dim or shapes[key] != (base.dim,):
            found = "x".join(map(str, shapes[key][:8])) or "a scalar"
            raise EDiTModelError(f"{source} is damaged: its {key} is {found}, not one number per channel")


def identify_module(module: nn.Module) -> Base:
    """:func:`identify` for a model in memory. Reads names and shapes alone: quantised weights stay untouched."""
    shapes = {key: tuple(value.shape) for key, value in module_tensors(module).items()}
    return identify(shapes, f"this {type(module).__name__}")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by their names without the level that PEFT puts around a linear that a LoRA changes."""
    return {key.replace(".base_layer.", "."): value for key, value in module.state_dict().items()}


def _foreign(keys: Iterable[str]) -> str:
    names = list(keys)
    for part, name in _FOREIGN:
        if any(part in key for key in names):
            return name
    return f"of an unknown kind (it holds {shown(sorted(names)[:3]) or 'no tensors at all'})"
