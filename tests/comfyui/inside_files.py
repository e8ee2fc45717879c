"""Checks of model files under wrappers' names, in parts, and of what is no model; `inside.py` runs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from host import FILES, apply, load, run, same, sample, user_error, weights
import torch
from safetensors.torch import load_file, save_file


def load_file_named(name: str) -> Any:
    return run("EDiTLoadModel", model_name=f"diffusion_models/{name}", weight_dtype="default", edit_weights="none")


def check_a_model_under_a_wrappers_names_draws_what_it_draws(b: str) -> Any:
    base, w = load(b), weights(b)
    plain, edit = sample(base), sample(apply(base, w))
    state = load_file(FILES / f"{b}.safetensors")
    for number, prefix in enumerate(("transformer.", "unet.", "model.diffusion_model._orig_mod.", "diffusion_model.")):
        path = Path(FILES, f"{b}_wrapped_{number}.safetensors")
        save_file({prefix + key: value for key, value in state.items()}, path)
        model = load_file_named(path.name)
        same(sample(model), plain, prefix)
        same(sample(apply(model, w)), edit, f"EDiT, {prefix}")
        factory, arguments = model.cached_patcher_init
        same(sample(factory(*arguments)), plain, "an independent copy")
        path.unlink()
    return None


def check_a_part_of_a_model_and_a_controlnet_are_said_to_be_so(b: str) -> Any:
    state = load_file(FILES / f"{b}.safetensors")
    names, said = sorted(state), []
    for part in (1, 2):
        path = Path(FILES, f"{b}-{part:05}-of-00002.safetensors")
        save_file({k: state[k] for k in names[(part - 1) * len(names) // 2 : part * len(names) // 2]}, path)
        said.append(user_error("is one part of 2: join them", load_file_named, path.name))
        path.unlink()
    path = Path(FILES, f"{b}_odd.safetensors")
    for change, part in (
        ({k: v for k, v in state.items() if "proj_out" not in k}, "it lacks proj_out.bias"),
        ({k: v for k, v in state.items() if "transformer_blocks.0" not in k}, "EDiT works on"),
        ({"lora_unet_blocks_0_attn_qkv.lokr_w1": torch.zeros(2)}, "is a LoKr, not a base model"),
    ):
        save_file(change, path)
        said.append(user_error(part, load_file_named, path.name))
    path.unlink()
    return said


def check_what_a_pickle_holds_beside_its_tensors_is_named(b: str) -> Any:
    state = load_file(FILES / f"{b}.safetensors")
    path, said = Path(FILES, f"{b}.pth"), []
    for held in (argparse.Namespace(lr=1), Path("x")):
        torch.save({"state_dict": state, "args": held}, path)
        said.append(user_error(f"holds {type(held).__module__}", load_file_named, path.name))
    torch.save({"state_dict": state}, path)
    load_file_named(path.name)
    path.unlink()
    return said


def check_a_benchmark_past_the_table_of_positions_is_refused_before_any_call(b: str) -> Any:
    base = load(b)
    most = base.model.diffusion_model.__dict__.get("pos_embed_max_size")
    if most is None:
        assert b.startswith("pixart")
        return None
    return [
        user_error(
            f"draws at most {most * 16} pixels per side, and cannot draw {side}x{side}",
            run, "EDiTBenchmark", model_a=base, model_b=base, sizes=f"512, {side}", repeats=1,
        )
        for side in (most * 16 + 16, 2048)
    ]  # fmt: skip
