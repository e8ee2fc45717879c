"""The small world's shipped files, stood in for by random ones of the same form."""

from __future__ import annotations

from pathlib import Path

import torch

from edit_core.world.codec import CHANNELS
from edit_core.world.files import load_teacher, save_teacher, save_vae, shipped
from edit_core.world.teachers import build
from edit_core.world.vae import Decoder, tiny

from . import models


def file(folder: Path, kind: str, backbone: str) -> Path:
    """A shipped file's place in a folder of model folders."""
    return folder / kind / shipped(kind, backbone).name


def write_files(folder: Path) -> None:
    """Teachers, VAEs and students with random weights, in the folders of a ComfyUI models folder."""
    for kind in ("diffusion_models", "vae", "edit"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for backbone in CHANNELS:
        model = build(backbone)
        models.randomise(model, seed=1)
        save_teacher(file(folder, "diffusion_models", backbone), backbone, model, {"steps": 0})
        save_vae(file(folder, "vae", backbone), backbone, tiny(backbone, decoder(backbone)), {})
        # Of the teacher as it was stored, which a fingerprint in the weights remembers.
        student = models.trained_like(load_teacher(file(folder, "diffusion_models", backbone)))
        student.save(file(folder, "edit", backbone))


def decoder(backbone: str) -> Decoder:
    """A random decoder whose pictures are grey with contrast."""
    torch.manual_seed(0)
    made = Decoder(CHANNELS[backbone])
    with torch.no_grad():
        made.last.weight.mul_(0.2 / made(torch.randn(1, CHANNELS[backbone], 16, 16)).std())
    return made
