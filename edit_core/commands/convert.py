"""Make EDiT weights from a training's checkpoint, bake their changes into a base model, or split them off again.

The changes are those that a training with trainable=low_rank or full made to the base's attention linears. --merge
writes the changed base, in the base's own format, and beside it OUTPUT's stem + .edit.safetensors with the side weights
that belong to it; it needs memory for the changed linears, and not for the model. --split takes side weights, a base
and the changed base, and writes weights that change the base so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..basefile import BaseFile
from ..distill.checkpoint import from_checkpoint
from ..errors import EDiTError
from ..files import new_output
from ..layers import format_layers
from ..weights import EDiTWeights
from ..weights.convert import merge, split
from .common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a checkpoint's folder (output/checkpoints/NUMBER), or an EDiT weights file")
    parser.add_argument("--output", required=True, help="what to write; it must not exist yet")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--raw", action="store_true", help="of a checkpoint, the weights as trained, not their average")
    kind.add_argument("--merge", metavar="BASE", help="a diffusers folder, or a .safetensors file in any names")
    kind.add_argument("--split", nargs=2, metavar=("BASE", "MERGED"), help="the base without and with the changes")


def run(options: Any) -> Result:
    source, output = Path(options.source), new_output(options.output)
    if source.is_dir() and not options.merge and not options.split:
        weights = from_checkpoint(source, options.raw)
        weights.save(output, replace=False)
        blocks, linears = format_layers(weights.sites), len(weights.differences())
        text = f"{output}: EDiT weights for blocks {blocks}, which change {linears} of the base's linears"
        return Result(text, {"file": str(output), "blocks": blocks, "linears": linears})
    if not options.merge and not options.split:
        raise EDiTError(f"{source} is not a checkpoint's folder; for EDiT weights give --merge or --split too")
    weights = EDiTWeights.load(source)
    file = BaseFile(options.merge or options.split[0])
    warning = weights.warning(file.identify(), file.tensor)
    note = f"; but {warning}" if warning else ""
    if options.merge:
        sides_path = new_output(output.with_name(f"{output.stem}.edit.safetensors"))
        sides = merge(weights, options.merge, output)
        sides.save(sides_path, replace=False)
        count = len(weights.differences())
        text = f"{output}: the base with {count} of its linears changed; {sides_path}: the side weights for it{note}"
        data = {"file": str(output), "weights": str(sides_path), "linears": count, "warning": warning}
        return Result(text, data)
    weights, others = split(weights, *options.split)
    weights.save(output, replace=False)
    lost = f"; {others} other tensors of the two bases differ too, which EDiT weights cannot hold" if others else ""
    data = {"file": str(output), "linears": len(weights.differences()), "lost": others, "warning": warning}
    return Result(f"{output}: EDiT weights that change {data['linears']} linears{lost}{note}", data)
