"""Finding ComfyUI, and the files that its checks and servers run on."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from edit_core import EDiTWeights

from . import models

PACK = Path(__file__).resolve().parents[2]
NO_COMFYUI = (
    "no ComfyUI found: set COMFYUI_PATH, or put one in ~/comfy/, or put this pack into its custom_nodes/; "
    "the checks inside ComfyUI are skipped"
)


def checkouts() -> list[Path]:
    """`$COMFYUI_PATH` (several as in PATH), else every ComfyUI in `~/comfy/`, else the one around this pack.

    Raises:
        pytest.UsageError: the variable names something else.
    """
    if named := os.environ.get("COMFYUI_PATH"):
        found = [Path(p) for p in named.split(os.pathsep) if p]
        for path in found:
            if not (path / "comfyui_version.py").is_file():
                raise pytest.UsageError(f"COMFYUI_PATH names {path}, which is no ComfyUI: it has no comfyui_version.py")
        return found
    home = sorted(p.parent for p in (Path.home() / "comfy").glob("*/comfyui_version.py"))
    around = PACK.parent.parent
    return home or ([around] if (around / "comfyui_version.py").is_file() else [])


def version(checkout: Path) -> Version:
    """As its `comfyui_version.py` says."""
    found = re.search(r'__version__ = "(.+)"', (checkout / "comfyui_version.py").read_text(encoding="utf-8"))
    assert found, f"{checkout}: comfyui_version.py names no version"
    return Version(found[1])


def interpreter(checkout: Path) -> str:
    """`$COMFYUI_PYTHON`, else the checkout's own virtual environment, else this one."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    places = [checkout / venv / part for venv in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    return str(next((p for p in places if p.is_file()), sys.executable))


def run_checks(script: Path, checkout: Path, base: Path, *only: str, pack: Path = PACK) -> dict[str, Any]:
    """What the checks of a script in `comfyui/` gave, run inside a ComfyUI with this base directory; by check.

    Args:
        only: the checks to run, each as `check_name[backbone]`; none for all.
        pack: what the ComfyUI loads as the pack.
    """
    models_folder = base / "models/diffusion_models"
    command = [interpreter(checkout), script, checkout, base, pack, models_folder, *only]
    process = subprocess.run(command, capture_output=True, text=True, cwd=base)
    written = base / "results.json"
    assert written.is_file(), process.stdout[-3000:] + process.stderr[-3000:]
    return json.loads(written.read_text())


def checks_of(script: Path, files: Path, tests: Sequence[pytest.Item]) -> Callable[[Path], tuple[Path, dict[str, Any]]]:
    """Runs a script's checks once per ComfyUI, on first use, in a copy of these files: `(the copy, what they gave)`.

    Args:
        tests: that are going to look at them, each at its parameter `check`, or at what its mark `reads` names; no
            other checks are run.
    """

    @functools.cache
    def run(checkout: Path) -> tuple[Path, dict[str, Any]]:
        wanted = set()
        for test in tests:
            given = test.callspec.params  # type: ignore[attr-defined]
            read = [name for mark in test.iter_markers("reads") for name in mark.args]
            if given["checkout"] == checkout:
                wanted |= {f"{name}[{given['backbone']}]" for name in ([given["check"]] if "check" in given else read)}
        base = files.parent / f"{files.name}-{checkout.name}"
        shutil.copytree(files, base)
        return base, run_checks(script, checkout, base, *sorted(wanted))

    return run


def looking(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """The chosen tests of the module whose fixture asks."""
    return [item for item in request.session.items if item.path == request.path and "results" in item.fixturenames]


def base_model(backbone: str) -> torch.nn.Module:
    """The smallest that ComfyUI's detection accepts: real widths for PixArt, fewer blocks."""
    if backbone.startswith("pixart"):
        return models.make(backbone, heads=16, head_dim=72, blocks=2, caption=4096)
    return models.make(backbone, context=4096, pooled=2048)


def write_files(base: Path) -> None:
    """Models, EDiT weights and broken files, in the folders of a ComfyUI base directory."""
    for folder in ("models/diffusion_models", "models/checkpoints", "models/edit", "custom_nodes", "input", "output"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    bases, edits = base / "models/diffusion_models", base / "models/edit"
    for backbone in models.BACKBONES:
        model = base_model(backbone)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, bases / f"{backbone}.safetensors")
        models.trained_like(model).save(edits / f"{backbone}.safetensors")

    write_foreign_models(bases)
    cut(bases / "sd35_medium.safetensors", bases / "cut.safetensors")

    weights = edits / "pixart_sigma.safetensors"
    cut(weights, edits / "cut.safetensors")
    (base / "models/checkpoints/edit_by_mistake.safetensors").write_bytes(weights.read_bytes())
    save_file({"transformer.x.lora_A.weight": torch.zeros(4)}, edits / "lora.safetensors")
    tampered = EDiTWeights.load(weights)
    tampered.tensors["1.self.local.weight"] = torch.zeros(1152, 1, 5, 5)
    tampered.save(edits / "wrong_shape.safetensors")
    state = load_file(weights)
    metadata = {"format": "edit", "format_version": "1", "backbone": "pixart_sigma", "config": '{"compression": 8}'}
    save_file(state, edits / "wrong_compression.safetensors", metadata)


def write_foreign_models(folder: Path) -> None:
    """A PixArt with norms of queries and a FLUX, as far as their tensors' names tell."""
    keys = {**models.pixart().state_dict(), "transformer_blocks.0.attn1.norm_q.weight": torch.zeros(4)}
    save_file(keys, folder / "pixart_normed.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, folder / "flux.safetensors")


def cut(source: Path, target: Path) -> None:
    """A copy that lacks its second half, as after an interrupted download."""
    data = source.read_bytes()
    target.write_bytes(data[: len(data) // 2])
