"""Trains a small teacher on endless fresh scenes: `tools/world train --backbone … --output …` (ours).

A run is its folder: `state.safetensors` (weights, their average, the optimiser; written whole or not at all),
`log.jsonl` and pictures. A stopped run goes on with `--resume`: every sample follows from its number.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from edit_core.backbones import backbone_named
from edit_core.distill.sampling import grid
from edit_core.errors import EDiTError
from edit_core.files import write_file
from edit_core.world.codec import draw_scenes, encode
from edit_core.world.draw import draw
from edit_core.world.reader import right
from edit_core.world.scenes import HELD_OUT, Scene
from edit_core.world.teachers import build
from edit_core.world.text import WorldText

from .optim import Optimiser

__all__ = ["Stage", "Trainer", "load_run", "main"]

STATE = "state.safetensors"
_DROPOUT, _WARMUP, _CONSTANT, _FALL, _EMA = 0.1, 200, 2000, 0.2, 0.999
SHIFT = {"pixart_sigma": 1.0, "sd35_medium": 3.0}
"""Of the times, towards noise, where the phase of a picture's texture is decided."""
_LOG_EVERY = 25


class Stage(NamedTuple):
    """What is trained on until a step."""

    until: int
    batch: int
    sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels; one is drawn per step."""


# As the real models were trained: what a caption means is learnt at few tokens, where a sample costs a quarter, then
# the size grows. Batches are small since steps are what a young model lacks. The last stage has no end.
STAGES = (
    Stage(2000, 24, ((128, 128),)),
    Stage(3500, 12, ((256, 256), (256, 256), (256, 256), (320, 208), (208, 320))),
    Stage(1 << 62, 9, ((256, 256), (256, 256), (256, 256), (320, 320), (384, 384), (384, 256), (256, 384))),
)


class Trainer:
    """One teacher's training.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        output: the run's folder.
        rate: learning rate after the warm-up; it falls with the root of the steps, so that a run may end any time.
        finish: the step at which a run does end; over the last fifth of the steps before it the rate falls to zero.
        stages: see :class:`Stage`.
        seed: of the weights and of the samples' numbers.
        muon: or AdamW alone.
    """

    def __init__(
        self,
        backbone: str,
        output: Path,
        rate: float = 2e-3,
        stages: Sequence[Stage] = STAGES,
        seed: int = 0,
        muon: bool = True,
        finish: int | None = None,
    ) -> None:
        self.finish = finish
        self.backbone, self.output, self.rate, self.stages, self.seed = backbone, output, rate, stages, seed
        self.text = WorldText()
        self.model: Any = build(backbone, seed).train()
        self.average: Any = build(backbone, seed).requires_grad_(False)
        self.optimiser = Optimiser(self.model, muon=muon)
        self.samples = 0
        self.seconds = 0.0
        self._parameters: list[list[Tensor]] = [list(m.parameters()) for m in (self.average, self.model)]

    @property
    def steps(self) -> int:
        return self.optimiser.steps

    def step(self) -> tuple[float, float, float]:
        """Trains on one batch of new scenes; returns the mean error, the weighted one, and the gradients' norm."""
        stage = next(s for s in self.stages if self.steps < s.until)
        numbers = range(self.samples, self.samples + stage.batch)
        choice = np.random.Generator(np.random.PCG64([self.seed, self.steps, 1]))
        width, height = stage.sizes[int(choice.integers(len(stage.sizes)))]
        scenes = [Scene.random((self.seed << 32) + number) for number in numbers]
        latent = encode(self.backbone, draw_scenes(scenes, width, height).permute(0, 3, 1, 2))  # (B, c, h, w)
        dropped = choice.random(stage.batch) < _DROPOUT
        captions = ["" if drop else scene.caption for drop, scene in zip(dropped, scenes, strict=True)]
        condition = self.text.encode_prompts(captions)
        generators = [torch.Generator().manual_seed((self.seed << 32) + number) for number in numbers]
        known = backbone_named(self.backbone)
        noised = known.objective.noise_batch(latent, generators, "logit_normal", SHIFT[self.backbone])
        arguments = known.call_arguments(noised.latent, noised.timestep, condition, latent.device)
        output = known.objective.prediction(self.model(**arguments)[0])
        errors = (output - known.objective.target(latent, noised)).square().mean((1, 2, 3))  # (B,)
        loss = (errors * noised.weight).mean()
        self.optimiser.zero_grad()
        loss.backward()
        rate = self.rate * min(1, (self.steps + 1) / _WARMUP) / max(1, self.steps / _CONSTANT) ** 0.5
        if self.finish:
            rate *= min(1, (self.finish - self.steps) / (_FALL * self.finish))
        norm = self.optimiser.step(rate)
        decay = min(_EMA, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self._parameters[0], self._parameters[1], 1 - decay)
        self.samples += stage.batch
        return float(errors.detach().mean()), float(loss.detach()), norm

    def save(self) -> None:
        """Writes the run's state."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"optimiser.{k}": v for k, v in self.optimiser.state.items()}
        about = {
            "backbone": self.backbone, "steps": self.steps, "samples": self.samples, "seconds": self.seconds,
            "seed": self.seed,
        }  # fmt: skip
        metadata = {"run": json.dumps(about)}
        write_file(self.output / STATE, save({k: v.contiguous() for k, v in tensors.items()}, metadata))

    def resume(self) -> None:
        """Goes on from the folder's state.

        Raises:
            EDiTError: there is none, or it is another backbone's.
        """
        about, tensors = _read(self.output / STATE)
        if about["backbone"] != self.backbone:
            raise EDiTError(f"{self.output / STATE}: a {about['backbone']}, and this is a {self.backbone}")
        self.model.load_state_dict(_part(tensors, "model."))
        self.average.load_state_dict(_part(tensors, "average."))
        self.optimiser.load(_part(tensors, "optimiser."), about["steps"])
        self.samples, self.seconds, self.seed = about["samples"], about["seconds"], about["seed"]

    def evaluate(self, count: int = 32, side: int | None = None) -> dict[str, float]:
        """Draws held-out captions with the averaged weights, reads the pictures, and saves the first in a grid."""
        stage = next(s for s in self.stages if self.steps < s.until)
        side = side or stage.sizes[0][0]
        scenes = [Scene.random(HELD_OUT + i) for i in range(count)]
        captions, seeds = [scene.caption for scene in scenes], list(range(count))
        pictures = draw(self.backbone, self.average, captions, seeds, side, side)
        folder = self.output / "pictures"
        folder.mkdir(exist_ok=True)
        grid([pictures[i : i + 8] for i in range(0, min(count, 32), 8)]).save(folder / f"{self.steps:06d}.png")
        return {"side": side, **right(pictures.numpy(), scenes)}

    def log(self, **values: Any) -> None:
        """Appends a line to the run's log."""
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def run(self, minutes: float, save_every: float = 3.0, evaluate_every: float = 12.0) -> None:
        """Trains for so many minutes, to its last step, or until SIGTERM or SIGINT; saves at the end and in between."""
        stopped = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True

        before = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
        start = saved = looked = ticked = time.monotonic()
        losses: list[tuple[float, float, float]] = []
        try:
            while not stopped and time.monotonic() - start < minutes * 60 and self.steps != self.finish:
                losses.append(self.step())
                now = time.monotonic()
                self.seconds, ticked = self.seconds + now - ticked, now
                if self.steps % _LOG_EVERY == 0:
                    loss, weighted, norm = np.mean(losses, axis=0).tolist()
                    pace = self.seconds / self.steps
                    self.log(
                        step=self.steps, samples=self.samples, loss=loss, weighted=weighted, norm=norm,
                        seconds_per_step=pace,
                    )  # fmt: skip
                    losses.clear()
                if now - saved > save_every * 60:
                    self.save()
                    saved = now
                if now - looked > evaluate_every * 60:
                    self.log(step=self.steps, accuracy=self.evaluate())
                    looked = ticked = time.monotonic()
        finally:
            self.save()
            for number, handler in before:
                signal.signal(number, handler)


def load_run(path: Path) -> tuple[dict[str, Any], Any]:
    """What a run tells of itself (`backbone`, `steps`, `samples`) and its transformer with the averaged weights.

    Args:
        path: the run's folder.

    Raises:
        EDiTError: it holds no state.
    """
    about, tensors = _read(path / STATE)
    model = build(about["backbone"])
    model.load_state_dict(_part(tensors, "average."))
    return about, model.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["run"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - is no mapping
    except Exception as error:  # a missing or damaged file raises every kind there is
        raise EDiTError(f"{path}: is no state of a teacher's training ({error})") from None


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/world train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", choices=["pixart_sigma", "sd35_medium"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--minutes", type=float, default=120, help="stop after so long")
    parser.add_argument("--finish", type=int, help="the last step; the rate falls to zero over the last fifth")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    parser.add_argument("--adamw", action="store_true", help="without Muon")
    parser.add_argument("--resume", action="store_true", help="go on with the folder's state")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two runs side by side are faster than one on two cores
    options.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        options.backbone, options.output, options.rate, seed=options.seed, muon=not options.adamw, finish=options.finish
    )
    if options.resume:
        trainer.resume()
    elif (options.output / STATE).exists():
        parser.error(f"{options.output} holds a run already: --resume it, or choose another folder")
    trainer.run(options.minutes)
