"""Checks of piecewise attention, which needs no weights, and of the nodes that take models; `inside.py` runs them."""

from __future__ import annotations

from functools import partial
from typing import Any

from host import apply, conditioning, error, load, logged, run, same, sample, weights

import torch

import comfy.model_management
import nodes

draw = partial(sample, steps=1)
BARE = "piecewise (no weights)"


def check_piecewise_needs_no_weights_and_nothing_is_loaded_for_it(b: str) -> Any:
    base = load(b)
    plain = draw(base)
    with logged() as lines:
        patched = apply(base)
        drawn = draw(patched)
    said = [line for line in lines if "ModuleDict" in line or "EDiT" in line]
    assert not said, said
    assert not patched.get_additional_models_with_key("edit")
    assert patched.model_size() == base.model_size() and patched.patches_uuid == base.patches_uuid
    same(draw(load(b, edit=BARE)), drawn, "EDiTLoadModel and EDiTApply")
    figures = {"balanced": error(drawn, plain)}
    for quality in ("fast", "faithful"):
        figures[quality] = error(draw(apply(base, quality=quality)), plain)
    assert 0 < figures["balanced"] < 0.5 and figures["faithful"] < figures["balanced"] < figures["fast"], figures
    same(draw(patched), drawn, "drawn again")
    same(draw(base), plain, "base afterwards")
    return figures


def check_piecewise_beside_weights_in_one_model(b: str) -> Any:
    """Applied before and after weights, to the same block and to others, each has its own modules."""
    base, w = load(b), weights(b)
    first, both = apply(base, layers="0"), apply(apply(base, layers="0"), w, layers="1")
    other = apply(apply(base, w, layers="1"), layers="0")
    same(draw(both), draw(other), "in either order")
    same(draw(apply(apply(base, w), layers="0-1")), draw(apply(apply(base, w, layers=rest(w)), layers="0-1")), "over")
    same(draw(apply(apply(base), w)), draw(apply(base, w)), "weights over all")
    assert error(draw(both), draw(first)) > 1e-4
    same(draw(both), draw(other), "again")
    return None


def rest(w: Any) -> str:
    """The blocks from the third on."""
    return ", ".join(str(block) for block in sorted(w.sites) if block > 1) or "none"


def check_what_a_block_is_given_and_nobody_knows_keeps_it_dense_and_is_named(b: str) -> Any:
    """Another pack's mask, by name and by place; what ComfyUI itself gives says nothing."""
    base = load(b)
    path = f"diffusion_model.{'blocks.0.attn' if b.startswith('pixart') else 'joint_blocks.0'}"
    module = base.get_model_object(path)

    def forward(*args: Any, mask: Any = None, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    tolerant = base.clone()
    tolerant.add_object_patch(path + ".forward", forward)
    plain = draw(base)
    only, figures = apply(tolerant, layers="0"), {}
    with logged() as lines:
        figures["without a mask"] = error(draw(only), plain)
    assert figures["without a mask"] > 0 and not any("stays dense" in line for line in lines), lines
    for model in (only, apply(tolerant, weights(b), layers="0")):
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "mask": torch.ones(1)}), with_kwargs=True
        )
        try:
            with logged() as lines:
                same(draw(model), plain, "dense under a mask")
        finally:
            hook.remove()
        said = [line for line in lines if "stays dense" in line]
        assert said == ["EDiT: stays dense: mask in the attention's call, which may change what it computes"], said
    return figures


def check_the_nodes_that_take_a_model(b: str) -> Any:
    """Load, Init, Apply, Report, Calibrate and Benchmark, one after the other."""
    base = load(b, "fp32")
    plain = draw(base)
    with torch.inference_mode():
        made = run("EDiTInit", model=base, compression=4, layers="all")
        latent = {"samples": torch.zeros(1, base.get_model_object("latent_format").latent_channels, 34, 40)}
        prompts = {"positive": conditioning(7, 2), "negative": conditioning(5, 3)}
        trained = run(
            "EDiTCalibrate", model=base, edit_weights=made, **prompts, latent=latent, steps=2, lr=0.001, seed=1
        )
        report = nodes.NODE_CLASS_MAPPINGS["EDiTLayerReport"].execute(
            model=base, edit_weights=trained, conditioning=prompts["positive"], latent=latent, threshold=10.0
        )
        chart, layers = report.result[:2]
        assert chart.ndim == 4 and layers == f"0-{max(made.sites)}", layers
        bench = nodes.NODE_CLASS_MAPPINGS["EDiTBenchmark"].execute(
            model_a=base, model_b=apply(base), sizes="288", repeats=1
        )
        chart, table = bench.result
    assert chart.ndim == 4 and "288" in table, table
    assert error(draw(apply(base, trained)), plain) > 1e-4
    same(draw(base), plain, "base afterwards")
    comfy.model_management.unload_all_models()
    assert not any("forward" in module.__dict__ for module in base.model.modules())
    return {"table": table}
