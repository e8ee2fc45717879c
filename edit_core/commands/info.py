"""Say what a file is: EDiT weights, or a base model that EDiT works on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..basefile import BaseFile
from ..layers import format_layers
from ..weights import EDiTWeights, fingerprint, holds_weights
from ..weights.differences import count_kinds
from .common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a .safetensors file, or a diffusers folder")
    parser.add_argument("--base", help="with EDiT weights: a base model to check them against")


def run(options: Any) -> Result:
    path = Path(options.file)
    file = BaseFile(path)
    if path.is_file() and holds_weights(file.shapes):
        return _weights(path, options.base)
    base = file.identify()
    data = {
        "kind": "base model",
        "backbone": base.backbone.name,
        "names": base.host,
        "blocks": base.depth,
        "dim": base.dim,
        "base_hash": fingerprint(base, file.tensor),
        "doubt": base.doubt,
    }
    return Result(f"{path}: {base}" + (f"; {base.doubt}" if base.doubt else ""), data)


def _weights(path: Path, base_path: str | None) -> Result:
    weights, report = EDiTWeights.load_with_report(path)
    parameters = sum(t.numel() for t in weights.tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors.values()})
    differences = count_kinds(weights.differences())
    data: dict[str, Any] = {
        "kind": "EDiT weights",
        "backbone": weights.backbone,
        "blocks": format_layers(weights.sites),
        "dim": weights.dim,
        "parameters": parameters,
        "dtypes": dtypes,
        "differences": differences,
        "config": json.loads(weights.config.to_json()),
        "training": weights.training,
        "unexpected": list(report.unexpected),
    }
    if base_path is not None:
        file = BaseFile(base_path)
        base = file.identify()
        weights.check_base(base)
        data["fits"] = str(base)
        data["warning"] = weights.warning(base, file.tensor)
    lines = [f"{path}: EDiT weights for {weights.backbone}, {report}"]
    lines.append(f"{parameters / 1e6:.1f} M parameters in {', '.join(dtypes)}; {weights.dim} channels")
    if differences:
        kinds = " and ".join(
            f"{count} {'in full' if kind == 'full' else f'by {kind}'}" for kind, count in differences.items()
        )
        lines.append(f"changes {sum(differences.values())} of the base's linears: {kinds}")
    lines.append(f"config: {weights.config.to_json()}")
    lines.append(f"training: {json.dumps(weights.training) if weights.training else 'none; these are untrained'}")
    if base_path is not None:
        lines.append(f"fits {data['fits']}" + (f"; but {data['warning']}" if data["warning"] else ", its own base"))
    return Result("\n".join(lines), data)
