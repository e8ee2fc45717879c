"""A small classifier of the world's pictures, in whose features sets of pictures are compared (ours).

It is trained once, frozen and shipped: `tools/world classifier --output …`. Fréchet distances in its
features see what a scene is made of and how it looks, as Inception's do for photographs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edit_core.errors import EDiTError
from edit_core.files import write_file
from edit_core.runtime import progress
from edit_core.world.codec import draw_scenes, through
from edit_core.world.scenes import (
    COLOURS,
    COLUMNS,
    GROUNDS,
    HELD_OUT,
    NUMBERS,
    ROWS,
    SHAPES,
    SIZES,
    SPECIALS,
    TEXTURES,
    Scene,
)

__all__ = ["FEATURES", "SHIPPED", "Classifier", "load", "train"]

FEATURES = 64
SHIPPED = Path(__file__).with_name("classifier.safetensors")
_SIDE = 64
_WIDTHS = (3, 24, 48, 64, 64)
_CHOICES = {"ground": GROUNDS, "texture": TEXTURES, "special": SPECIALS, "dots": ("none", *NUMBERS)}
"""One of each."""
_PRESENT = (*SHAPES, *COLOURS, *SIZES, *(f"{row} {column}" for row in ROWS for column in COLUMNS))
"""Any of them."""
_SIZES = (128, 192, 256)


class Classifier(nn.Module):
    """Four strided convolutions and a layer of features."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(_WIDTHS))
        self.features = nn.Linear(_WIDTHS[-1] * (_SIDE // 16) ** 2, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(options)) for name, options in _CHOICES.items()})
        self.present = nn.Linear(FEATURES, len(_PRESENT))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` uint8 of any size -> features `(B, FEATURES)`, before their rectification."""
        image = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        x = F.interpolate(image, (_SIDE, _SIDE), mode="area")  # (B, 3, 64, 64)
        for conv in self.convs:
            x = F.relu(conv(x))  # (B, c, 4, 4) in the end
        return self.features(x.flatten(1))

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """:meth:`forward` in pieces, without a graph."""
        return torch.cat([self(part) for part in pictures.split(64)])


def _labels(scenes: Sequence[Scene]) -> tuple[dict[str, Tensor], Tensor]:
    """Which one of each choice, `(B,)`, and what is present, `(B, len(_PRESENT))` of 0 and 1."""
    chosen: dict[str, list[int]] = {name: [] for name in _CHOICES}
    present = torch.zeros(len(scenes), len(_PRESENT))
    for i, scene in enumerate(scenes):
        values = {"ground": scene.ground, "texture": scene.texture, "special": scene.special}
        for name, value in values.items():
            chosen[name].append(list(_CHOICES[name]).index(value))
        chosen["dots"].append(scene.dots)
        for thing in scene.things:
            for word in (thing.shape, thing.colour, thing.size, f"{thing.row} {thing.column}"):
                present[i, _PRESENT.index(word)] = 1
    return {name: torch.tensor(values) for name, values in chosen.items()}, present


def _pictures(scenes: Sequence[Scene], size: int, backbone: str | None) -> Tensor:
    """`(B, size, size, 3)` uint8, through a backbone's codec if one is named."""
    pictures = draw_scenes(scenes, size, size)
    return pictures if backbone is None else through(backbone, pictures)


def right(model: Classifier, scenes: Sequence[Scene], size: int, backbone: str | None) -> dict[str, float]:
    """Shares of the labels that it gets right, on pictures of scenes."""
    chosen, present = _labels(scenes)
    with torch.no_grad():
        features = F.relu(model.images(_pictures(scenes, size, backbone)))
        found = {name: (model.heads[name](features).argmax(1) == chosen[name]) for name in _CHOICES}
        shown = (model.present(features) > 0) == present.bool()
    return {name: float(value.float().mean()) for name, value in {**found, "present": shown}.items()}


def train(output: Path, steps: int, batch: int = 64, rate: float = 2e-3, seed: int = 1 << 44) -> Classifier:
    """Trains on fresh scenes and writes the file, in float16.

    Args:
        output: the file.
        steps: of the training.
        batch: pictures per step.
        rate: learning rate at the start; it falls to zero.
        seed: of the first scene.
    """
    torch.manual_seed(0)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    error = 0.0
    for step in progress(range(steps), steps, "classifier"):
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        scenes = [Scene.random(seed + batch * step + i) for i in range(batch)]
        backbone = (None, "pixart_sigma", "sd35_medium")[step % 3]
        chosen, present = _labels(scenes)
        features = F.relu(model(_pictures(scenes, _SIZES[step // 3 % 3], backbone)))
        loss = F.binary_cross_entropy_with_logits(model.present(features), present) * len(_PRESENT) / 4
        for name, head in model.heads.items():
            loss = loss + F.cross_entropy(head(features), chosen[name])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        error += (float(loss.detach()) - error) * max(0.02, 1 / (step + 1))
        if (step + 1) % 50 == 0:
            print(json.dumps({"step": step + 1, "loss": round(error, 4)}), flush=True)
    model.eval().requires_grad_(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, save({name: tensor.half() for name, tensor in model.state_dict().items()}))
    return model


def load(path: Path = SHIPPED) -> Classifier:
    """A classifier from its file, frozen, in float32.

    Raises:
        EDiTError: it cannot be read.
    """
    model = Classifier()
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # a missing or damaged file raises every kind there is
        raise EDiTError(f"{path}: is no classifier of the small world ({error})") from None
    return model.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/world classifier",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=SHIPPED, help="the .safetensors file")
    parser.add_argument("--steps", type=int, default=1200, help="of 64 pictures, two a second")
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = train(options.output, options.steps)
    scenes = [Scene.random(HELD_OUT + i) for i in range(512)]
    for size in _SIZES:
        print(size, {name: round(value, 4) for name, value in right(model, scenes, size, None).items()})
