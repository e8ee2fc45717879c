"""The small world's shipped files: where they are, and how they are written and read (ours).

They lie in folders that are called as ComfyUI's model folders are, since the pack adds each to ComfyUI's of that name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import EDiTModelError
from ..files import write_file
from .codec import CHANNELS
from .teachers import build, scheduler
from .vae import comfyui_state, from_comfyui

__all__ = [
    "FOLDERS", "about", "export_pipeline", "load_teacher", "load_vae", "save_teacher", "save_vae", "shipped",
]  # fmt: skip

FOLDERS = {kind: Path(__file__).with_name("models") / kind for kind in ("diffusion_models", "vae", "edit")}
"""Teachers, their VAEs, and EDiT weights for them."""

_NAMES = {
    "diffusion_models": "edit_small_world_{}.safetensors",
    "vae": "edit_small_world_{}_vae.safetensors",
    "edit": "edit_small_world_{}_student.safetensors",
}
_FORMAT = "edit_small_world"
_TABLE = "pos_embed.pos_embed"
"""SD3.5's positions: large, and the same in every model of this size."""


def shipped(kind: str, backbone: str) -> Path:
    """Where a backbone's file is.

    Args:
        kind: a key of FOLDERS.
        backbone: `pixart_sigma` or `sd35_medium`.
    """
    return FOLDERS[kind] / _NAMES[kind].format(backbone)


def save_teacher(path: Path, backbone: str, transformer: Any, training: Mapping[str, Any]) -> None:
    """Writes a teacher in float16, under diffusers' names and without the table of positions.

    Args:
        path: the file; its folder must be there.
        backbone: `pixart_sigma` or `sd35_medium`.
        transformer: of diffusers, as :func:`edit_core.world.teachers.build` makes it.
        training: what :func:`about` is to tell of it, such as steps and accuracy.
    """
    state = {key: value.half().contiguous() for key, value in transformer.state_dict().items() if key != _TABLE}
    _write(path, backbone, state, training)


def load_teacher(source: str | Path) -> Any:
    """A teacher's diffusers transformer, in float32.

    Args:
        source: a backbone's name for the shipped one, or a file's path.

    Raises:
        EDiTModelError: there is no such file, it holds something else, or diffusers is not installed.
    """
    backbone, _, state = _read(_path("diffusion_models", source))
    model = build(backbone)
    table = {key: value for key, value in model.state_dict().items() if key == _TABLE}
    model.load_state_dict({**state, **table})
    return model.eval().requires_grad_(False)


def save_vae(path: Path, backbone: str, vae: Any, training: Mapping[str, Any]) -> None:
    """Writes an `AutoencoderTiny` in float16 as ComfyUI's Load VAE takes it; arguments as of :func:`save_teacher`."""
    state = comfyui_state(backbone, vae)
    _write(path, backbone, {key: value.half() if value.ndim else value for key, value in state.items()}, training)


def load_vae(source: str | Path) -> Any:
    """The `AutoencoderTiny` of a backbone's shipped file or of a file, in float32.

    Raises:
        EDiTModelError: as for :func:`load_teacher`.
    """
    return from_comfyui(_read(_path("vae", source))[2])


def about(source: str | Path) -> dict[str, Any]:
    """What a teacher's file tells of its training.

    Raises:
        EDiTModelError: as for :func:`load_teacher`.
    """
    return _read(_path("diffusion_models", source))[1]


def export_pipeline(backbone: str, folder: Path) -> None:
    """Writes the shipped teacher as a diffusers pipeline's folder, for `model` in a configuration of `distill`.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        folder: it and `transformer`, `vae` and `scheduler` in it are made. There is no text encoder to save.

    Raises:
        EDiTModelError: as for :func:`load_teacher`.
    """
    load_teacher(backbone).save_pretrained(folder / "transformer")
    load_vae(backbone).save_pretrained(folder / "vae")
    scheduler(backbone).save_pretrained(folder / "scheduler")


def _path(kind: str, source: str | Path) -> Path:
    return shipped(kind, str(source)) if source in CHANNELS else Path(source)


def _write(path: Path, backbone: str, tensors: dict[str, Tensor], training: Mapping[str, Any]) -> None:
    metadata = {"format": _FORMAT, "format_version": "1", "backbone": backbone, "training": json.dumps(dict(training))}
    write_file(path, save(tensors, metadata))


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """A file's backbone, what it tells of its training, and its tensors in float32."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).to(torch.float32) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EDiTModelError(f"{path}: cannot be read ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise EDiTModelError(f"{path}: not a file of the small world")
    return metadata["backbone"], json.loads(metadata["training"]), tensors
