"""Trains a decoder of the world's codec on fresh scenes: `tools/world decoder --backbone … --output …` (ours)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from edit_core.distill.encoders import CELL
from edit_core.files import write_file
from edit_core.world.codec import CHANNELS, encode
from edit_core.world.scenes import Scene
from edit_core.world.vae import Decoder

__all__ = ["main", "train"]


def train(backbone: str, output: Path, minutes: float, side: int = 128, batch: int = 4, rate: float = 2e-3) -> float:
    """Trains a decoder on fresh scenes and writes it to a file; returns the last mean absolute error, in levels of 255.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        output: the file; one that is there is trained on.
        minutes: how long.
        side: pixels per side of the crops.
        batch: crops per step.
        rate: learning rate at the start; it falls to zero.
    """
    torch.manual_seed(0)
    decoder = Decoder(CHANNELS[backbone])
    if output.exists():
        decoder.load_state_dict(load_file(output))
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=0)
    rng = np.random.Generator(np.random.PCG64())
    start, steps, error = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = rate * min(1, (steps + 1) / 50) * (1 - done)
        crops = []
        for _ in range(batch):
            picture = Scene.random(rng).draw(256, 256)
            y, x = (CELL * int(rng.integers((256 - side) // CELL + 1)) for _ in range(2))
            crops.append(picture[y : y + side, x : x + side])
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        latent = encode(backbone, pixels)
        latent += torch.rand(batch, 1, 1, 1) * 0.1 * torch.randn_like(latent)  # as diffusion's latents are not clean
        loss = F.l1_loss(decoder(latent), pixels / 255)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        steps += 1
        error += (float(loss.detach()) * 255 - error) * max(0.02, 1 / steps)
        if steps % 100 == 0:
            print(json.dumps({"step": steps, "error": round(error, 3), "done": round(done, 3)}), flush=True)
    write_file(output, save(decoder.state_dict()))
    return error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/world decoder", description=__doc__)
    parser.add_argument("--backbone", choices=[*CHANNELS], required=True)
    parser.add_argument("--output", type=Path, required=True, help="the decoder's .safetensors")
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    train(options.backbone, options.output, options.minutes)
