"""Loads the model that is distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..backbones import BACKBONES
from ..errors import EDiTModelError
from ..files import read_json
from .variants import only_variant

__all__ = ["load_teacher"]


def load_teacher(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformer of a diffusers pipeline's folder.

    Raises:
        EDiTModelError: there is none, or not one that EDiT works on.
        EDiTError: its config.json is damaged.
    """
    import diffusers

    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise EDiTModelError(f"{folder}: there is no transformer/config.json; give a diffusers pipeline's folder")
    classes = sorted({backbone.transformer for backbone in BACKBONES.values()})
    described = read_json(config)
    name = described.get("_class_name") if isinstance(described, dict) else None
    if name not in classes:
        raise EDiTModelError(f"{folder} holds a {name}; EDiT works on {' and '.join(classes)}")
    try:
        model = getattr(diffusers, name).from_pretrained(
            config.parent,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            variant=only_variant(folder, ("transformer",)),
        )
    except EDiTModelError:
        raise
    except (OSError, ValueError) as error:
        raise EDiTModelError(f"{config.parent} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.to(device).eval().requires_grad_(False)
