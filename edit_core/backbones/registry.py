"""Finds the descriptions of backbones, and tells from a model's tensors which of them it is, or what else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from ..attention import SIDE_TENSORS
from ..errors import EDiTModelError, quoted, shown
from .base import Backbone, Base, Shapes

__all__ = ["BACKBONES", "backbone_named", "identify", "identify_module", "module_tensors"]

_NOT_ONE = ("base", "registry")
"""The files of this folder that describe no backbone."""


def _discover() -> dict[str, Backbone]:
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in _NOT_ONE)
    found = (importlib.import_module(f".{name}", __package__).BACKBONE for name in names)
    return {backbone.name: backbone for backbone in found}


BACKBONES: dict[str, Backbone] = _discover()
"""By the name that weights files use: what each file beside this one defines as `BACKBONE`."""

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")

# What people will try, by a part of a key that nothing above it has.
_FOREIGN: tuple[tuple[str, str], ...] = (
    ("double_stream_layers.", "AuraFlow"),
    ("single_transformer_blocks.", "FLUX or a relative (diffusers names)"),
    ("double_blocks.", "FLUX or a relative"),
    ("joint_blocks.", "a part of a Stable Diffusion 3, or a relative"),
    ("attn.add_k_proj.", "a relative of Stable Diffusion 3 or FLUX (diffusers names)"),
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


def backbone_named(name: str) -> Backbone:
    """The backbone of a name, as weights files, caches and commands have it.

    Raises:
        EDiTModelError: there is none of that name.
    """
    if name not in BACKBONES:
        raise EDiTModelError(f"{quoted(name)} is no backbone that EDiT knows; known are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def identify(shapes: Shapes, source: str) -> Base:
    """Which base transformer these tensors make up, in ComfyUI's, the original or diffusers' names.

    Args:
        shapes: names and shapes of a file's or a module's tensors; a checkpoint's prefix is taken off.
        source: what to call it in an error.

    Raises:
        EDiTModelError: it is none that EDiT knows; the message says what was found.
    """
    relative = None
    for prefix in ("", *_PREFIXES):
        own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        for backbone in BACKBONES.values():
            if (base := backbone.match(own)) is None:
                continue
            relative = _named(own, backbone.relatives)
            if relative is None:
                _check_width(base, own, source)
                return replace(base, prefix=prefix)
    titles = [backbone.title for backbone in BACKBONES.values()]
    raise EDiTModelError(
        f"{source} is {relative or _foreign(shapes)}; EDiT works on {', '.join(titles[:-1])} and {titles[-1]}"
    )


def _check_width(base: Base, shapes: Shapes, source: str) -> None:
    """What the rest relies on: every block's output projection is as large as the description says."""
    for block in range(base.depth):
        key, wanted = base.sampled(block), base.shape("to_out")[: 1 if base.output(block).bias else 2]
        if not base.dim or shapes[key] != wanted:
            found = "x".join(map(str, shapes[key][:8])) or "a scalar"
            said = "one number per channel" if len(wanted) == 1 else "x".join(map(str, wanted))
            raise EDiTModelError(f"{source} is damaged: its {key} is {found}, not {said}")


def identify_module(module: nn.Module) -> Base:
    """:func:`identify` for a model in memory. Reads names and shapes alone: quantised weights stay untouched."""
    shapes = {key: tuple(value.shape) for key, value in module_tensors(module).items()}
    return identify(shapes, f"this {type(module).__name__}")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by their names without the level that PEFT puts around a linear that a LoRA changes."""
    return {key.replace(".base_layer.", "."): value for key, value in module.state_dict().items()}


def _foreign(keys: Iterable[str]) -> str:
    names = list(keys)
    unknown = f"of an unknown kind (it holds {shown(sorted(names)[:3]) or 'no tensors at all'})"
    return _named(names, _FOREIGN) or unknown


def _named(keys: Iterable[str], kinds: Iterable[tuple[str, str]]) -> str | None:
    """The first of some kinds of which a key has the part."""
    names = list(keys)
    return next((kind for part, kind in kinds if any(part in name for name in names)), None)
