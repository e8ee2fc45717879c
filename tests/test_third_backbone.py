"""A made-up backbone, described from the root up in one file, goes all the way that the shipped ones go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from support import comfy, pipelines, training
from safetensors.torch import save_file
from support.models import randomise

FOUND = comfy.checkouts()
WIDTH = 72
DESCRIPTION = '''
"""A transformer like PixArt's, of a size of its own."""

from ..attention import Projections
from ..objective import Flow
from .base import Backbone, Base, Condition, Real, attention_linears, count_blocks

_BIAS = {"comfy": "blocks.{}.attn.proj.bias", "diffusers": "transformer_blocks.{}.attn1.to_out.0.bias"}


class MadeUp(Backbone):
    name = "made_up"
    title = "Made-Up"
    sites = ("self",)
    layer = "one attention"
    real = Real(2, 72, 4, prompt_tokens=11, attention_graph=20, block_graph=40)
    objective = Flow(shift=2.0)
    transformer = "PixArtTransformer2DModel"
    pipelines = ("PixArtSigmaPipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    conditions = (
        Condition(
            "prompt_embeds", "encoder_hidden_states", "prompt_embeds", "caption_channels", "y_embedder.y_proj.fc1"
        ),
        Condition("prompt_mask", "encoder_attention_mask", "prompt_attention_mask"),
    )
    limits = {"tokenizer": ("T5's 11 tokens", 11)}
    comfy_arguments = ("x", "mask", "HW", "block_id")
    comfy_harmless = frozenset({"x", "HW", "block_id", "transformer_options"})

    def match(self, shapes):
        for host, bias in _BIAS.items():
            depth = count_blocks(shapes, bias)
            if depth and "context_embedder.bias" not in shapes:
                return Base(self, host, shapes[bias.format(0)][0], (("self",),) * depth)
        return None

    def linears(self, block, site):
        return attention_linears(self.diffusers_path(block, site), self.comfy_path(block))

    def diffusers_path(self, block, site):
        return f"transformer_blocks.{block}.attn1"

    def model_options(self, blocks, side):
        return {
            "num_layers": blocks, "num_attention_heads": 4, "attention_head_dim": 18, "cross_attention_dim": 72,
            "caption_channels": 72, "out_channels": 4, "sample_size": 64, "use_additional_conditions": False,
        }

    def call_arguments(self, latent, timestep, condition, device):
        sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return super().call_arguments(latent, timestep, condition, device) | sizes

    def encode(self, pipeline, texts, device, clean=False):
        embeds, mask, _, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device, max_sequence_length=11
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}

    def draw_arguments(self, condition, negative):
        return super().draw_arguments(condition, negative) | {"negative_prompt": None, "use_resolution_binning": False}

    def comfy_path(self, block):
        return f"blocks.{block}.attn"

    def comfy_image_tokens(self, x, *args, **kwargs):
        return x.shape[1]

    def comfy_forward(self, module, sides, call, x, *args, **kwargs):
        base = Projections(*module.qkv(x).chunk(3, dim=-1))
        return module.proj(sides["self"](x, base, call.grid, module.num_heads, softmax=call.softmax))


BACKBONE = MadeUp()
'''
CHILD = """
import contextlib, io, json, sys
import torch
torch.set_num_threads(1)
from edit_core.cli import main
for command in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(command)
    assert status == 0, command
    print(json.dumps([command[0], said.getvalue()]))
from edit_core import EDiTWeights, apply_edit
from edit_core.backbones import Backbone, backbone_named
from edit_core.models import random_inputs, random_transformer
backbone = backbone_named("made_up")
assert not [name for name in Backbone.__annotations__ if not hasattr(backbone, name)], "all that a description says"
model = random_transformer(backbone)
inputs = random_inputs(model, backbone, 128, 2)
before = model(**inputs)[0]
with apply_edit(model, EDiTWeights.init(model)):
    assert not torch.equal(model(**inputs)[0], before)
assert torch.equal(model(**inputs)[0], before)
"""


def build(folder: Path) -> Path:
    """A whole pipeline of it, and pictures."""
    transformer: Any = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=18, cross_attention_dim=WIDTH, caption_channels=WIDTH,
        out_channels=4, sample_size=64, use_additional_conditions=False,
    )  # fmt: skip
    randomise(transformer, 0)
    PixArtSigmaPipeline(
        tokenizer=pipelines.t5_tokenizer(),
        text_encoder=pipelines.t5(WIDTH),
        vae=pipelines.vae(4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ).save_pretrained(folder / "model")
    training.draw_images(folder / "images", 6)
    (folder / "prompts.txt").write_text("a red ship\n")
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pack with one file more, and without PixArt's, whose tensors the made-up one has."""
    folder = tmp_path_factory.mktemp("pack")
    without = shutil.ignore_patterns("__pycache__", "pixart_*.py")
    for part in ("edit_core", "nodes", "locales", "web"):
        shutil.copytree(comfy.PACK / part, folder / part, ignore=without)
    shutil.copy(comfy.PACK / "__init__.py", folder)
    (folder / "edit_core" / "backbones" / "made_up.py").write_text(DESCRIPTION)
    return folder


@pytest.fixture(scope="module")
def said(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What every command said, in a process of its own."""
    folder = build(tmp_path_factory.mktemp("made_up"))
    student = ["--weights", "student.safetensors"]
    run = [
        "model=model", "cache=cache", "output=run", "device=cpu",
        *(f"stages.{i}.{x}" for i in range(2) for x in ("resolution=128", "steps=1")),
        "watch={held_out: 1, evaluate_every: 1, preview_every: 1, preview_pictures: 1, preview_steps: 1}",
    ]  # fmt: skip
    small = ["--sampler-steps", "1", "--size", "128"]
    commands = [
        ["init", "model", "first.safetensors"],
        ["info", "model"],
        ["info", "first.safetensors", "--base", "model"],
        ["cache", "--model", "model", "--images", "images", "--output", "cache", "--resolutions", "128",
         "--bucket-step", "32", "--dtype", "float32"],
        ["distill", "--config", "debug", *run, "--estimate"],
        ["distill", "--config", "debug", *run],
        ["convert", "run/checkpoints/00000002", "--output", "student.safetensors"],
        ["calibrate", "--model", "model", "--prompts", "prompts.txt", "--output", "c.safetensors", "--steps", "2",
         *small],
        ["eval", "--model", "model", *student, "--output", "eval", "--prompts", "prompts.txt", "--steps", "1",
         "--size", "128"],
        ["plan", "--model", "model", *student, "--cache", "cache", "--resolution", "128", "--size", "128", "--batches",
         "1", "--repeats", "1"],
        ["bench", "--backbone", "made_up", "--sizes", "128", "--repeats", "1", "--contenders", "teacher", "paper",
         "--verify", "--level", "layer", "transformer"],
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(pack), "XDG_CACHE_HOME": str(folder)}
    process = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(commands), cwd=folder, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    found: dict[str, list[str]] = {}
    for line in process.stdout.splitlines():
        command, text = json.loads(line)
        found.setdefault(command, []).append(text)
    return found


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("init", "of Made-Up (2 blocks, 72 channels, diffusers names)"),
        ("info", "Made-Up (2 blocks, 72 channels, diffusers names)"),
        ("cache", "cache: 6 images; cached 6 at 128"),
        ("distill", "transfer at 128"),
        ("convert", "student.safetensors"),
        ("calibrate", "mean relative error"),
        ("eval", "eval/index.html"),
        ("plan", "Made-Up, 128² pixels"),
        ("bench", "| Made-Up, one attention | 128² | 64 |"),
        ("bench", "| Made-Up, 2 blocks | 128² | 64 |"),
    ],
)
def test_a_third_backbone_is_one_new_file(command: str, part: str, said: dict[str, list[str]]) -> None:
    assert part in said[command][0], said[command][0]


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
def test_a_third_backbone_works_in_comfyui(pack: Path, tmp_path: Path) -> None:
    models_folder, check = tmp_path / "models" / "diffusion_models", "check_the_made_up_one_in_all_nodes[made_up]"
    models_folder.mkdir(parents=True)
    model = comfy.base_model("pixart_sigma")  # whose tensors ComfyUI has a class for
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, models_folder / "made_up.safetensors")
    script, newest = Path(__file__).parent / "comfyui" / "made_up.py", max(FOUND, key=comfy.version)
    outcome = comfy.run_checks(script, newest, tmp_path, check, pack=pack)[check]
    assert outcome["ok"], outcome["error"]
    assert "Made-Up" in outcome["figures"]["table"], outcome["figures"]
