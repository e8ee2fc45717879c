"""Weights that a diffusers folder holds only as a variant, such as `model.fp16.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import EDiTModelError, shown

__all__ = ["only_variant"]

_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"(?:model|diffusion_pytorch_model)(?:{_SHARD})?(?:\.(?P<variant>[\w-]+?))?(?:{_SHARD})?\.safetensors"
)


def only_variant(folder: Path, parts: Sequence[str]) -> str | None:
    """The variant to load where a part has no weights without one; a part that lacks this variant is loaded without.

    Args:
        folder: a pipeline's.
        parts: its subfolders that matter.

    Raises:
        EDiTModelError: there is more than one to choose from, or none that suits all parts.
    """
    needed: list[set[str]] = []
    for part in parts:
        names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
        found = {match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name))}
        if found and None not in found:
            needed.append(found)
    if not needed:
        return None
    if len(common := set.intersection(*needed)) == 1:
        return common.pop()
    raise EDiTModelError(
        f"{folder}: its weights are there as the variants {shown(sorted(set().union(*needed)))} alone, and it is not "
        f"clear which to load; keep one of them in all of {', '.join(parts)}, or save the pipeline without a variant"
    )
