"""Reading a weights file that anybody may have written: everything is checked before anything is allocated.

Names and shapes come first, then what the metadata's config makes of them; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..attention import SITES
from ..backbones import BACKBONES
from ..config import EDiTConfig
from ..errors import EDiTWeightsError, said
from .differences import check_differences, group, width_of

__all__ = [
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "SIDE_NAME",
    "Content",
    "holds_weights",
    "paths_of",
    "read_file",
    "sites_of",
    "width_for",
]

FORMAT = "edit"
FORMAT_VERSION = "1"
SIDE_NAME = re.compile(rf"(\d{{1,6}})\.({'|'.join(SITES)})\.(.+)")
"""Of a side weight's tensor: its block, its site, and its name there."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in, by safetensors' names."""
_MOST_CHANNELS = 65536
_MOST_HEADER = 1 << 22  # bytes; those of the real models' students are under a tenth of it

Header = Mapping[str, tuple[tuple[int, ...], str]]
"""Shapes and dtypes, these by safetensors' names."""


class Content(NamedTuple):
    """What a file holds, as :class:`.EDiTWeights` has it."""

    backbone: str
    config: EDiTConfig
    tensors: dict[str, Tensor]
    base_hash: str
    training: dict[str, Any]


def read_file(
    path: Path, metadata: Mapping[str, str] | None = None, prefix: str = ""
) -> tuple[Content, tuple[str, ...]]:
    """The weights in a file, and the names that are none of theirs.

    Args:
        path: a `.safetensors` file.
        metadata: instead of the file's own.
        prefix: what stands before the names of the wanted tensors.

    Raises:
        EDiTWeightsError: the file cannot be read or is not what it should be; names the file, the tensor and the
            numbers.
    """
    # Not Path.is_file: of a name that is too long, or a folder that may not be read, it makes an error of its own.
    if not os.path.isfile(path):  # a device or a pipe would be waited for
        raise EDiTWeightsError(f"{path}: there is no such file")
    try:
        _check_header_size(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            if metadata is None:
                metadata = file.metadata() or {}
            names = [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            slices = {name: file.get_slice(prefix + name) for name in names}
            header = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            content, wanted = _from_header(path, metadata, header)
            content.tensors.update({name: file.get_tensor(prefix + name) for name in names if name in wanted})
    except SafetensorError as error:
        raise EDiTWeightsError(f"{path}: not a complete safetensors file ({said(error)})") from None
    except OSError as error:
        raise EDiTWeightsError(f"{path}: cannot be read ({error})") from None
    return content, tuple(name for name in names if name not in wanted)


def _check_header_size(path: Path) -> None:
    """Refuses names and metadata by the megabyte before they are parsed.

    Raises:
        EDiTWeightsError: as it says.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MOST_HEADER < size < os.path.getsize(path):  # a size beyond the file is not one: it is no safetensors file
        raise EDiTWeightsError(
            f"{path}: its header has {size} bytes, but that of EDiT weights has {_MOST_HEADER} at most"
        )


def _from_header(path: Path, metadata: Mapping[str, str], header: Header) -> tuple[Content, set[str]]:
    """What the metadata says, without tensors; and the names of those that belong to it, all checked."""
    content = _described(path, metadata)
    shapes = {name: shape for name, (shape, _) in header.items()}
    sites = sites_of(shapes, content.backbone, content.config)
    dim = width_for(shapes, content.backbone, content.config, str(path))
    if not 1 <= dim <= _MOST_CHANNELS:
        raise EDiTWeightsError(f"{path}: its tensors are for {dim} channels, not for 1 to {_MOST_CHANNELS}")
    sides = _side_shapes(dim, sites, content.config)
    _check_shapes(path, shapes, sides)
    wanted = {*sides, *check_differences(shapes, paths_of(content.backbone, sites), dim, str(path))}
    for name, (_, dtype) in header.items():
        if name in wanted and dtype not in DTYPES:
            raise EDiTWeightsError(f"{path}: {name} is {dtype}, but EDiT weights are {', '.join(DTYPES)}")
    return content, wanted


def _described(path: Path, metadata: Mapping[str, str]) -> Content:
    """What the metadata says, without tensors."""
    if metadata.get("format") != FORMAT:
        raise EDiTWeightsError(
            f"{path}: not an EDiT weights file (its metadata says format={metadata.get('format')!r:.80}, not 'edit')"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise EDiTWeightsError(
            f"{path}: format_version {metadata.get('format_version')!r:.80} is unknown; this version reads "
            f"{FORMAT_VERSION!r}, so update EDiT or convert the file"
        )
    if metadata.get("backbone") not in BACKBONES:
        raise EDiTWeightsError(
            f"{path}: backbone {metadata.get('backbone')!r:.80} is unknown; known are {', '.join(BACKBONES)}"
        )
    try:
        config = EDiTConfig.from_json(metadata.get("config", ""))
        training = json.loads(metadata.get("training", "{}"))
    except (ValueError, RecursionError) as error:  # EDiTConfigError among them, and numbers of too many digits
        raise EDiTWeightsError(f"{path}: its metadata is damaged: {error}") from None
    if not isinstance(training, dict):
        raise EDiTWeightsError(f"{path}: its metadata is damaged: training is not a JSON object")
    return Content(metadata["backbone"], config, {}, metadata.get("base_hash", ""), training)


def _side_shapes(dim: int, sites: Mapping[int, Iterable[str]], config: EDiTConfig) -> dict[str, tuple[int, ...]]:
    """Of all side weights, what the config makes of the width."""
    # One of each site, not of each block, of which a file's names may pretend any number.
    made = {site: SITES[site](dim, config, device=torch.device("meta")).state_dict() for site in SITES}
    return {
        f"{block}.{site}.{name}": tuple(tensor.shape)
        for block, names in sites.items()
        for site in names
        for name, tensor in made[site].items()
    }


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(set(expected) - set(shapes)):
        raise EDiTWeightsError(f"{path}: {len(missing)} tensors are missing, {missing[0]} among them")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise EDiTWeightsError(f"{path}: {name} is {_by(shapes[name])}, but the config asks for {_by(shape)}")


def holds_weights(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file's tensors have names that EDiT weights have."""
    return any(map(SIDE_NAME.fullmatch, shapes)) or bool(group(shapes))


def sites_of(tensors: Mapping[str, Any], backbone: str, config: EDiTConfig) -> dict[int, tuple[str, ...]]:
    """The sites that have side weights; where the config has none, those that have a difference."""
    if config.side_weights:
        keys = [(int(match[1]), match[2]) for match in map(SIDE_NAME.fullmatch, tensors) if match]
    else:
        keys = [key for key in map(BACKBONES[backbone].site_of, group(tensors)) if key]
    found: dict[int, set[str]] = {}
    for block, site in keys:
        found.setdefault(block, set()).add(site)
    return {block: tuple(sorted(found[block])) for block in sorted(found)}


def width_for(shapes: Mapping[str, tuple[int, ...]], backbone: str, config: EDiTConfig, source: str) -> int:
    """Channels `C` of the base that tensors were made for.

    Raises:
        EDiTWeightsError: none of them tells; names `source`, the tensor and the numbers.
    """
    if not config.side_weights:
        return width_of(shapes, paths_of(backbone, sites_of(shapes, backbone, config)), source)
    part, kind = next(iter(config.parts.items()))
    telling = f"{part}.{kind.tells}"
    name = next((n for n in shapes if (match := SIDE_NAME.fullmatch(n)) and match[3] == telling), None)
    if name is None or len(shapes[name]) < 2:
        raise EDiTWeightsError(f"{source}: holds no <block>.<site>.{telling}; it has no EDiT weights")
    dim, second = shapes[name][:2]
    if complaint := kind.complaint((dim, second), config):
        raise EDiTWeightsError(f"{source}: {name} is {dim}x{second}, but {complaint}")
    return dim


def paths_of(backbone: str, sites: Mapping[int, Iterable[str]], blocks: Iterable[int] | None = None) -> set[str]:
    """Diffusers paths of the linears that some blocks, or all, can have a difference on."""
    linears = BACKBONES[backbone].linears
    chosen = sites if blocks is None else blocks
    return {linear.diffusers for block in chosen for site in sites[block] for linear in linears(block, site)}


def _by(shape: Iterable[int]) -> str:
    sizes = [*map(str, shape)]
    return "x".join(sizes[:8] + ["..."] * (len(sizes) > 8)) or "a scalar"
