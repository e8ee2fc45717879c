"""Checks beside packs that take a model's blocks or their forwards within its call; `inside.py` runs them."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

from host import apply, error, load, logged, run, same, sample, weights
import torch

from comfy.patcher_extension import WrappersMP


def blocks_of(model: Any) -> tuple[str, list[torch.nn.Module]]:
    """The name of the list, and what EDiT replaces in it."""
    inner = model.model.diffusion_model
    if hasattr(inner, "joint_blocks"):
        return "joint_blocks", list(inner.joint_blocks)
    return "blocks", [block.attn for block in inner.blocks]


def their_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def swapping(model: Any) -> Any:
    """What a pack does that swaps forwards within a call, and puts them back, as those for negative guidance do."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = blocks_of(model)[1]
        before = [dict(block.__dict__) for block in blocks]
        for block in blocks:
            block.forward = types.MethodType(their_forward, block)
        try:
            return executor(*args, **kwargs)
        finally:
            for block, kept in zip(blocks, before, strict=True):
                block.__dict__.pop("forward")
                block.__dict__.update({key: value for key, value in kept.items() if key == "forward"})

    return wrapper


class TheirBlocks(torch.nn.Module):
    """What a cache of the first block puts in the place of all: it has the real ones, and may pass them over."""

    def __init__(self, blocks: Any, ours: bool) -> None:
        super().__init__()
        self.held, self.ours = [*blocks], ours

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = torch.nn.Module.__call__ if self.ours else lambda block, *a, **k: type(block).forward(block, *a, **k)
        if hasattr(self.held[0], "cross_attn"):  # PixArt's
            x = args[0]
            for block in self.held:
                x = call(block, x, *args[1:], **kwargs)
            return x
        context, x = args
        for block in self.held:
            context, x = call(block, context, x, **kwargs)
        return context, x


def holding(ours: bool, before_call: Any = None) -> Any:
    """A unet function wrapper under which one module stands for the whole list of blocks."""

    def wrapper(apply_model: Any, given: dict[str, Any]) -> Any:
        inner = apply_model.__self__.diffusion_model
        name = "joint_blocks" if hasattr(inner, "joint_blocks") else "blocks"
        stand_in = torch.nn.ModuleList([TheirBlocks(getattr(inner, name), ours)])
        with mock.patch.object(inner, name, stand_in):
            if before_call:
                before_call()
            return apply_model(given["input"], given["timestep"], **given["c"])

    return wrapper


def taken(lines: list[str]) -> list[str]:
    return [line for line in lines if "none of its blocks ran in a call of the model" in line]


def check_forwards_that_are_swapped_within_the_call_are_said_to_be_and_whose_they_are(b: str) -> Any:
    base, w = load(b), weights(b)
    plain = sample(base, steps=3)
    patched = apply(base, w)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", swapping(base))
    with logged() as lines:
        same(sample(patched, steps=3), plain, "drawn by the other pack's forwards")
    said = taken(lines)
    assert len(said) == 2 and "something within that call has their places" in said[0], lines
    path = "joint_blocks.0" if blocks_of(base)[0] == "joint_blocks" else "blocks.0.attn"
    assert f"{__name__}.their_forward has {path}.forward" in said[1], said
    same(sample(base, steps=3), plain, "base")
    return said


def check_a_model_whose_own_forward_is_anothers_is_said_to_have_it(b: str) -> Any:
    base, w = load(b), weights(b)
    inner = base.model.diffusion_model

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.dict(vars(self)):
            self.__dict__.pop("forward")
            return swapping(base)(type(self).forward, self, *args, **kwargs)

    patched = apply(base, w)
    inner.forward = types.MethodType(forward, inner)
    try:
        with logged() as lines:
            out = sample(patched)
    finally:
        del inner.forward
    (said,) = taken(lines)
    assert said.endswith("forward has the model's forward") and __name__ in said, said
    same(out, sample(base), "dense")
    return said


def check_a_block_list_that_another_pack_holds_runs_edit_or_is_named(b: str) -> Any:
    base, w = load(b), weights(b)
    plain, want = sample(base), sample(apply(base, w))
    for ours in (True, False)[: 1 + (blocks_of(base)[0] == "joint_blocks")]:  # PixArt's attentions are in its blocks
        patched = apply(base, w)
        patched.set_model_unet_function_wrapper(holding(ours))
        with logged() as lines:
            same(sample(patched), want if ours else plain, f"ours={ours}")
        assert len(taken(lines)) == (not ours or 0), lines
        if not ours:
            assert f"{__name__}.TheirBlocks has the place of joint_blocks.0" in taken(lines)[0], lines
    return None


def check_an_older_clone_may_be_freed_while_another_pack_holds_the_block_list(b: str) -> Any:
    base, w = load(b), weights(b)
    want = sample(apply(base, w))
    older = apply(base, w)
    sample(older)
    for free in (lambda clone: clone.eject_model(), lambda clone: clone.detach(), lambda clone: clone.inject_model()):
        newer = apply(older, w)
        clone = older.clone()
        clone.is_injected = True
        freed: list[int] = []

        def once(free=free, clone=clone, freed=freed) -> None:
            if not freed:
                freed.append(1)
                free(clone)

        newer.set_model_unet_function_wrapper(holding(True, once))
        same(sample(newer, steps=2), want, "while an older clone is freed")
    same(sample(apply(base, w)), want, "afterwards")
    return None


def check_a_cache_that_repeats_a_call_is_not_taken_for_one_that_has_the_blocks(b: str) -> Any:
    base, w = load(b), weights(b)
    patched, kept = apply(base, w), []

    def repeats(executor: Any, *args: Any, **kwargs: Any) -> Any:
        kept[:] = kept or [executor(*args, **kwargs)]
        return kept[0]

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", repeats)
    with logged() as lines:
        sample(patched, steps=4)
    assert not taken(lines), lines
    return None


def check_blocks_that_another_node_compiled_are_looked_through_before_and_after_a_run(b: str) -> Any:
    base, w = load(b, "fp32"), weights(b)
    plain, want, one = sample(base), sample(apply(base, w)), sample(apply(base, w, layers="0"))
    made = run("EDiTInit", model=base, compression=4, layers="0")
    compiled, name = base.clone(), "joint_blocks" if blocks_of(base)[0] == "joint_blocks" else "blocks"
    for place, block in enumerate(getattr(base.model.diffusion_model, name)):
        compiled.add_object_patch(f"diffusion_model.{name}.{place}", torch.compile(block, backend="eager"))
    figures = {
        "all": error(sample(apply(compiled, w)), want),
        "one block, after a run": error(sample(apply(compiled, w, layers="0")), one),
    }
    again = run("EDiTInit", model=compiled, compression=4, layers="0")  # while the compiled ones are in the model
    assert again.base_hash == made.base_hash
    figures["the base"] = error(sample(compiled), plain)
    assert max(figures.values()) < 1e-4, figures
    return figures
