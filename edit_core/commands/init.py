"""Make untrained EDiT weights for a base model.

They start near the model, and are where a distillation begins; by themselves they draw worse than it.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..basefile import BaseFile
from ..files import new_output
from ..layers import format_layers
from ..weights import EDiTWeights
from .common import Result, add_config_arguments, add_trainable_arguments, config_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the base model: a .safetensors file or a diffusers folder")
    parser.add_argument("output", help="the .safetensors file to write; it must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="seeds the 3x3 convolutions")
    add_trainable_arguments(parser)
    add_config_arguments(parser)


def run(options: Any) -> Result:
    output = new_output(options.output)
    file = BaseFile(options.base)
    base = file.identify()
    config, trainable = config_of(options), options.trainable
    weights = EDiTWeights.init_for(
        base, file.tensor, config, options.layers, options.seed, trainable=trainable, rank=options.rank
    )
    weights.save(output, replace=False)
    parameters = sum(t.numel() for t in weights.tensors.values())
    text = f"{output}: {parameters / 1e6:.1f} M parameters for blocks {format_layers(weights.sites)} of {base}"
    return Result(text, {"file": str(output), "parameters": parameters, "backbone": weights.backbone})
