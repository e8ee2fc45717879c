"""Cells of the composition matrix: models that come and go, several at a time, and what is left behind."""

from __future__ import annotations

import gc
from typing import Any

from host import apply, error, logged, lora_for, same, with_lora
from matrix_host import SAMPLING, SIZES, draw, empty, side, teacher, text
import torch

import comfy.model_management
import comfy.sample


def check_models_in_alternation(b: str) -> Any:
    """Unpatched, differently patched and LoRA models of one base in turn: each bit-equal every time."""
    base, w = teacher(b), side(b)
    lora = lora_for(base)
    models = {
        "base": base,
        "student": apply(base, w),
        "first block": apply(base, w, layers="0"),
        "early steps": apply(base, w, end_percent=0.3),
        "student and LoRA": with_lora(apply(base, w), lora),
        "LoRA": with_lora(base, lora),
    }
    first = {name: draw(model, b, 2) for name, model in models.items()}
    drawn = 0
    for order in (list(models), list(models)[::-1], ["base", "student", "base", "first block", "student", "LoRA"]):
        for name in order:
            same(draw(models[name], b, 2), first[name], name)
            drawn += 1
    apart = [error(first[m], first[n]) for i, m in enumerate(models) for n in list(models)[:i]]
    assert min(apart) > 1e-3, "two of the models draw the same"
    return {"drawn again, all bit-equal": drawn, "least difference of two models": min(apart)}


def check_unload_and_reload(b: str) -> Any:
    """Unloaded between runs, as under memory pressure: every run is bit-equal, and the base is whole."""
    base, w = teacher(b), side(b)
    patched = with_lora(apply(base, w), lora_for(base))
    state = {name: t.clone() for name, t in base.model.state_dict().items()}
    plain, edit = draw(base, b), draw(patched, b)
    for _ in range(3):
        comfy.model_management.unload_all_models()
        assert all(torch.equal(state[name], t) for name, t in base.model.state_dict().items()), "weights"
        assert not [name for name, module in base.model.named_modules() if "forward" in module.__dict__]
        same(draw(patched, b), edit, "student after unloading")
        comfy.model_management.unload_all_models()
        same(draw(base, b), plain, "base after unloading")
    return {"unloaded": 6, "tensors of the base, bit-equal": len(state)}


def check_forgotten_models_leave_the_base(b: str) -> Any:
    """A patched model that ComfyUI's cache drops takes everything with it."""
    base, w = teacher(b), side(b)
    plain = draw(base, b)
    for _ in range(3):
        patched = apply(base, w)
        assert error(draw(patched, b), plain) > 1e-3
        del patched
        gc.collect()
        assert not [name for name, module in base.model.named_modules() if "forward" in module.__dict__]
        same(draw(base, b), plain, "base")
    return {"dropped": 3}


def check_a_clone_dropped_while_sampling_takes_nothing_along(b: str) -> Any:
    """A clone that is made, looked at and dropped between two steps does not end the linear attention of the others."""
    base, w = teacher(b), side(b)
    patched = apply(base, w)
    want, plain = stepwise(patched, b), stepwise(base, b)

    def drop(*_: Any) -> None:
        patched.clone()

    def look(*_: Any) -> None:
        patched.clone().model_state_dict()

    def drop_another(*_: Any) -> None:
        apply(patched, w, layers="0").model_state_dict()

    for meddle in (drop, look, drop_another):
        same(stepwise(patched, b, meddle), want, meddle.__name__)
        same(stepwise(base, b), plain, "base")
    return {"steps": 4, "against the base": error(want, plain)}


def check_a_base_whose_state_names_what_it_has_not(b: str) -> Any:
    """EDiT applies to a base whose layers name more in their state than they hold, as ComfyUI-GGUF's do."""
    base = teacher(b)
    layer = base.get_model_object("diffusion_model").final_layer.linear
    layer.register_state_dict_post_hook(
        lambda _, state, prefix, *__: state.update({f"{prefix}temp.weight": state[f"{prefix}weight"]})
    )
    with logged() as lines:
        patched = apply(base, side(b))
    assert not any("made for another base" in line for line in lines), lines
    return {"blocks": len(patched.get_additional_models_with_key("edit")[0].model)}


def stepwise(model: Any, b: str, callback: Any = None) -> torch.Tensor:
    latent = empty(model, *SIZES[b])["samples"]
    with torch.inference_mode():
        return comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 1), 4, 1.0, *SAMPLING[b], text(b), text(b, ""), latent, seed=1,
            disable_pbar=True, callback=callback,
        )  # fmt: skip
