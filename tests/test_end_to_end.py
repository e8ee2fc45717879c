"""The whole way at once, as a user goes it: images, cache, training, evaluation, conversion, pictures in both hosts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from support import models, pipelines, training, workflows
from support.server import Server
from support.workflows import HEIGHT, WIDTH, draw, name_files, random_clip_l
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edit_core import EDiTWeights, apply_edit
from edit_core.cli import main
from edit_core.distill.dataset import CachedLatents
from edit_core.distill.teacher import load_teacher

server = workflows.server
PROMPT = "a red ship in the snow"
STEPS = 2
"""Of each stage."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Per backbone, a folder in which every command of a training was run once; made on first use."""
    made: dict[str, Path] = {}

    def get(backbone: str) -> Path:
        if backbone not in made:
            folder = tmp_path_factory.mktemp(backbone)
            run_everything(backbone, folder)
            made[backbone] = folder
        return made[backbone]

    return get


def run_everything(backbone: str, folder: Path) -> None:
    pipelines.build(backbone, folder / "model", for_comfyui=True)
    training.draw_images(folder / "images", 8)
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")

    def edit(*words: str | Path) -> None:
        assert main([str(word) for word in words]) == 0, words[0]

    edit("cache", "--model", folder / "model", "--images", folder / "images", "--output", folder / "cache",
         "--resolutions", str(training.RESOLUTION), "--bucket-step", "32")  # fmt: skip
    # The shipped configuration: low-rank changes of the base, a transfer and a distillation with guidance.
    stages = [f"stages.{i}.{x}" for i in range(2) for x in (f"resolution={training.RESOLUTION}", f"steps={STEPS}")]
    watch = f"watch={{held_out: 2, evaluate_every: {STEPS}, preview_every: {STEPS}, preview_steps: 2}}"
    edit("distill", "--config", "debug", f"model={folder / 'model'}", f"cache={folder / 'cache'}",
         f"output={folder / 'run'}", "device=cpu", *stages, "stages.0.lr=5e-3", "stages.1.lr=1e-3", watch)  # fmt: skip
    checkpoint = folder / "run" / "checkpoints" / f"{2 * STEPS:08d}"
    edit("convert", checkpoint, "--output", folder / "student.safetensors")
    edit("eval", "--model", folder / "model", "--weights", folder / "student.safetensors", "--output", folder / "eval",
         "--prompts", folder / "prompts.txt", "--steps", "2", "--size", str(training.RESOLUTION))  # fmt: skip


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_images_become_a_student_that_draws_in_diffusers(backbone: str, trained: Callable[[str], Path]) -> None:
    folder = trained(backbone)
    check_records(folder / "run", CachedLatents(folder / "cache", training.RESOLUTION, held_out=2))
    student = EDiTWeights.load(folder / "student.safetensors")
    check_student(student, folder)
    check_evaluation(student, folder)

    pipe = DiffusionPipeline.from_pretrained(folder / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False, "clean_caption": False} if backbone == "pixart_sigma" else {}

    def picture(prompt: str = PROMPT) -> np.ndarray[Any, Any]:
        side = training.RESOLUTION
        return pipe(
            prompt, height=side, width=side, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            output_type="np", **extra,
        ).images[0]  # fmt: skip

    teacher = picture()
    handle = apply_edit(pipe.transformer, student)
    drawn = picture()
    assert drawn.shape == (training.RESOLUTION, training.RESOLUTION, 3)
    assert np.isfinite(drawn).all() and drawn.std() > 0.02
    assert not np.array_equal(drawn, teacher)
    assert np.array_equal(picture(), drawn)
    assert not np.array_equal(picture("two green hats at sea"), drawn), "the prompt has no say"
    handle.remove()
    assert np.array_equal(picture(), teacher)


def check_records(run: Path, data: CachedLatents) -> None:
    records = training.metrics(run)
    steps = [record for record in records if record["kind"] != "evaluate"]
    assert [(r["step"], r["stage"], r["kind"]) for r in steps] == [
        (step, int(step > STEPS), "transfer" if step <= STEPS else "distill") for step in range(1, 2 * STEPS + 1)
    ]
    assert all(record["finite"] for record in steps)
    looked = [record for record in records if record["kind"] == "evaluate"]
    assert [record["step"] for record in looked] == [STEPS, 2 * STEPS]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for kind, tag in (
        ("transfer", "loss"),
        ("distill", "prediction"),
        ("distill", "feature"),
        ("evaluate", "attention"),
    ):
        curve = [(event.step, event.value) for event in board.Scalars(f"{kind}/{tag}")]
        written = [(record["step"], record[tag]) for record in records if record["kind"] == kind]
        assert curve == [(step, pytest.approx(value)) for step, value in written]
    pictures = sorted((run / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{step:08d}.png" for step in (STEPS, 2 * STEPS)]
    for path in pictures:
        with Image.open(path) as image:
            sheet = np.asarray(image).astype(int)
        height, width = (8 * cells for cells in data[data.held_out[0]]["latent"].shape[1:])
        assert sheet.shape == (2 * height + 4, 2 * width + 4, 3)
        above, below = sheet[:height], sheet[height + 4 :]
        assert above.std() > 5 and below.std() > 5
        assert not np.array_equal(above, below)


def check_student(student: EDiTWeights, folder: Path) -> None:
    teacher = load_teacher(folder / "model", torch.float32, torch.device("cpu"))
    published = EDiTWeights.load(folder / "run" / "student.safetensors")
    assert student.tensors.keys() == published.tensors.keys()
    assert all(torch.equal(tensor, published.tensors[name]) for name, tensor in student.tensors.items())
    initial = EDiTWeights.init(teacher, published.config, trainable="low_rank", rank=4)
    assert student.tensors.keys() == initial.tensors.keys()
    still = [name for name, tensor in student.tensors.items() if torch.equal(tensor, initial.tensors[name])]
    # A few may be out of every loss's reach: what only text tokens see behind the last joint attention.
    assert len(still) < 0.1 * len(initial.tensors), still
    changed = [name for name in student.tensors if name.startswith("base.") and name not in still]
    assert changed, "the base was not trained"
    training_ = published.training
    assert training_["steps"] == 2 * STEPS
    assert training_["data"]["images"] == {str(training.RESOLUTION): 8}
    assert str(folder) not in json.dumps(training_), "a path was published"
    assert student.base_hash == initial.base_hash


def check_evaluation(student: EDiTWeights, folder: Path) -> None:
    report = json.loads((folder / "eval" / "eval.json").read_text())
    file = folder / "student.safetensors"
    assert report["weights"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["weights"]["base_hash"] == report["model"]["base_hash"]
    scores = report["scores"]
    assert scores["attentions"].keys() == {
        f"{block}.{site}" for block in student.sites for site in student.sites[block]
    }
    assert all(0 < error < 2 for error in (scores["prediction_error"], *scores["attentions"].values()))
    assert (folder / "eval" / "grid.png").is_file() and (folder / "eval" / "index.html").is_file()
    (pair,) = report["pictures"]
    assert pair["prompt"] == PROMPT and pair["psnr"] > 5


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("diffusion_models", "checkpoints", "edit", "vae", "text_encoders"):
        (folder / name).mkdir()
    save_file(random_clip_l(), folder / "text_encoders" / "random_clip_l.safetensors")
    return folder


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_the_same_student_draws_in_comfyui_through_the_shipped_workflow(
    backbone: str, trained: Callable[[str], Path], model_files: Path, server: Server
) -> None:
    sides, whole = f"{backbone}_sides.safetensors", f"{backbone}_student.safetensors"
    if not (model_files / "edit" / sides).exists():  # the first of the servers
        place(trained(backbone), backbone, model_files, sides, whole)
    (plain,) = draw(server, backbone).values()
    (drawn,) = draw(server, f"{backbone}_edit", edit_name=whole).values()
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert drawn.std() > 10
    assert not np.array_equal(drawn, plain)
    (less,) = draw(server, f"{backbone}_edit", edit_name=sides).values()
    assert not np.array_equal(less, drawn), "the student's changes of the base are lost"


def place(folder: Path, backbone: str, model_files: Path, sides: str, whole: str) -> None:
    """Puts teacher and student where the workflow looks for them, and the student without its changes of the base."""
    teacher = folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    name_files(model_files, backbone, teacher)
    os.link(folder / "student.safetensors", model_files / "edit" / whole)
    student = EDiTWeights.load(folder / "student.safetensors")
    alone = {name: tensor for name, tensor in student.tensors.items() if not name.startswith("base.")}
    replace(student, tensors=alone).save(model_files / "edit" / sides)
