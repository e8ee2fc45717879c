"""Puts a trained teacher, its decoder or a student among the shipped files: `tools/world ship` (ours)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from edit_core.weights import EDiTWeights
from edit_core.world.codec import CHANNELS
from edit_core.world.draw import held_out, pictures
from edit_core.world.files import save_teacher, save_vae, shipped
from edit_core.world.reader import right
from edit_core.world.vae import Decoder, tiny

from .train import load_run

__all__ = ["main"]

SIZE = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/world ship",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", choices=[*CHANNELS], required=True)
    parser.add_argument("--run", type=Path, help="the folder of a teacher's training")
    parser.add_argument("--pictures", type=int, default=128, help="with --run: that its accuracy is measured on")
    parser.add_argument("--decoder", type=Path, help="a decoder's .safetensors")
    parser.add_argument("--student", type=Path, help="EDiT weights for the shipped teacher")
    options = parser.parse_args(arguments)
    backbone: str = options.backbone
    torch.set_num_threads(1)
    if options.run:
        about, transformer = load_run(options.run)
        asked = held_out(options.pictures)
        drawn = pictures(backbone, transformer, asked, SIZE)
        found = right(drawn.numpy(), asked)
        training = {"steps": about["steps"], "samples": about["samples"], f"accuracy at {SIZE}": found}
        path = _place("diffusion_models", backbone)
        save_teacher(path, backbone, transformer, training)
        print(f"{path}: {found['all']:.1%} of the attributes right; {found}")
    if options.decoder:
        decoder = Decoder(CHANNELS[backbone])
        decoder.load_state_dict(load_file(options.decoder))
        path = _place("vae", backbone)
        save_vae(path, backbone, tiny(backbone, decoder), {})
        print(path)
    if options.student:
        weights = EDiTWeights.load(options.student)
        half = {name: tensor.half() for name, tensor in weights.tensors.items()}
        path = _place("edit", backbone)
        replace(weights, tensors=half).save(path)
        print(path)


def _place(kind: str, backbone: str) -> Path:
    path = shipped(kind, backbone)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
