"""Checks that run inside a real ComfyUI process: `python inside.py CHECKOUT BASE_DIRECTORY PACK FILES`.

Every `check_*` function is one test of `test_comfyui.py`, which starts this once per ComfyUI and reads the JSON that
is written to BASE_DIRECTORY/results.json. A check returns figures to show; it fails by raising.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
from typing import Any

from host import (  # first, since it readies ComfyUI to be imported
    BACKBONES,
    BASE,
    FILES,
    apply,
    error,
    load,
    logged,
    lora_for,
    main,
    merged,
    record,
    run,
    same,
    sample,
    user_error,
    weights,
    with_lora,
)
import inside_differences
import inside_files
import inside_hostile
import inside_piecewise
import inside_takeovers
import torch

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import nodes


# --- checks: each runs for both backbones -----------------------------------------------------------------------------


def check_edit_changes_the_output_and_leaves_the_base_bit_equal(b: str) -> Any:
    base = load(b)
    before = sample(base)
    patched = apply(base, weights(b))
    edit = sample(patched)
    same(sample(base), before, "base after a patched run")
    same(sample(patched), edit, "patched run repeated")
    same(sample(base), before, "base at the end")
    assert torch.isfinite(edit).all()
    assert error(edit, before) > 1e-3, "EDiT changed nothing"
    return {"patched against base": error(edit, before)}


def check_output_equals_diffusers(b: str) -> Any:
    """Runs the model on latents of both shapes; the outer test compares what went in and out with diffusers."""
    base = load(b, "fp32")
    for name, model in (("base", base), ("edit", apply(base, weights(b))), ("piecewise", apply(base))):
        for height, width in ((34, 40), (40, 34)):
            record(model, f"{b}-{name}", height, width)
    return None


def check_lora_works_before_after_and_beside(b: str) -> Any:
    base, w = load(b, "fp32"), weights(b)
    lora = lora_for(base)
    keys = sorted(map(str, comfy.lora.model_lora_keys_unet(base.model, {})))
    plain, tuned = sample(base), sample(with_lora(base, lora))
    edit = sample(apply(base, w))
    after = sample(with_lora(apply(base, w), lora))
    before = sample(apply(with_lora(base, lora), w))
    same(before, after, "LoRA before and after EDiT")
    same(sample(with_lora(base, lora)), tuned, "LoRA on the base after patched runs")
    same(sample(base), plain, "base")
    assert keys == sorted(map(str, comfy.lora.model_lora_keys_unet(base.model, {}))), "LoRA keys changed"
    by_hand = sample(apply(merged(load(b, "fp32"), lora), w))
    figures = {
        "effect on the base": error(tuned, plain),
        "effect under EDiT": error(after, edit),
        "against merged by hand": error(after, by_hand),
    }
    assert figures["effect on the base"] > 1e-3 and figures["effect under EDiT"] > 1e-3, figures
    assert figures["against merged by hand"] < 1e-4, figures
    return figures


def check_clones_do_not_change_their_parent(b: str) -> Any:
    base, w = load(b), weights(b)
    parent = apply(base, w, layers="0")
    first = sample(parent)
    child = apply(parent, w, layers="1")
    both = sample(child)
    same(sample(parent), first, "parent")
    same(sample(apply(base, w, layers="0-1")), both, "0 then 1 is 0-1")
    assert error(both, first) > 1e-4, error(both, first)
    return None


def check_a_clone_of_a_loaded_model_is_injected(b: str) -> Any:
    base, w = load(b), weights(b)
    expected = sample(apply(base, w))
    patched = apply(base, w, layers="0")
    sample(patched)  # now loaded and injected; a clone takes over that state
    same(sample(apply(patched, w)), expected, "second EDiTApply on a loaded model")
    same(sample(patched.clone()), sample(patched), "clone")
    return None


def check_alternating_models_stay_themselves(b: str) -> Any:
    base, w = load(b), weights(b)
    models = [base, apply(base, w), apply(base, w, layers="1")]
    want = [sample(m) for m in models]
    for i in (1, 0, 2, 1, 2, 0):
        same(sample(models[i]), want[i], f"model {i}")
    return None


def check_low_precision_bases_run(b: str) -> Any:
    reference = sample(apply(load(b, "fp32"), weights(b)))
    errors = {}
    for dtype, limit in (("fp16", 0.02), ("bf16", 0.1), ("fp8_e4m3fn", 0.5), ("fp8_e5m2", 0.8)):
        base = load(b, dtype)
        before = sample(base)
        out = sample(apply(base, weights(b)))
        same(sample(base), before, f"{dtype} base after a patched run")
        errors[dtype] = error(out, reference)
        assert errors[dtype] < limit, errors
    return errors


def check_low_precision_bases_keep_the_fingerprint(b: str) -> Any:
    for dtype in ("fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"):
        with logged() as lines:
            apply(load(b, dtype), weights(b))
        assert not any("made for another base" in line for line in lines), (dtype, lines)
    other = load(b)
    for name, p in other.model.diffusion_model.named_parameters():
        if name.endswith("proj.bias"):
            p.data.normal_(std=0.1)
    with logged() as lines:
        apply(other, weights(b))
    assert any("made for another base" in line for line in lines), lines
    return None


def check_cfg_with_unequal_prompts_and_batches(b: str) -> Any:
    base, w = load(b), weights(b)
    patched = apply(base, w)
    for cfg in (1.0, 4.5):
        for prompt in ((7, 7), (9, 5)):
            a = sample(patched, cfg=cfg, prompt=prompt)
            assert torch.isfinite(a).all()
            same(sample(patched, cfg=cfg, prompt=prompt), a, f"repeat cfg {cfg} prompt {prompt}")
    one = sample(patched, 40, 34, cfg=4.5)
    assert one.shape[-2:] == (40, 34)
    three = sample(patched, batch=3, cfg=4.5)
    assert three.shape[0] == 3 and torch.isfinite(three).all()
    return None


def check_partial_load(b: str) -> Any:
    base, w = load(b), weights(b)
    plain, want = sample(base), sample(apply(base, w))
    patched = apply(base, w)
    size = patched.model_size()
    for fraction in (0.2, 0.6):
        comfy.model_management.unload_all_models()
        patched.partially_load(torch.device("cpu"), extra_memory=int(size * fraction))
        assert error(sample(patched), want) < 1e-5
        patched.partially_unload(torch.device("cpu"), int(size * 0.5))
        assert error(sample(patched), want) < 1e-5
    comfy.model_management.unload_all_models()
    same(sample(base), plain, "base after partial loads")
    return None


def check_side_weights_are_loaded_and_counted(b: str) -> Any:
    base, w = load(b), weights(b)
    patched = apply(base, w)
    comfy.model_management.unload_all_models()
    sample(patched)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models if m.model is not None]
    side = patched.get_additional_models_with_key("edit")[0]
    assert any(m is side.model for m in loaded), "side weights are not among the loaded models"
    want = sum(t.numel() * t.element_size() for t in side.model.state_dict().values())
    assert side.model_size() == want > 0
    factory, (of, blocks, dtype) = side.cached_patcher_init
    assert factory(of, blocks, torch.bfloat16).model_size() * dtype.itemsize == 2 * want, "not in the dtype asked for"
    comfy.model_management.unload_all_models()
    for module in base.model.modules():
        assert "forward" not in module.__dict__, "a replaced forward was left behind"
    return {"side weights, bytes": want}


def check_interrupt_leaves_both_usable(b: str) -> Any:
    base, w = load(b), weights(b)
    plain, want = sample(base), sample(apply(base, w))
    patched = apply(base, w)

    def stop(*_: Any) -> None:
        raise comfy.model_management.InterruptProcessingException()

    try:
        sample(patched, steps=4, callback=stop)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("not interrupted")
    same(sample(base), plain, "base after an interrupt")
    same(sample(patched), want, "patched after an interrupt")
    return None


def check_min_tokens_auto_is_the_crossover_measured_here(b: str) -> Any:
    base, w = load(b), weights(b)
    core = type(w).__module__.removesuffix(".weights.weights")
    crossover = importlib.import_module(f"{core}.crossover")
    plain, edit = sample(base), sample(apply(base, w))
    kept, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME"), str(BASE / f"cache-{b}")
    try:
        name = crossover.key(b, base.model.manual_cast_dtype or base.model.get_dtype(), base.load_device)
        for tokens, want in ((341, plain), (340, edit)):  # latents of 34x40 are 17x20 tokens
            crossover.save({name: tokens})
            same(sample(apply(base, w, min_tokens=-1)), want, f"a crossover at {tokens} tokens")
    finally:
        os.environ.pop("XDG_CACHE_HOME") if kept is None else os.environ.update(XDG_CACHE_HOME=kept)
    return None


def check_what_stays_dense_says_why_once(b: str) -> Any:
    base, w = load(b), weights(b)
    plain = sample(base)
    for kwargs, part in (
        ({"min_tokens": 100_000}, "min_tokens=100000"),
        ({"start_percent": 0.9, "end_percent": 0.9}, "outside 0.9-0.9 of the schedule"),
    ):
        with logged() as lines:
            same(sample(apply(base, w, **kwargs)), plain, str(kwargs))
        assert sum(part in line for line in lines) == 1, lines
    with logged() as lines:
        same(sample(apply(base, w, layers="none")), plain, "no layer")
        apply(base, w, layers="1")
    left = re.compile(r"EDiT: blocks 0.* stay dense: not listed or without weights")
    assert any(left.fullmatch(line) for line in lines), lines
    early, late = (sample(apply(base, w, start_percent=a, end_percent=z), steps=4) for a, z in ((0, 0.5), (0.5, 1)))
    dense, full = sample(base, steps=4), sample(apply(base, w), steps=4)
    for a, z in ((early, dense), (early, full), (late, dense), (late, full), (early, late)):
        assert error(a, z) > 1e-5, "a percent range had no effect"
    both = apply(apply(base, w, end_percent=0.5), w, start_percent=0.5)
    same(sample(both, steps=4), full, "two halves make the whole")
    return None


def check_a_range_from_the_start_holds_the_first_step_at_every_shift(b: str) -> Any:
    base, w = load(b), weights(b)
    sampling = copy.deepcopy(base.get_model_object("model_sampling"))
    if not b.startswith("pixart"):  # whose first sigma should be 1, and with this shift is rounded to a little more
        sampling.set_parameters(shift=1.58)
        assert float(sampling.sigma_max) > sampling.percent_to_sigma(0.0)
    base.add_object_patch("model_sampling", sampling)
    same(sample(apply(base, w, end_percent=0.5), steps=1), sample(apply(base, w), steps=1), "the first step")
    return None


def check_tokens_that_do_not_fill_the_grid_stay_dense(b: str) -> Any:
    base, w = load(b), weights(b)
    patched = apply(base, w)

    def longer(executor, x, t, *a, **k):  # as a pack that appends tokens would: here the latent size is misreported
        return executor(torch.cat([x, x], -1), t, *a, **k)[..., : x.shape[-1]]

    for model in (base, patched):
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", longer)
    with logged() as lines:
        out = sample(patched)
    same(out, sample(base), "dense")
    assert sum("do not fill" in line for line in lines) == 1, lines
    return None


def check_another_packs_wrapper_may_pass_on_by_name(b: str) -> Any:
    base, w = load(b), weights(b)
    want = sample(apply(base, w, start_percent=0.5), steps=4)

    def by_name(executor, x, t, c_concat, c_crossattn, control, transformer_options, **k):
        call = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control}
        return executor(x, t, transformer_options=transformer_options, **call, **k)

    base.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", by_name)  # around EDiT's
    same(sample(apply(base, w, start_percent=0.5), steps=4), want, "passed on by name")
    return None


def check_other_packs_forward_patch_is_warned_of_and_restored(b: str) -> Any:
    base, w = load(b), weights(b)
    path = f"diffusion_model.{'blocks.0.attn' if b.startswith('pixart') else 'joint_blocks.0'}"
    module = base.get_model_object(path)
    calls = []

    def forward(*a, **k):
        calls.append(1)
        return type(module).forward(module, *a, **k)

    plain = sample(base)
    other = base.clone()
    other.add_object_patch(path + ".forward", forward)
    with logged() as lines:
        patched = apply(other, w)
    assert any("another node patched" in line for line in lines), lines
    want = sample(apply(base, w))
    calls.clear()
    same(sample(patched), want, "EDiT over another pack's patch")
    assert not calls
    dense = apply(other, w, min_tokens=10**6)
    same(sample(dense), plain, "dense through the other pack's patch")
    assert calls
    with dense.use_ejected():  # as ComfyUI does to look at the weights
        assert module.forward is forward
    same(sample(base), plain, "base")
    return None


def check_deep_copied_base_is_independent(b: str) -> Any:
    base, w = load(b), weights(b)
    want = sample(apply(base, w))
    patched = apply(base, w)
    if "force_deepcopy" in comfy.model_patcher.ModelPatcher.clone.__code__.co_varnames:
        base.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(FILES / f"{b}.safetensors"), {}))
        patched = apply(base, w)
        copied = patched.clone(force_deepcopy=True)
        side = copied.get_additional_models_with_key("edit")[0]
        factory, arguments = side.cached_patcher_init
        independent = factory(*arguments, disable_dynamic=True)
        assert independent.model is not side.model
        copied.set_additional_models("edit", [independent])
    else:
        copied = patched.clone()
        copied.model = copy.deepcopy(base.model)
    assert copied.model is not patched.model
    same(sample(copied), want, "deep copy")
    for p in patched.model.diffusion_model.parameters():  # the copy must not reach back into the original
        p.data = torch.zeros_like(p.data)
    same(sample(copied), want, "deep copy after the original was wiped")
    return None


def check_lazily_allocated_layers(b: str) -> Any:
    base, w = load(b), weights(b)
    want = sample(apply(base, w))
    memory = getattr(comfy, "memory_management", None)
    if memory is None or not hasattr(memory, "aimdo_enabled"):
        return {"lazy layers": "this ComfyUI has none"}
    memory.aimdo_enabled = True
    try:
        patched = apply(base, w)
    finally:
        memory.aimdo_enabled = False
    state = patched.get_additional_models_with_key("edit")[0].model.state_dict()
    assert all(v is not None for v in state.values())
    same(sample(patched), want, "lazily allocated side weights")
    return {"lazy layers": "filled"}


def check_init_save_load_round_trip(b: str) -> Any:
    base = load(b)
    made = run("EDiTInit", model=base, compression=2, layers="0")
    out = sample(apply(base, made))
    run("EDiTSaveWeights", edit_weights=made, filename_prefix=f"sub/{b}_test")
    run("EDiTSaveWeights", edit_weights=made, filename_prefix=f"sub/{b}_test")
    for number in (1, 2):
        again = run("EDiTLoadWeights", edit_name=f"sub/{b}_test_{number:05}_.safetensors")
        assert again.config.compression == 2 and list(again.sites) == [0]
        same(sample(apply(base, again)), out, "saved and loaded")
    user_error("filename_prefix", run, "EDiTSaveWeights", edit_weights=made, filename_prefix="../../escape")
    loaded = load(b, edit=f"sub/{b}_test_00001_.safetensors")
    same(sample(loaded), out, "EDiTLoadModel with weights")
    return None


def check_bad_input_is_one_sentence_and_the_model_stays_usable(b: str) -> Any:
    base, w = load(b), weights(b)
    plain, want = sample(base), sample(apply(base, w))
    other = weights(BACKBONES[BACKBONES.index(b) - 1])
    said = [
        user_error("but the model is", apply, base, other),
        user_error("is not a block", apply, base, w, layers="first"),
        user_error("does not exist", apply, base, w, layers="0, 99"),
        user_error("runs backwards", apply, base, w, layers="1-0"),
        user_error("is after end_percent 0.5", apply, base, w, start_percent=0.9, end_percent=0.5),
        user_error("hold no block", apply, base, run("EDiTInit", model=base, compression=4, layers="0"), layers="0-1"),
        user_error("does not divide", run, "EDiTInit", model=base, compression=7, layers="all"),
        user_error(
            "PixArt variant with query/key norms",
            run,
            "EDiTLoadModel",
            model_name="diffusion_models/pixart_normed.safetensors",
            weight_dtype="default",
            edit_weights="none",
        ),
        user_error(
            "FLUX",
            run,
            "EDiTLoadModel",
            model_name="diffusion_models/flux.safetensors",
            weight_dtype="default",
            edit_weights="none",
        ),
        user_error(
            "complete safetensors",
            run,
            "EDiTLoadModel",
            model_name="diffusion_models/cut.safetensors",
            weight_dtype="default",
            edit_weights="none",
        ),
        user_error(
            "EDiT weights",
            run,
            "EDiTLoadModel",
            model_name="checkpoints/edit_by_mistake.safetensors",
            weight_dtype="default",
            edit_weights="none",
        ),
        user_error("complete safetensors", run, "EDiTLoadWeights", edit_name="cut.safetensors"),
        user_error("asks for", run, "EDiTLoadWeights", edit_name="wrong_shape.safetensors"),
        user_error("compression=8", run, "EDiTLoadWeights", edit_name="wrong_compression.safetensors"),
        user_error("not an EDiT weights file", run, "EDiTLoadWeights", edit_name="lora.safetensors"),
    ]
    check = nodes.NODE_CLASS_MAPPINGS["EDiTApply"].validate_inputs
    assert check(layers="0-3, 9") is True and "is not a block" in check(layers="0;3")
    patched = apply(base, w)
    if b.startswith("pixart"):
        said.append(user_error("multiples of 16", sample, patched, 33, 40))
        said.append(user_error("over 256", sample, patched, 24, 24))
    else:
        assert sample(patched, 33, 39).shape[-2:] == (33, 39), "SD3.5 pads odd latents"
    same(sample(patched), want, "patched after the errors")
    same(sample(base), plain, "base after the errors")
    assert not any("\n" in line for line in said)
    return said


def check_skip_layer_guidance_composes(b: str) -> Any:
    if b != "sd35_medium":
        return None
    base, w = load(b), weights(b)
    slg = nodes.NODE_CLASS_MAPPINGS["SkipLayerGuidanceSD3"]

    def call(model: Any) -> Any:
        if hasattr(slg, "execute"):
            return slg.execute(model, "1", 3.0, 0.0, 1.0).result[0]
        return slg().skip_guidance(model, "1", 3.0, 0.0, 1.0)[0]

    plain = sample(call(base), cfg=4.0)
    edit = sample(apply(base, w), cfg=4.0)
    after, before = sample(call(apply(base, w)), cfg=4.0), sample(apply(call(base), w), cfg=4.0)
    same(after, before, "SkipLayerGuidance before and after EDiT")
    assert error(after, edit) > 1e-4 and error(after, plain) > 1e-4
    same(sample(call(base), cfg=4.0), plain, "SkipLayerGuidance on the base")
    return None


def check_checkpoint_keys_are_unchanged(b: str) -> Any:
    base, w = load(b), weights(b)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    patched = apply(base, w)
    sample(patched)
    during = patched.model.state_dict()
    assert list(before) == list(during)
    assert all(torch.equal(v, during[k]) for k, v in before.items())
    return None


main(
    {
        **globals(),
        **vars(inside_differences),
        **vars(inside_files),
        **vars(inside_hostile),
        **vars(inside_piecewise),
        **vars(inside_takeovers),
    }
)
