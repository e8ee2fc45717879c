"""The nodes that train, measure and compare, in every ComfyUI that is found: `comfyui/teaching.py` inside it."""

from __future__ import annotations

import functools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import comfy, models, workflows
from support.server import PACK_NAME, Server

from edit_core import EDiTWeights, apply_edit
from edit_core.distill.losses import TransferTap
from edit_core.similarity import psnr, ssim
from edit_core.world.files import load_teacher, shipped

SCRIPT = Path(__file__).parent / "comfyui" / "teaching.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
FOUND = comfy.checkouts()
PIXART_SLOW = [
    "check_a_teacher_with_a_lora_stays_one",
    "check_calibrating_is_repeatable_and_hears_its_inputs",
    "check_calibrating_lowers_the_errors_and_leaves_the_base_bit_equal",
    "check_low_precision_teachers_can_be_calibrated",
    "check_report_draws_a_chart_and_suggests_layers",
    "check_weights_that_change_the_base_are_calibrated_as_a_whole",
    "test_an_interrupted_calibration_leaves_the_server_usable",
]

pytestmark = [
    pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI),
    pytest.mark.parametrize("backbone", models.SHIPPED),
    pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    base = tmp_path_factory.mktemp("teaching")
    for folder in ("diffusion_models", "checkpoints", "edit"):
        (base / "models" / folder).mkdir(parents=True)
    return comfy.checks_of(SCRIPT, base, comfy.looking(request))


@pytest.mark.parametrize("check", CHECKS)
def test_inside_comfyui(checkout: Path, check: str, backbone: str, results: Any) -> None:
    outcome = results(checkout)[1][f"{check}[{backbone}]"]
    assert outcome["ok"], outcome["error"]
    print(outcome["figures"])


@pytest.mark.reads("check_report_measures_what_diffusers_does")
def test_the_report_gives_what_diffusers_gives(checkout: Path, backbone: str, results: Any) -> None:
    base, _ = results(checkout)
    calls = load_file(base / f"{backbone}-report.safetensors")
    model = load_teacher(shipped("diffusion_models", backbone))
    handle = apply_edit(model, EDiTWeights.load(shipped("edit", backbone)))
    count = len({name.split(".")[0] for name in calls})
    found: dict[str, list[float]] = {}
    for number in range(count):
        call = {k: calls[f"{number}.{k}"] for k in ("x", "t", "context")}
        if backbone == "pixart_sigma":
            extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        else:
            extra = {"pooled_projections": calls[f"{number}.y"]}
        handle.tap = tap = TransferTap(None)
        with torch.no_grad():
            model(call["x"], encoder_hidden_states=call["context"], timestep=call["t"], **extra)
        for key, loss in tap.losses.items():
            found.setdefault(key, []).append(float(loss))
    expected = {key: sum(values) / count for key, values in found.items()}
    reported = json.loads((base / f"{backbone}-report.json").read_text(encoding="utf-8"))
    assert count == 10
    assert reported == pytest.approx(expected, rel=1e-3)


@pytest.mark.reads("check_compare_gives_the_functions_figures")
def test_compare_gives_what_the_functions_give(checkout: Path, backbone: str, results: Any) -> None:
    base, _ = results(checkout)
    pictures = load_file(base / f"{backbone}-compare.safetensors")
    pairs = list(zip(pictures["a"], pictures["b"], strict=True))
    figures = json.loads((base / f"{backbone}-compare.json").read_text(encoding="utf-8"))
    for name, function in (("psnr", psnr), ("ssim", ssim)):
        assert figures[name] == pytest.approx(sum(function(b, a) for a, b in pairs) / len(pairs), rel=1e-6)


# --- through a server, as a user's browser does -----------------------------------------------------------------------


def graph(backbone: str, steps: int) -> dict[str, Any]:
    """Init, calibrate, report, apply what it suggests, compare the pictures, benchmark, save."""
    world = f"edit_small_world_{backbone}"
    channels = "EmptySD3LatentImage" if backbone == "sd35_medium" else "EmptyLatentImage"

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    def sampled(model: list[Any]) -> dict[str, Any]:
        return node(
            "KSampler", model=model, positive=["red", 0], negative=["none", 0], latent_image=["latent", 0], seed=1,
            steps=2, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip

    return {
        "model": node(
            "EDiTLoadModel",
            model_name=f"diffusion_models/{world}.safetensors",
            weight_dtype="default",
            edit_weights="none",
        ),
        "clip": node("EDiTSmallWorldText", backbone=backbone),
        "vae": node("VAELoader", vae_name=f"{world}_vae.safetensors"),
        "red": node("CLIPTextEncode", clip=["clip", 0], text="a large red circle"),
        "none": node("CLIPTextEncode", clip=["clip", 0], text=""),
        "latent": node(channels, width=288, height=272, batch_size=1),
        "init": node("EDiTInit", model=["model", 0], compression=4, layers="all"),
        "calibrate": node(
            "EDiTCalibrate", model=["model", 0], edit_weights=["init", 0], positive=["red", 0], negative=["none", 0],
            latent=["latent", 0], steps=steps, lr=0.005, seed=1,
        ),
        "report": node(
            "EDiTLayerReport", model=["model", 0], edit_weights=["calibrate", 0], conditioning=["red", 0],
            latent=["latent", 0], threshold=0.25,
        ),
        "apply": node(
            "EDiTApply", model=["model", 0], edit_weights=["calibrate", 0], layers=["report", 1], start_percent=0.0,
            end_percent=1.0, min_tokens=0,
        ),
        "plain": sampled(["model", 0]),
        "edit": sampled(["apply", 0]),
        "picture_a": node("VAEDecode", samples=["plain", 0], vae=["vae", 0]),
        "picture_b": node("VAEDecode", samples=["edit", 0], vae=["vae", 0]),
        "compare": node("EDiTCompare", image_a=["picture_a", 0], image_b=["picture_b", 0], gain=4.0),
        "benchmark": node(
            "EDiTBenchmark", model_a=["model", 0], model_b=["apply", 0], sizes="288", repeats=1
        ),
        "save": node("EDiTSaveWeights", edit_weights=["calibrate", 0], filename_prefix=f"server_{backbone}"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Server]]:
    """One server per ComfyUI, started at first use."""
    with ExitStack() as stack:

        @functools.cache
        def start(checkout: Path) -> Server:
            return stack.enter_context(Server(checkout, tmp_path_factory.mktemp(checkout.name)))

        yield start


def test_a_server_runs_them_all(checkout: Path, backbone: str, server_of: Any) -> None:
    server = server_of(checkout)
    outputs = server.run(graph(backbone, steps=3)).outputs
    assert re.fullmatch(r"layers: (none|[0-9, -]+)", outputs["report"]["text"][0])
    assert outputs["compare"]["text"][0].startswith("PSNR ")
    assert "| model a, s per call |" in outputs["benchmark"]["text"][0]
    assert len(outputs["compare"]["a_images"]) == len(outputs["compare"]["b_images"]) == 1
    for node in ("report", "compare", "benchmark"):
        for shown in outputs[node]["images"]:
            assert server.get("/view?" + urllib.parse.urlencode(shown)).startswith(b"\x89PNG")
    assert outputs["save"]["text"][0] == f"models/edit/server_{backbone}_00001_.safetensors"
    page = (comfy.PACK / "web" / "docs" / "EDiTCalibrate.md").read_bytes()
    assert server.get(f"/extensions/{PACK_NAME}/docs/EDiTCalibrate.md") == page


@pytest.mark.slow
def test_the_suggested_layers_keep_the_picture_that_all_layers_spoil(
    checkout: Path, backbone: str, server_of: Any
) -> None:
    if backbone != "sd35_medium":
        pytest.skip("100 steps leave no block of the small PixArt-Σ so bad")
    server, prompt = server_of(checkout), graph(backbone, steps=100)

    def likeness(outputs: dict[str, Any]) -> float:
        return float(re.findall(r"PSNR ([0-9.]+) dB", outputs["compare"]["text"][0])[0])

    outputs = server.run(prompt).outputs
    assert "1" not in outputs["report"]["text"][0]
    suggested = likeness(outputs)
    prompt["apply"]["inputs"]["layers"] = "all"
    assert suggested > likeness(server.run(prompt).outputs) + 2


def test_an_interrupted_calibration_leaves_the_server_usable(checkout: Path, backbone: str, server_of: Any) -> None:
    server, prompt = server_of(checkout), graph(backbone, steps=100_000)
    save = {"class_type": "SaveImage", "inputs": {"images": ["picture_a", 0], "filename_prefix": f"plain_{backbone}"}}
    names = ("model", "clip", "vae", "red", "none", "latent", "plain", "picture_a")
    plain = {**{name: prompt[name] for name in names}, "picture": save}
    names = ("model", "clip", "red", "none", "latent", "init", "calibrate", "save")
    long = {name: prompt[name] for name in names}

    before = workflows.picture(server, server.run(plain), "picture")
    timer = threading.Timer(8, server.interrupt)  # by then it has long begun
    timer.start()
    stopped = server.run(long)
    timer.join()
    again = server.run(plain)
    assert "save" not in stopped.outputs, "it was not interrupted"
    assert "plain" not in again.cached
    assert np.array_equal(workflows.picture(server, again, "picture"), before)
