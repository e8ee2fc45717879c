"""One server, many prompts: memory does not grow, and an equal prompt gives an equal picture from first to last."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import comfy, models, record
from support.server import Server

PROMPTS = int(os.environ.get("EDIT_TEST_SOAK", "500"))
WARM_UP = PROMPTS // 5
"""Prompts after which the memory is taken as what the server needs."""
BOUND = 64 * 2**20
"""Bytes that it may grow by afterwards: leaking the side weights alone would exceed it in 100 prompts."""
FOUND = comfy.checkouts()
SAMPLING = {"pixart_sigma": ("dpmpp_2m", "sgm_uniform"), "sd35_medium": ("euler", "normal")}
KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "student": {},
    "first block": {"layers": "0"},
    "second step": {"start_percent": 0.5},
}
INTERRUPTED = "interrupted student"

Prompt = dict[str, dict[str, Any]]


def prompt(backbone: str, kind: str, seed: int) -> Prompt:
    """A graph that ends in a latent, with EDiT's node for all kinds but the base."""
    stem, (sampler, scheduler) = f"edit_small_world_{backbone}", SAMPLING[backbone]
    empty = {"pixart_sigma": "EmptyLatentImage", "sd35_medium": "EmptySD3LatentImage"}[backbone]
    nodes: Prompt = {
        "model": {
            "class_type": "EDiTLoadModel",
            "inputs": {
                "model_name": f"diffusion_models/{stem}.safetensors", "weight_dtype": "fp32", "edit_weights": "none",
            },
        },
        "clip": {"class_type": "EDiTSmallWorldText", "inputs": {"backbone": backbone}},
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a large red circle at the top left, on grey rows", "clip": ["clip", 0]},
        },
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["clip", 0]}},
        "latent": {"class_type": empty, "inputs": {"width": 272, "height": 272, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0],
                "latent_image": ["latent", 0], "seed": seed, "cfg": 1.0, "sampler_name": sampler,
                "scheduler": scheduler, "denoise": 1.0,
                "steps": 1000 if kind == INTERRUPTED else 2 if kind == "second step" else 1,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "soak"}},
    }  # fmt: skip
    if kind != "base":
        nodes["edit"] = {"class_type": "EDiTLoadWeights", "inputs": {"edit_name": f"{stem}_student.safetensors"}}
        inputs = {"layers": "all", "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0} | (KINDS.get(kind) or {})
        inputs |= {"model": ["model", 0], "edit_weights": ["edit", 0]}
        nodes["apply"] = {"class_type": "EDiTApply", "inputs": inputs}
        nodes["sample"]["inputs"]["model"] = ["apply", 0]
    return nodes


def rounds(g: random.Random) -> list[tuple[str, str, int]]:
    """Twenty prompts in random order, no two neighbours alike: every kind of both backbones twice, four interrupted."""
    round_ = [(b, kind, seed) for b in models.SHIPPED for kind in KINDS for seed in (1, 2)]
    round_ += [(b, INTERRUPTED, seed) for b in models.SHIPPED for seed in (1, 2)]
    g.shuffle(round_)
    return round_


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason=comfy.NO_COMFYUI)
@pytest.mark.parametrize("checkout", FOUND or [Path("none")], ids=lambda path: path.name)
def test_memory_does_not_grow_and_equal_prompts_give_equal_pictures(checkout: Path, tmp_path: Path) -> None:
    g, first, drawn, interrupted = random.Random(0), {}, 0, 0
    memory: list[int] = []
    started = time.monotonic()
    with Server(checkout, tmp_path) as server:
        while len(memory) < PROMPTS:
            todo = rounds(g)[: PROMPTS - len(memory)]
            queued = [(each, server.submit(prompt(*each))) for each in todo]
            for each, prompt_id in queued:
                if each[1] == INTERRUPTED:
                    interrupt(server, prompt_id, g.random() / 2)
                result = server.wait(prompt_id)
                assert result.interrupted == (each[1] == INTERRUPTED), each
                if result.interrupted:
                    interrupted += 1
                else:
                    (file,) = result.outputs["save"]["latents"]
                    path = tmp_path / "output" / file["subfolder"] / file["filename"]
                    latent = load_file(path)["latent_tensor"]
                    assert torch.equal(first.setdefault(each, latent), latent), f"{each} after {len(memory)} prompts"
                    assert torch.isfinite(latent).all()
                    drawn += 1
                    path.unlink()
                memory.append(server.resident())
    warm, most = memory[WARM_UP - 1], max(memory[WARM_UP:])
    figures = {
        "prompts": len(memory),
        "drawn, each bit-equal to its first": drawn,
        "different prompts": len(first),
        "interrupted": interrupted,
        "warm-up, prompts": WARM_UP,
        "memory after the warm-up, bytes": warm,
        "largest memory later, bytes": most,
        "memory at the end, bytes": memory[-1],
        "growth, bytes": most - warm,
        "bound, bytes": BOUND,
        "memory every 25 prompts, bytes": memory[24::25],
        "seconds": round(time.monotonic() - started),
    }
    record.record("soak", checkout, figures)
    assert most - warm < BOUND, figures


def interrupt(server: Server, prompt_id: str, seconds: float) -> None:
    """Stops a prompt a while after its turn came."""
    while prompt_id not in server.running():
        time.sleep(0.02)
    time.sleep(seconds)
    server.interrupt()
