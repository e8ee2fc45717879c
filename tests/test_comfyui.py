"""The checks of `comfyui/inside*.py`, each run in every ComfyUI that is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import comfy, models

from edit_core import EDiTConfig, EDiTWeights, apply_edit

INSIDE = Path(__file__).parent / "comfyui" / "inside.py"
CHECKS = [
    check
    for path in sorted(INSIDE.parent.glob("inside*.py"))
    for check in re.findall(r"^def (check_\w+)", path.read_text(), re.MULTILINE)
]
FOUND = comfy.checkouts()
PIXART_SLOW = [
    f"check_{name}"
    for name in (
        "a_clone_of_a_loaded_model_is_injected",
        "a_range_from_the_start_holds_the_first_step_at_every_shift",
        "alternating_models_stay_themselves",
        "another_packs_wrapper_may_pass_on_by_name",
        "cfg_with_unequal_prompts_and_batches",
        "clones_do_not_change_their_parent",
        "differences_are_unloaded_and_stack_with_loras",
        "interrupt_leaves_both_usable",
        "lora_works_before_after_and_beside",
        "low_precision_bases_run",
        "other_packs_forward_patch_is_warned_of_and_restored",
        "partial_load",
        "what_stays_dense_says_why_once",
    )
]

RELATIVES = [
    "check_edit_changes_the_output_and_leaves_the_base_bit_equal",
    "check_output_equals_diffusers",
    "check_piecewise_needs_no_weights_and_nothing_is_loaded_for_it",
    "check_the_nodes_that_take_a_model",
    "test_diffusers_and_comfyui_give_the_same_output",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    comfy.write_files(base)
    return base


@pytest.fixture(scope="module")
def results(files: Path, request: pytest.FixtureRequest) -> Any:
    return comfy.checks_of(INSIDE, files, comfy.looking(request))


@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name)
def test_inside_comfyui(checkout: Path, check: str, backbone: str, results: Any) -> None:
    outcome = results(checkout)[1][f"{check}[{backbone}]"]
    assert outcome["ok"], outcome["error"]
    print(outcome["figures"])


@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
@pytest.mark.reads(
    "check_output_equals_diffusers", "check_differences_equal_diffusers", "check_baselines_equal_diffusers"
)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("base", "34x40"),
        ("base", "40x34"),
        ("edit", "34x40"),
        ("edit", "40x34"),
        ("piecewise", "34x40"),
        ("piecewise", "40x34"),
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
    if kind == "piecewise":
        apply_edit(model, EDiTConfig.preset("piecewise"))
    elif kind != "base":
        path = files / "models/edit" / backbone if kind == "edit" else base / f"{backbone}-{kind}"
        apply_edit(model, EDiTWeights.load(path.with_suffix(".safetensors")))
    if backbone.startswith("pixart"):
        height, width = caught["x"].shape[-2:]
        extra: dict[str, Any] = {"added_cond_kwargs": models.sizes(model, len(caught["x"]), height, width)}
    else:
        extra = {"pooled_projections": caught["y"]}
    with torch.no_grad():
        expected = model(caught["x"], encoder_hidden_states=caught["context"], timestep=caught["t"], **extra).sample
    channels = caught["out"].shape[1]  # ComfyUI drops PixArt's predicted variance
    off = (caught["out"] - expected[:, :channels]).double().square().sum(1).flatten()
    error = (off / expected[:, :channels].double().square().sum(1).mean()).sqrt()  # of each token
    if kind == "piecewise":  # of two units that are worth the same to a tile, rounding may choose another
        assert error.quantile(0.9) < 1e-4 and error.square().mean().sqrt() < 1e-3
    else:
        assert error.square().mean().sqrt() < 1e-4
