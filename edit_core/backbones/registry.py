"""Finds the descriptions of backbones, and tells from a model's tensors which of them it is, or what else."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..attention import SIDE_TENSORS
from ..errors import EDiTModelError, quoted, shown
from ..layers import format_layers
from .base import Backbone, Base, Shapes

__all__ = [
    "BACKBONES",
    "PART",
    "backbone_named",
    "identify",
    "identify_module",
    "module_tensors",
    "plain_name",
    "unwrapped",
]

_NOT_ONE = ("base", "registry")
"""The files of this folder that describe no backbone."""


def _discover() -> dict[str, Backbone]:
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in _NOT_ONE)
    found = (importlib.import_module(f".{name}", __package__).BACKBONE for name in names)
    return {backbone.name: backbone for backbone in found}


BACKBONES: dict[str, Backbone] = _discover()
"""By the name that weights files use: what each file beside this one defines as `BACKBONE`."""

_WRAPPED = re.compile(r"(?:(?:model|diffusion_model|net|transformer|unet|module|base_model)\.){1,4}")
"""What checkpoints and wrappers put before the names of a transformer's tensors."""
_MOST_PREFIXES = 16
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
PART = re.compile(r"-(\d{1,5})-of-(\d{1,5})\b")
"""In a file's name, which part of a model it is, and of how many."""
_WEIGHT = re.compile(r"\.q?weight\b.*")

# What people will try, by a part of a key that nothing above it has.
_FOREIGN: tuple[tuple[str, str], ...] = (
    *(
        (part, "EDiT weights; these go to EDiTLoadWeights or --weights, and are not a base model")
        for part in (*SIDE_TENSORS, "base.transformer_blocks.")
    ),
    (".base_layer.", "a model with a LoRA in it, as PEFT saves it; fuse the LoRA, and save the model anew"),
    (".lokr_", "a LoKr, not a base model"),
    (".hada_", "a LoHa, not a base model"),
    (".glora_", "a GLoRA, not a base model"),
    (".oft_", "an OFT, not a base model"),
    (".ia3_l", "an IA3, not a base model"),
    (".vera_lambda", "a VeRA, not a base model"),
    ("lora", "a LoRA, not a base model"),
    ("lycoris_", "a LyCORIS adapter, not a base model"),
    (".diff_b", "differences to a base model, not one itself"),
    ("controlnet_blocks.", "a ControlNet"),
    ("double_stream_layers.", "AuraFlow"),
    ("single_transformer_blocks.", "FLUX or a relative (diffusers names)"),
    ("double_blocks.", "FLUX or a relative"),
    ("joint_blocks.", "a part of a Stable Diffusion 3, or a relative"),
    ("attn.add_k_proj.", "a relative of Stable Diffusion 3 or FLUX (diffusers names)"),
    ("input_blocks.", "a UNet (Stable Diffusion 1, 2 or XL)"),
    ("down_blocks.0.", "a UNet or a VAE (diffusers names)"),
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
    # Whatever a part holds, it cannot be told from a model with fewer blocks with certainty.
    if (part := PART.search(source)) and int(part[2]) > 1:
        raise EDiTModelError(
            f"{source} is one part of {int(part[2])}: join them into one file; commands also take the folder that "
            "holds them all"
        )
    found = _find(shapes)
    if isinstance(found, Base):
        _check_width(found, shapes, source)
        if lack := _lack(found, shapes):
            title = found.backbone.title
            raise EDiTModelError(
                f"{source} is a part of a {title}: {lack}; join it with the others, or get the model anew"
            )
        return found
    raise EDiTModelError(f"{source} is {found}; EDiT works on {_known()}")


def _known() -> str:
    titles = [backbone.title for backbone in BACKBONES.values()]
    return f"{', '.join(titles[:-1])} and {titles[-1]}"


def _find(shapes: Shapes) -> Base | str:
    """The base that some tensors make up as far as a description's own tensors go; else what they are."""
    relative = None
    for prefix in _prefixes(shapes):
        own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        for backbone in BACKBONES.values():
            if (base := backbone.match(own)) is None:
                continue
            relative = _named(own, backbone.relatives)
            if relative is None:
                return replace(base, prefix=prefix)
    return relative or _foreign(shapes)


def _prefixes(keys: Iterable[str]) -> list[str]:
    """What may stand before the names of a transformer's tensors among these, the shortest first."""
    found = {""}
    for key in keys:
        if (match := _WRAPPED.match(key)) and match[0] not in found and len(found) < _MOST_PREFIXES:
            words = match[0].split(".")[:-1]
            found |= {"".join(f"{word}." for word in words[: count + 1]) for count in range(len(words))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _lack(base: Base, shapes: Shapes) -> str | None:
    """What a base's tensors want of being all of a model; None where they are."""
    stem = base.sampled(0).partition(".0.")[0] + "."
    blocks: dict[int, set[str]] = defaultdict(set)
    for key in shapes:
        number, _, name = key.removeprefix(stem).partition(".")
        if key.startswith(stem) and number.isdecimal() and len(number) <= 6:
            if name.endswith(".bias") or _WEIGHT.search(name):
                blocks[int(number)].add(_WEIGHT.sub(".weight", name))
    if beyond := [block for block in blocks if block >= base.depth]:
        gone = sorted(set(range(max(beyond))) - set(blocks))
        of = f"it lacks block {format_layers(gone[:50])}" if gone else f"its block {base.depth} is not whole"
        return f"{of}, and has block {max(beyond)}"
    for key in base.backbone.ends.get(base.host, ()):
        if base.prefix + key not in shapes:
            return f"it lacks {base.prefix}{key}"
    # What most blocks of a kind have, all of that kind have. The last block may be another kind than those before it.
    kinds: dict[object, list[int]] = defaultdict(list)
    for block in range(base.depth):
        kinds[base.sites[block], len(base.linears(block))].append(block)
    for kind in kinds.values():
        counts = Counter(name for block in kind for name in blocks[block])
        usual = {name for name, count in counts.items() if 2 * count > len(kind)}
        for block in kind:
            if missing := sorted(usual - blocks[block]):
                return f"it lacks {stem}{block}.{missing[0]}"
    return None


def _check_width(base: Base, shapes: Shapes, source: str) -> None:
    """What the rest relies on: every block's output projection is as large as the description says."""
    for block in range(base.depth):
        key, wanted = base.sampled(block), base.shape("to_out")[: 1 if base.output(block).bias else 2]
        if not base.dim or shapes[key] != wanted:
            found = "x".join(map(str, shapes[key][:8])) or "a scalar"
            said = "one number per channel" if len(wanted) == 1 else "x".join(map(str, wanted))
            raise EDiTModelError(f"{source} is damaged: its {key} is {found}, not {said}")


def identify_module(module: nn.Module) -> Base:
    """:func:`identify` for a model in memory. Reads names and shapes alone: quantised weights stay untouched.

    What torch.compile and PEFT put around a model and its parts is looked through.
    """
    if not isinstance(module, nn.Module):
        hint = ": hand in its .transformer" if isinstance(getattr(module, "transformer", None), nn.Module) else ""
        raise EDiTModelError(f"a {type(module).__name__} is no transformer{hint}")
    shapes = {key: tuple(value.shape) for key, value in module_tensors(module).items()}
    found = _find(shapes)
    source = f"this {type(unwrapped(module)).__name__}"
    if isinstance(found, str):
        raise EDiTModelError(f"{source} is {found}; EDiT works on {_known()}")
    _check_width(found, shapes, source)
    return found


def unwrapped(module: Any) -> Any:
    """What torch.compile or a class of torch.nn.parallel was given, where this is what it made of it."""
    while isinstance(module, nn.Module):
        parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = module._modules.get("module" if parallel else "_orig_mod")
        if inner is None:
            break
        module = inner
    return module


def plain_name(key: str) -> str:
    """A tensor's name without the level that torch.compile puts around a compiled module, wherever in it."""
    return _COMPILED.sub("", key)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by their plain names, also without the level that PEFT puts around a linear that a LoRA
    changes."""
    tensors = unwrapped(module).state_dict()
    return {plain_name(key).replace(".base_layer.", "."): value for key, value in tensors.items()}


def _foreign(keys: Iterable[str]) -> str:
    names = list(keys)
    unknown = f"of an unknown kind (it holds {shown(sorted(names)[:3]) or 'no tensors at all'})"
    return _named(names, _FOREIGN) or unknown


def _named(keys: Iterable[str], kinds: Iterable[tuple[str, str]]) -> str | None:
    """The first of some kinds of which a key has the part."""
    names = list(keys)
    return next((kind for part, kind in kinds if any(part in name for name in names)), None)
