"""The shipped workflows on small random stand-ins for the files that they name."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, SD3ControlNetModel
from PIL import Image
from safetensors.torch import save_file

from . import comfy, models
from .server import Run, Server

WORKFLOWS = comfy.PACK / "workflows"
KINDS = ("_edit", "_ab", "_ab_2048", "_4096", "", "_calibrate", "_benchmark")
NAMES = [backbone + kind for backbone in models.SHIPPED for kind in KINDS]
NAMES += [f"small_world_{backbone}{kind}" for backbone in models.SHIPPED for kind in ("_ab", *KINDS[5:])]
NAMES += ["pixart_alpha" + kind for kind in KINDS[:4]] + ["sd35_large" + kind for kind in KINDS[:3]]
GUIDED = "sd35_medium_lora_controlnet_slg"
NAMES.append(GUIDED)
BACKBONES = {"pixart_sigma": "pixart_sigma", "sd35_medium": "sd35_medium", "pixart_alpha": "pixart_alpha",
             "sd35_large": "sd3"}  # fmt: skip
"""Of each real model that there are templates of, by the templates' name."""
WIDTH, HEIGHT = 320, 256  # PixArt in ComfyUI needs a mean side of more than 256
TEXT_LOADERS = ("CLIPLoader", "TripleCLIPLoader")

Prompt = dict[str, dict[str, Any]]


def api_file(name: str) -> Path:
    return WORKFLOWS / "api" / f"{name}.json"


def read_api(name: str) -> Prompt:
    return json.loads(api_file(name).read_text(encoding="utf-8"))


def random_clip_l() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    width = 768

    def affine(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 0.03 * torch.randn(shape), f"{name}.bias": torch.zeros(shape[0])}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    state = {
        "text_model.embeddings.token_embedding.weight": torch.randn(49408, width),
        "text_model.embeddings.position_embedding.weight": torch.randn(77, width),
        **norm("text_model.final_layer_norm"),
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            state |= affine(f"{layer}.self_attn.{part}_proj", width, width)
        state |= affine(f"{layer}.mlp.fc1", 4 * width, width) | affine(f"{layer}.mlp.fc2", width, 4 * width)
        state |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
    return {key: value.half() for key, value in state.items()}


def random_vae(channels: int) -> dict[str, torch.Tensor]:
    """A TAESD, which Load VAE accepts as a file of its own and which is fast on a CPU."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=channels)
    last = vae.decoder.layers[-1]
    with torch.no_grad():  # mid-grey with contrast, since what is clipped to black hides every difference
        last.bias.zero_()
        last.weight.mul_(0.2 / vae.decoder.layers(torch.randn(1, channels, 16, 16)).std())
        last.bias.fill_(0.5)
    state = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for key, value in vae.state_dict().items():
        side, _, index, rest = key.split(".", 3)
        # ComfyUI counts the decoder's clamp as a layer.
        state[f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    return state


def write_stand_ins(base: Path) -> Path:
    """A models folder with a file under every name that the workflows ask for, but the small world's, whose files the
    pack ships; returns it."""
    comfy.write_files(base)
    folder = base / "models"
    for name in ("vae", "text_encoders", "loras", "controlnet"):
        (folder / name).mkdir()
    save_file(random_clip_l(), folder / "text_encoders" / "random_clip_l.safetensors")
    for name, backbone in BACKBONES.items():
        name_files(folder, name, folder / "diffusion_models" / f"{backbone}.safetensors")
    for node in read_api(GUIDED).values():
        if node["class_type"] == "LoraLoaderModelOnly":
            save_file(random_lora(comfy.base_model("sd35_medium")), folder / "loras" / node["inputs"]["lora_name"])
        elif node["class_type"] == "ControlNetLoader":
            path = folder / "controlnet" / node["inputs"]["control_net_name"]
            save_file({k: v.contiguous() for k, v in random_controlnet().state_dict().items()}, path)
    return folder


def random_controlnet() -> Any:
    """A ControlNet of one block for the small SD3.5, as published ones for SD3.5-Medium are stored."""
    torch.manual_seed(0)
    controlnet = SD3ControlNetModel(
        sample_size=64, num_layers=1, num_attention_heads=3, attention_head_dim=64, caption_projection_dim=192,
        joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=48, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    models.randomise(controlnet, seed=1)
    return controlnet


def random_lora(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA on every linear of a diffusers model's attentions, under the names that diffusers gives one."""
    generator = torch.Generator().manual_seed(9)
    state = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".attn" in name:
            down, up = (4, layer.in_features), (layer.out_features, 4)
            for part, shape in (("lora_A", down), ("lora_B", up)):
                state[f"transformer.{name}.{part}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    return state


def name_files(folder: Path, name: str, model: Path) -> None:
    """Gives a model, a random VAE and empty text encoders the names that a workflow asks for."""
    for node in read_api(f"{name}_edit").values():
        inputs = node["inputs"]
        if node["class_type"] == "EDiTLoadModel":
            os.link(model, folder / inputs["model_name"])
        elif node["class_type"] == "VAELoader":
            save_file(random_vae(4 if name.startswith("pixart") else 16), folder / "vae" / inputs["vae_name"])
        elif node["class_type"] in TEXT_LOADERS:
            # Empty ones, since each run puts the random one in their place.
            for key in inputs.keys() & {"clip_name", "clip_name1", "clip_name2", "clip_name3"}:
                (folder / "text_encoders" / inputs[key]).touch()


def only(prompt: Prompt, kind: str) -> str:
    """The id of a graph's one node of a kind."""
    (found,) = (key for key, node in prompt.items() if node["class_type"] == kind)
    return found


def small(prompt: Prompt, seed: int) -> Prompt:
    """The same graph with few steps, a small picture, the random text encoder and the given seed."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] in TEXT_LOADERS:
            # A CLIP-L alone as for SD3: (1, 77, 4096) and a pooled vector, which is what both models take.
            node["class_type"] = "CLIPLoader"
            node["inputs"] = {"clip_name": "random_clip_l.safetensors", "type": "sd3"}
        elif node["class_type"] == "KSampler":
            inputs["steps"] = 2
            if not isinstance(inputs["seed"], list):
                inputs["seed"] = seed
        elif node["class_type"] == "PrimitiveInt":
            inputs["value"] = seed
        elif node["class_type"] == "EDiTCalibrate":
            inputs |= {"steps": 2, "seed": seed}
        elif node["class_type"] == "EDiTBenchmark":
            inputs |= {"sizes": "288", "repeats": 1}
        elif node["class_type"] == "SkipLayerGuidanceSD3":  # a block that there is, in both of the steps
            inputs |= {"layers": "1", "start_percent": 0.0, "end_percent": 1.0}
        elif node["class_type"].startswith("Empty") or node["class_type"] == "LatentUpscale":
            inputs |= {"width": WIDTH, "height": HEIGHT}
    return prompt


def draw(
    server: Server, name: str, seed: int = 1, edit_name: str | None = None, whole: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The pictures of a workflow, newly sampled, by the file name prefix that they were saved under.

    `edit_name` are EDiT weights for a workflow that has none or asks for others; `whole` leaves steps, sizes and seed
    as they are.
    """
    prompt = read_api(name) if whole else small(read_api(name), seed)
    if edit_name:
        for node in [node for node in prompt.values() if node["class_type"] == "EDiTApply"]:
            prompt["weights"] = {"class_type": "EDiTLoadWeights", "inputs": {"edit_name": edit_name}}
            node["inputs"]["edit_weights"] = ["weights", 0]
    result = server.run(prompt)
    assert not result.cached & {key for key, node in prompt.items() if node["class_type"] == "KSampler"}
    return {node["inputs"]["filename_prefix"]: picture(server, result, key) for key, node in saves(prompt).items()}


def furnished(base: Path, checkout: Path, model_files: Path) -> Path:
    """An empty base directory, now with these models and the picture that ComfyUI comes with."""
    (base / "models").symlink_to(model_files, target_is_directory=True)
    (base / "input").mkdir()
    shutil.copy(checkout / "input" / "example.png", base / "input")
    return base


@pytest.fixture(scope="module", params=comfy.checkouts() or [Path("none")], ids=lambda path: path.name)
def server(
    request: pytest.FixtureRequest, model_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server per ComfyUI found, with the models that a test file's `model_files` gives."""
    if not comfy.checkouts():
        pytest.skip(comfy.NO_COMFYUI)
    base = furnished(tmp_path_factory.mktemp(request.param.name), request.param, model_files)
    with Server(request.param, base) as running:
        yield running


def saves(prompt: Prompt) -> Prompt:
    return {key: node for key, node in prompt.items() if node["class_type"] == "SaveImage"}


def picture(server: Server, result: Run, node: str) -> np.ndarray[Any, Any]:
    (saved,) = result.outputs[node]["images"]
    data = server.get("/view?" + urllib.parse.urlencode(saved))
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))
