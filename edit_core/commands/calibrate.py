"""Train EDiT weights from a handful of prompts, on what the teacher sees while it draws.

It is the first stage of a distillation alone, and needs no data set; a full distillation goes further.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..backbones import CELL, identify_module
from ..errors import EDiTError
from ..files import new_output
from ..runtime import DTYPES, progress
from ..weights import EDiTWeights
from .common import (
    Result,
    add_config_arguments,
    add_device_arguments,
    add_trainable_arguments,
    config_of,
    device_of,
    read_prompts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the teacher: a diffusers pipeline's folder")
    parser.add_argument("--prompts", required=True, help="a text file with one prompt per line")
    parser.add_argument("--output", required=True, help="the .safetensors file to write; it must not exist yet")
    parser.add_argument("--weights", default=None, help="EDiT weights to begin with, instead of untrained ones")
    parser.add_argument(
        "--steps", type=int, default=200, help="training steps, each one step of the teacher's sampling"
    )
    parser.add_argument("--lr", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--size", type=int, default=512, help="pixels per side of the pictures that the teacher draws")
    parser.add_argument("--sampler-steps", type=int, default=20, help="sampling steps per picture")
    parser.add_argument("--guidance", type=float, default=4.5, help="the teacher's guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="seeds the pictures and the untrained weights")
    add_device_arguments(parser)
    add_trainable_arguments(parser)
    add_config_arguments(parser)


def run(options: Any) -> Result:
    output, prompts = new_output(options.output), read_prompts(options.prompts)
    if options.steps < 1 or options.sampler_steps < 1:
        raise EDiTError("--steps and --sampler-steps must be at least 1")
    for name, value in (("lr", options.lr), ("guidance", options.guidance)):
        if not 0 < value < math.inf:
            raise EDiTError(f"--{name} must be a number above 0, not {value}")
    try:
        from ..distill.calibrate import calibrate
        from ..distill.encoders import PipelineEncoder
        from ..distill.teacher import load_teacher
    except ImportError as error:
        raise EDiTError(f"calibrate needs {error.name}: install edit-attention[distill]") from None
    device, dtype = device_of(options), DTYPES[options.dtype]
    transformer = load_teacher(Path(options.model), dtype, device)
    identify_module(transformer).backbone.check_size(options.size, options.size, transformer)  # before the encoders
    if options.weights:
        weights = EDiTWeights.load(options.weights)
    else:
        weights = EDiTWeights.init(
            transformer, config_of(options), options.layers, options.seed, options.trainable, options.rank
        )
    encoder = PipelineEncoder(options.model, device, dtype)
    conditions, negative = [encoder.encode_prompts([text]) for text in prompts], encoder.encode_prompts([""])
    del encoder
    bar = iter(progress(range(options.steps), options.steps, "calibrate"))

    def on_step(step: int, loss: float) -> None:
        next(bar, None)

    trained, losses = calibrate(
        transformer,
        weights,
        conditions,
        negative,
        steps=options.steps,
        lr=options.lr,
        height=options.size // CELL,
        width=options.size // CELL,
        sampler_steps=options.sampler_steps,
        guidance=options.guidance,
        seed=options.seed,
        on_step=on_step,
    )
    trained.save(output, replace=False)
    data = {"file": str(output), "losses": losses, "training": trained.training}
    return Result(f"{output}: mean relative error {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps", data)
