"""The small world in every ComfyUI that is found: `comfyui/world.py` inside it, and diffusers beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import comfy, models, world

from edit_core import EDiTWeights, apply_edit
from edit_core.backbones import backbone_named
from edit_core.world.codec import encode
from edit_core.world.draw import draw
from edit_core.world.files import load_teacher, load_vae
from edit_core.world.text import WorldText

SCRIPT = Path(__file__).parent / "comfyui" / "world.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
CHECKS = re.findall(r"^def (check_\w+)", SOURCE, re.MULTILINE)
(CAPTION,) = re.findall(r'^CAPTION = "(.*)"$', SOURCE, re.MULTILINE)
FOUND = comfy.checkouts()
PIXART_SLOW = ["check_edit_and_loras_work_as_on_other_models"]

pytestmark = [
    pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI),
    pytest.mark.parametrize("backbone", models.SHIPPED),
    pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("world")
    world.write_files(base / "models")
    (base / "models" / "checkpoints").mkdir()
    return base


@pytest.fixture(scope="module")
def results(files: Path, request: pytest.FixtureRequest) -> Any:
    return comfy.checks_of(SCRIPT, files, comfy.looking(request))


@pytest.mark.parametrize("check", CHECKS)
def test_inside_comfyui(checkout: Path, check: str, backbone: str, results: Any) -> None:
    outcome = results(checkout)[1][f"{check}[{backbone}]"]
    assert outcome["ok"], outcome["error"]
    print(outcome["figures"])


@pytest.mark.reads("check_output_equals_diffusers")
@pytest.mark.parametrize("size", ["34x40", "40x34"])
@pytest.mark.parametrize("kind", ["base", "edit"])
def test_one_call_gives_what_diffusers_gives(
    checkout: Path, backbone: str, kind: str, size: str, results: Any, files: Path
) -> None:
    caught = load_file(results(checkout)[0] / f"{backbone}-{kind}-{size}.safetensors")
    model = load_teacher(world.file(files / "models", "diffusion_models", backbone))
    if kind == "edit":
        apply_edit(model, EDiTWeights.load(world.file(files / "models", "edit", backbone)))
    # The caption's own embedding, with a mask for PixArt-Σ, in place of what ComfyUI made of it.
    condition = WorldText().encode_prompts([CAPTION])
    with torch.no_grad():
        expected = model(
            **backbone_named(backbone).call_arguments(caught["x"], caught["t"], condition, torch.device("cpu"))
        )[0]
    channels = caught["out"].shape[1]  # ComfyUI drops PixArt's predicted variance
    assert models.relative_error(caught["out"], expected[:, :channels]) < 1e-4


@pytest.mark.reads("check_whole_draw_equals_diffusers")
def test_a_whole_draw_gives_what_diffusers_gives(
    checkout: Path, backbone: str, results: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_file(results(checkout)[0] / f"{backbone}-draw.safetensors")
    model = load_teacher(world.file(files / "models", "diffusion_models", backbone))
    monkeypatch.setattr("edit_core.world.draw.decode", lambda _, latent: latent)
    expected = draw(backbone, model, [CAPTION], [1], width=320, height=272, steps=3).permute(0, 3, 1, 2)
    assert models.relative_error(found["latent"], expected) < 1e-4


@pytest.mark.reads("check_whole_draw_equals_diffusers")
def test_the_vae_gives_what_diffusers_and_the_codec_give(
    checkout: Path, backbone: str, results: Any, files: Path
) -> None:
    found = load_file(results(checkout)[0] / f"{backbone}-draw.safetensors")
    vae = load_vae(world.file(files / "models", "vae", backbone))
    with torch.no_grad():
        expected = vae.decode(found["noise"] / vae.config.scaling_factor).sample
    decoded = found["decoded"].permute(0, 3, 1, 2) * 2 - 1
    assert (decoded - expected.clamp(-1, 1)).abs().max() < 1e-3
    pixels = (found["pixels"].permute(0, 3, 1, 2) * 255).round().byte()
    assert (found["encoded"] - encode(backbone, pixels)).abs().max() < 0.05
