"""Checks of differences on the base's own linears; `inside.py` runs them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from typing import Any

from host import (
    BASE,
    FILES,
    apply,
    error,
    load,
    logged,
    lora_for,
    merged,
    record,
    run,
    same,
    sample,
    weights,
    with_lora,
)

import torch
from safetensors.torch import save_file

import comfy.lora
import comfy.model_management


draw = partial(sample, steps=1)


def changed(model: Any, b: str, kind: str) -> Any:
    """The test's weights with differences that matter, and without."""
    w = weights(b)
    made = type(w).init(model.get_model_object("diffusion_model"), w.config, trainable=kind, rank=4)
    differences = {name: t for name, t in made.tensors.items() if name.startswith("base.")}
    shake(differences, 0.01 if kind == "full" else 0.05)
    return replace(w, tensors={**w.tensors, **differences}), w


def shake(tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Makes every tensor matter; `scale` is that of weights."""
    g = torch.Generator().manual_seed(11)
    for name, t in tensors.items():
        t += (scale if name.endswith(".weight") else 0.05) * torch.randn(t.shape, generator=g)


def check_differences_equal_diffusers(b: str) -> Any:
    """Runs the model with every linear changed; the outer test compares with diffusers."""
    base = load(b, "fp32")
    for kind in ("low_rank", "full"):
        w, _ = changed(base, b, kind)
        w.save(BASE / f"{b}-{kind}.safetensors")
        record(apply(base, w), f"{b}-{kind}", 34, 40)


def check_baselines_equal_diffusers(b: str) -> Any:
    """Runs students by the methods that EDiT is compared with; the outer test compares with diffusers."""
    base, made = load(b, "fp32"), weights(b)
    plain, errors = draw(base), {}
    for preset in ("paper", "sana", "linfusion", "kv_compression"):
        config = type(made.config).preset(preset)
        w = type(made).init(base.get_model_object("diffusion_model"), config, trainable="low_rank", rank=4)
        shake(w.tensors, 0.05)
        w.save(BASE / f"{b}-{preset}.safetensors")
        patched = apply(base, w)
        record(patched, f"{b}-{preset}", 34, 40)
        errors[preset] = error(draw(patched), plain)
        same(draw(base), plain, f"base after {preset}")
    assert min(errors.values()) > 1e-3, errors
    return errors


def check_differences_are_unloaded_and_stack_with_loras(b: str) -> Any:
    base = load(b, "fp32")
    (w, sides), lora = changed(base, b, "full"), lora_for(base)
    keys = sorted(map(str, comfy.lora.model_lora_keys_unet(base.model, {})))
    plain, hidden = draw(base), {k: v.clone() for k, v in base.model.state_dict().items()}
    without, full = draw(apply(base, sides)), draw(apply(base, w))
    after, before = draw(with_lora(apply(base, w), lora)), draw(apply(with_lora(base, lora), w))
    same(draw(base), plain, "base after patched runs")
    comfy.model_management.unload_all_models()
    assert all(torch.equal(v, hidden[k]) for k, v in base.model.state_dict().items()), "base weights after unloading"
    assert keys == sorted(map(str, comfy.lora.model_lora_keys_unet(base.model, {}))), "LoRA keys changed"
    fp8 = load(b, "fp8_e4m3fn")
    figures = {
        "effect": error(full, without),
        "effect of a LoRA beside them": error(after, full),
        "LoRA before against after": error(before, after),
        "LoRA against merged by hand": error(draw(apply(merged(load(b, "fp32"), lora), w)), after),
        "effect on an fp8 base": error(draw(apply(fp8, w)), draw(apply(fp8, sides))),
    }
    assert min(figures["effect"], figures["effect of a LoRA beside them"], figures["effect on an fp8 base"]) > 1e-3
    for name in ("LoRA before against after", "LoRA against merged by hand"):
        assert figures[name] < 1e-4, figures
    return figures


def check_differences_say_what_they_do_and_add_up(b: str) -> Any:
    base = load(b, "fp32")
    w, sides = changed(base, b, "full")
    with logged() as lines:
        whole = apply(base, w)
        apply(base, sides, end_percent=0.5)
    assert not any("changed throughout" in line or "add up" in line for line in lines), lines
    for kwargs in ({"end_percent": 0.5}, {"min_tokens": 10**6}):
        with logged() as lines:
            dense = apply(base, w, **kwargs)
        assert sum("changed throughout" in line for line in lines) == 1, lines
    want = draw(whole)  # from here on it is loaded and patched
    with logged() as lines:
        chain = apply(apply(base, w, layers="0"), w, layers="1-" + str(max(w.sites)))
    assert not any("add up" in line for line in lines), lines
    with logged() as lines:
        twice = apply(whole, w, layers="1")
    assert any("changed before; the changes add up" in line for line in lines), lines
    assert len(apply(base, w, layers="1").patches) < len(whole.patches) and not apply(base, sides).patches
    assert apply(base, sides).patches_uuid == base.patches_uuid, "side weights alone make ComfyUI load the model anew"
    same(draw(chain), want, "blocks in two steps")
    assert error(draw(twice), want) > 1e-3
    made = run("EDiTInit", model=base, compression=2, layers="0")  # while the base's biases are changed
    assert made.base_hash == sides.base_hash == weights(b).base_hash
    assert error(draw(dense), draw(base)) > 1e-3, "the base keeps the changes where attention is dense"


def check_a_base_with_differences_baked_in_loads_and_draws_the_same(b: str) -> Any:
    base = load(b, "fp32")
    w, _ = changed(base, b, "low_rank")
    convert = importlib.import_module(type(w).__module__.rpartition(".")[0] + ".convert")
    own = {f"model.diffusion_model.{k}": v for k, v in base.model.diffusion_model.state_dict().items()}
    save_file(own, FILES / f"{b}-own.safetensors")
    sides = convert.merge(w, FILES / f"{b}-own.safetensors", FILES / f"{b}-merged.safetensors")
    figure = error(draw(apply(load(f"{b}-merged", "fp32"), sides)), draw(apply(base, w)))
    assert figure < 1e-5, figure
    return {"baked in against patched": figure}
