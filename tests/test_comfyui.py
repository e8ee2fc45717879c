"""The checks of `comfyui/inside*.py`, each run in every ComfyUI that is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import comfy, models

from edit_core import EDiTWeights, apply_edit

INSIDE = Path(__file__).parent / "comfyui" / "inside.py"
CHECKS = [
    check
    for path in sorted(INSIDE.parent.glob("inside*.py"))
    for check in re.findall(r"^def (check_\w+)", path.read_text(), re.MULTILINE)
]
FOUND = comfy.checkouts()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    comfy.write_files(base)
    return base


@pytest.fixture(scope="session")
def results(files: Path) -> Any:
    return comfy.checks_of(INSIDE, files)


@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name)
def test_inside_comfyui(checkout: Path, check: str, backbone: str, results: Any) -> None:
    outcome = results(checkout)[1][f"{check}[{backbone}]"]
    assert outcome["ok"], outcome["error"]
    print(outcome["figures"])


@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("base", "34x40"),
        ("base", "40x34"),
        ("edit", "34x40"),
        ("edit", "40x34"),
        ("low_rank", "34x40"),
        ("full", "34x40"),
        ("paper", "34x40"),
        ("sana", "34x40"),
        ("linfusion", "34x40"),
        ("kv_compression", "34x40"),
    ],
)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name)
def test_diffusers_and_comfyui_give_the_same_output(
    checkout: Path, backbone: str, kind: str, size: str, results: Any, files: Path
) -> None:
    base, _ = results(checkout)
    caught = load_file(base / f"{backbone}-{kind}-{size}.safetensors")
    model = comfy.base_model(backbone)
    if kind != "base":
        path = files / "models/edit" / backbone if kind == "edit" else base / f"{backbone}-{kind}"
        apply_edit(model, EDiTWeights.load(path.with_suffix(".safetensors")))
    if backbone == "pixart_sigma":
        extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    else:
        extra = {"pooled_projections": caught["y"]}
    with torch.no_grad():
        expected = model(caught["x"], encoder_hidden_states=caught["context"], timestep=caught["t"], **extra).sample
    channels = caught["out"].shape[1]  # ComfyUI drops PixArt's predicted variance
    assert models.relative_error(caught["out"], expected[:, :channels]) < 1e-4
