"""Between EDiT weights with differences and models that have them baked in.

Ours; the paper stores nothing of the kind. Baking in is what a LoRA's merge is: `W + B @ A` in float32, rounded to the
model's own dtype.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbones import Base, BaseLinear, plain_name
from ..basefile import BaseFile
from ..errors import EDiTError, EDiTModelError
from ..files import sync_folder, write_file
from . import DTYPES, EDiTWeights, fingerprint
from .differences import PREFIX, in_full

__all__ = ["merge", "split"]


class _Change(NamedTuple):
    """What to add to some rows of a base's tensor."""

    rows: slice
    difference: Mapping[str, Tensor]
    part: str
    """`weight` or `bias`."""


def merge(weights: EDiTWeights, source: str | os.PathLike[str], output: Path) -> EDiTWeights:
    """Writes a base model with the weights' differences baked in, and gives the side weights that remain.

    All else of the base, its tensors, dtypes and metadata, is copied byte for byte. In memory are the weights, the
    changed linears in the base's dtype (for the real models 0.3 and 1.2 GB in half precision) and one in float32.

    Args:
        weights: with differences.
        source: a diffusers folder (a pipeline's or its transformer's), or a safetensors file in any host's names.
        output: what to write: a transformer's folder for a folder, else a file.

    Returns:
        the side weights alone, which with the new base are what `weights` are with the old one.

    Raises:
        EDiTError: no differences, or nothing but differences, or a base that they cannot be baked into.
    """
    if not weights.config.side_weights:
        raise EDiTError(
            "these EDiT weights are their differences alone: with them baked into a base, nothing is left to say which "
            "of its blocks are linear"
        )
    file = BaseFile(source)
    base = file.identify()
    weights.check_base(base)
    differences = weights.differences()
    if not differences:
        raise EDiTError("these EDiT weights change nothing in the base, so there is nothing to merge")
    changes: dict[str, list[_Change]] = {}
    for linear in (x for block in weights.sites for x in base.linears(block) if x.diffusers in differences):
        module, rows = base.place(linear)
        for part in ("weight", "bias"):
            change = _Change(rows, differences[linear.diffusers], part)
            changes.setdefault(f"{module}.{part}", []).append(change)
    _require(file, changes)
    if file.path.is_file():
        _merge_file(file.path, output, changes)
    else:
        folder = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
        folder.mkdir()
        try:
            for path in file.files:
                _merge_file(path, folder / path.name, changes)
            for path in file.files[0].parent.glob("*.json"):  # the configuration, and the index of shards
                write_file(folder / path.name, path.read_bytes())
            os.rename(folder, output)
            sync_folder(output.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sides = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(PREFIX)}
    return replace(weights, tensors=sides, base_hash=fingerprint(base, BaseFile(output).tensor))


def _merge_file(source: Path, target: Path, changes: Mapping[str, list[_Change]]) -> None:
    """Copies a safetensors file, changing some tensors' values and nothing else."""
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if (name := plain_name(key)) not in changes:
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
            for rows, difference, part in changes[name]:
                added = in_full(difference, part)
                if added is not None:
                    tensor[rows] = (tensor[rows].float() + added).to(tensor.dtype)
            data[begin:end] = tensor.view(torch.uint8).numpy().tobytes()
        write_file(target, data)  # read page by page


def split(
    weights: EDiTWeights, before: str | os.PathLike[str], after: str | os.PathLike[str]
) -> tuple[EDiTWeights, int]:
    """Weights with full differences, from side weights and a base before and after its linears were changed.

    The two bases may be of different formats. Differences take their dtype, and linears that are equal get none. In
    memory are the differences.

    Returns:
        the weights, for the base as it was before; and how many other tensors of the two bases differ, which no
        weights file can hold (of those with the same name and dtype in both).

    Raises:
        EDiTError: the weights hold differences already, or the bases do not match or are equal.
    """
    if weights.differences():
        raise EDiTError("these EDiT weights hold differences already; split takes side weights alone")
    old_file, new_file = BaseFile(before), BaseFile(after)
    old, new = old_file.identify(), new_file.identify()
    weights.check_base(old)
    if (new.backbone.name, new.dim, new.sites) != (old.backbone.name, old.dim, old.sites):
        raise EDiTModelError(f"{new_file.path} is {new}, but {old_file.path} is {old}")
    differences: dict[str, Tensor] = {}
    compared: set[str] = set()
    for linear in (linear for block in weights.sites for linear in old.linears(block)):
        found = {}
        for part in ("weight", "bias"):
            a, b = _part(old_file, old, linear, part), _part(new_file, new, linear, part)
            difference = b.float() - a.float()
            found[f"{PREFIX}{linear.diffusers}.{part}"] = difference.to(torch.promote_types(a.dtype, b.dtype))
            compared.add(f"{old.place(linear)[0]}.{part}")
        if any(bool(tensor.any()) for tensor in found.values()):
            differences.update(found)
    if not differences:
        raise EDiTError(f"the linears of {new_file.path} are those of {old_file.path}, so there is nothing to split")
    others = (
        key for key, dtype in old_file.dtypes.items() if key not in compared and new_file.dtypes.get(key) == dtype
    )
    changed = sum(not torch.equal(old_file.tensor(key), new_file.tensor(key)) for key in others)
    tensors = {**weights.tensors, **differences}
    return replace(weights, tensors=tensors, base_hash=fingerprint(old, old_file.tensor)), changed


def _require(file: BaseFile, keys: Iterable[str]) -> None:
    for key in keys:
        if file.dtypes.get(key) not in DTYPES:
            found = f"is {file.dtypes[key]}" if key in file.dtypes else "is missing"
            raise EDiTModelError(f"{file.path}: {key} {found}; this takes a base in {', '.join(DTYPES)}")


def _part(file: BaseFile, base: Base, linear: BaseLinear, part: str) -> Tensor:
    """A linear's `weight (C, C)` or `bias (C,)`."""
    module, rows = base.place(linear)
    key = f"{module}.{part}"
    _require(file, [key])
    return file.tensor(key)[rows]
