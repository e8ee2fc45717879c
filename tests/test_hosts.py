"""What else happens to a transformer while EDiT is applied: threads, checkpointing, and whoever sets processors."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPAGPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from support import models
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edit_core import EDiTHandle, EDiTModelError, apply_edit
from edit_core.hosts.dense import dense_reason

TURNED = ((34, 40), (40, 34))  # latents of two grids with equally many tokens
CALLS = 200


def in_threads(*work: Callable[[], None]) -> None:
    """Runs all at once; raises what any of them raises."""
    errors: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("sizes", [((8, 10), (12, 6)), ((8, 10), (10, 8))], ids=["unlike", "turned"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_threads_with_different_sizes_get_the_numbers_of_single_calls(
    backbone: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    model = models.pixart() if backbone.startswith("pixart") else models.sd35(blocks=2, dual=(0,))
    wrong: list[int] = []
    with apply_edit(model, models.trained_like(model)), torch.no_grad():
        alone = [models.forward(model, *size, batch=1) for size in sizes]

        @torch.no_grad()
        def calls(size: tuple[int, int], expected: Tensor) -> None:
            found = [torch.equal(models.forward(model, *size, batch=1), expected) for _ in range(CALLS)]
            wrong.append(found.count(False))

        in_threads(*(partial(calls, *each) for each in zip(sizes, alone, strict=True)))
    assert wrong == [0, 0]


def test_threads_keep_the_tap_that_their_call_began_with() -> None:
    model, began, go = models.pixart(), threading.Event(), threading.Event()

    def tap(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        began.set()
        assert go.wait(60)
        return dense()

    @torch.no_grad()
    def tapped() -> None:
        assert torch.equal(models.forward(model), before)

    @torch.no_grad()
    def plain() -> None:
        assert began.wait(60)
        handle.tap = None
        assert torch.equal(models.forward(model), linear)
        go.set()

    with torch.no_grad():
        before = models.forward(model)
    with apply_edit(model, models.trained_like(model)) as handle:
        with torch.no_grad():
            linear = models.forward(model)
        handle.tap = tap
        in_threads(tapped, plain)


def gradients(handle: EDiTHandle) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in handle.sides.named_parameters() if p.grad is not None}
    handle.sides.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_checkpointed_graphs_of_two_grids_are_not_mixed_up(backbone: str, reentrant: bool) -> None:
    model = models.make(backbone).requires_grad_(False)
    model.proj_out.requires_grad_(True)
    if reentrant:  # whose inputs must want gradients for anything inside to get one
        model.pos_embed.requires_grad_(True)
    with apply_edit(model, models.trained_like(model)) as handle:
        handle.sides.requires_grad_(True)
        expected = []
        for size in TURNED:
            models.forward(model, *size).square().mean().backward()
            expected.append(gradients(handle))
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        losses = [models.forward(model, *size).square().mean() for size in TURNED]
        with torch.no_grad():
            models.forward(model, 20, 24)  # the last call before the graphs' is of a third grid
        for loss, wanted in zip(losses, expected, strict=True):
            in_threads(loss.backward)  # where no call was ever under way
            found = gradients(handle)
            assert found.keys() == wanted.keys() != set()
            for name, grad in found.items():
                torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_call_within_a_call_and_one_that_failed_leave_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    model = models.pixart()
    attention, x = model.transformer_blocks[0].attn1, torch.randn(1, 340, 72)
    with apply_edit(model, models.trained_like(model)) as handle, caplog.at_level(logging.WARNING, "edit_core"):
        wanted = [models.forward(model, *size) for size in TURNED]
        inner: list[Tensor] = []

        def nested(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
            handle.tap = None
            inner.append(models.forward(model, *TURNED[1]))
            handle.tap = nested
            return edit()

        handle.tap = nested
        assert torch.equal(models.forward(model, *TURNED[0]), wanted[0])
        assert all(torch.equal(y, wanted[1]) for y in inner)
        assert len(inner) == 2

        def failing(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
            raise RuntimeError("stop")

        handle.tap = failing
        with pytest.raises(RuntimeError, match="stop"):
            models.forward(model, *TURNED[0])
        handle.tap = None
        assert not caplog.messages
        dense = attention(x)
        assert "from outside its transformer" in caplog.text, "the failed call is not under way any more"
        assert torch.equal(models.forward(model, *TURNED[1]), wanted[1])
    assert torch.equal(attention(x), dense)


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_a_users_attention_arguments_pass_by_position_too_and_stay_as_they_are(backbone: str) -> None:
    model = models.make(backbone)
    given: dict[str, Any] = {}
    caption, latent = torch.randn(1, 7, 64), torch.randn(1, model.config.in_channels, 34, 40)
    time, pooled = torch.tensor([300]), torch.randn(1, 32)
    more = (time, models.sizes(model, 1, 34, 40)) if backbone.startswith("pixart") else (pooled, time, None)
    with apply_edit(model, models.trained_like(model)):
        by_position = model(latent, caption, *more, given).sample
        assert torch.equal(model(latent, caption, *more).sample, by_position)
    assert not given
    assert not torch.equal(model(latent, caption, *more).sample, by_position)


@torch.no_grad()
def test_copies_have_a_life_of_their_own() -> None:
    model = models.sd35()
    before = models.forward(model)
    with apply_edit(model, models.trained_like(model)):
        linear = models.forward(model)
        other = copy.deepcopy(model)
    assert torch.equal(models.forward(model), before)
    assert torch.equal(models.forward(other), linear)


# --- whoever sets processors ---


def vae(channels: int) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def pag_pipeline(backbone: str, transformer: Any) -> Callable[[], Tensor]:
    """Draws with perturbed attention guidance in one block; diffusers' cannot be where there is an attn2."""
    generator = torch.Generator().manual_seed(7)
    embeds = torch.randn(2, 1, 7, 64, generator=generator)
    common: dict[str, Any] = {"num_inference_steps": 2, "height": 320, "width": 272, "output_type": "latent"}
    common.update(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], pag_scale=2.0)
    if backbone.startswith("pixart"):
        scheduler = DPMSolverMultistepScheduler()
        pipe: Any = PixArtSigmaPAGPipeline(None, None, vae(4), transformer, scheduler, ["blocks.1"])
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
        common.update(prompt_attention_mask=mask, negative_prompt_attention_mask=mask, use_resolution_binning=False)
        common.update(prompt=None, negative_prompt=None)
    else:
        pipe = StableDiffusion3PAGPipeline(
            transformer, FlowMatchEulerDiscreteScheduler(), vae(16), None, None, None, None, None, None,
            pag_applied_layers=["blocks.2"],
        )  # fmt: skip
        pooled = torch.randn(2, 1, 32, generator=generator)
        common.update(pooled_prompt_embeds=pooled[0], negative_pooled_prompt_embeds=pooled[1])
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(generator=torch.Generator().manual_seed(0), **common).images


@pytest.mark.parametrize("backbone", [name for name in models.BACKBONES if name != "pixart_alpha"])  # it has none
@torch.no_grad()
def test_perturbed_attention_guidance_draws_with_edit_and_leaves_it_applied(backbone: str) -> None:
    model = models.make(backbone)
    draw = pag_pipeline(backbone, model)
    before, plain = draw(), models.forward(model)
    with apply_edit(model, models.trained_like(model)):
        linear, ours = models.forward(model), model.attn_processors
        drawn = draw()
        assert torch.isfinite(drawn).all()
        assert models.relative_error(drawn, before) > 1e-3
        assert list(model.attn_processors.values()) == list(ours.values())
        assert torch.equal(models.forward(model), linear)
    assert torch.equal(models.forward(model), plain)
    assert torch.equal(draw(), before)


@pytest.mark.parametrize("when", ["put back", "left"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_fused_projections_may_come_and_go_while_edit_is_applied(backbone: str, when: str) -> None:
    model, twin = models.make(backbone), models.make(backbone)
    with apply_edit(model, models.trained_like(model)):
        linear = models.forward(model)
        model.fuse_qkv_projections()
        if when == "put back":
            model.unfuse_qkv_projections()
            assert models.relative_error(models.forward(model), linear) < 1e-5
    twin.fuse_qkv_projections()
    if when == "left" and backbone == "sd35_medium":  # diffusers' own processor cannot run a fused attn2
        model.unfuse_qkv_projections()
    if when == "put back" or backbone == "sd35_medium":
        twin.unfuse_qkv_projections()
    assert torch.equal(models.forward(model), models.forward(twin))


def with_ip_adapter(model: Any) -> Any:
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(192, 24, 64, timesteps_emb_dim=192))
    return model


def sd3_pipeline(transformer: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(transformer, scheduler, vae(16), None, None, None, None, None, None)


@torch.no_grad()
def test_an_ip_adapter_is_found_scaled_and_unloaded_as_without_edit() -> None:
    plain = models.forward(models.sd35())
    model = with_ip_adapter(models.sd35())
    keys, pipe = list(model.state_dict()), sd3_pipeline(model)
    picture = {"ip_hidden_states": torch.randn(2, 5, 24), "temb": torch.randn(2, 192)}
    handle = apply_edit(model, models.trained_like(model))
    assert [name for name in model.state_dict() if ".edit." not in name] == keys
    assert pipe.is_ip_adapter_active
    pipe.set_ip_adapter_scale(0.25)
    scaled = models.forward(model, joint_attention_kwargs=picture)
    handle.remove()
    assert all(block.attn.processor.scale == 0.25 for block in model.transformer_blocks)
    assert models.relative_error(scaled, models.forward(model, joint_attention_kwargs=picture)) > 1e-3, "attn2"

    with apply_edit(model, models.trained_like(model)):
        pipe.unload_ip_adapter()
        assert not pipe.is_ip_adapter_active
        assert {type(processor) for processor in model.attn_processors.values()} == {JointAttnProcessor2_0}
        assert torch.equal(models.forward(model), plain)
    assert torch.equal(models.forward(model), plain)
    with apply_edit(model, models.trained_like(model)):
        assert not torch.equal(models.forward(model), plain), "and it can be applied again"


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("way", ["assigned", "set", "all", "called"])
@torch.no_grad()
def test_processors_that_others_set_stay(backbone: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    model = models.make(backbone)
    before, keys = models.forward(model), list(model.state_dict())
    kind: Any = AttnProcessor2_0 if backbone.startswith("pixart") else JointAttnProcessor2_0
    first = model.transformer_blocks[0].attn1 if backbone.startswith("pixart") else model.transformer_blocks[0].attn
    with apply_edit(model, models.trained_like(model)):
        linear = models.forward(model)
        if way == "assigned":
            first.processor = kind()
        elif way == "set":
            first.set_processor(kind())
        elif way == "all":
            model.set_attn_processor(kind())
        else:
            model.set_attn_processor({name: value.__class__() for name, value in model.attn_processors.items()})
        theirs = model.attn_processors
        caplog.clear()
        found = models.forward(model)
        assert not torch.equal(found, linear)
        assert torch.equal(found, before) == (way in ("all", "called"))
        assert [text[:14] for text in caplog.messages] == ["EDiT: blocks 0"], "diffusers does not warn of our argument"
    assert first.processor is theirs[next(iter(theirs))]
    assert type(first.processor) is kind
    assert torch.equal(models.forward(model), before)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_processor_of_nobody_in_particular_is_put_back() -> None:
    model = models.pixart()
    attention = model.transformer_blocks[0].attn1
    softmax = attention.processor

    def function(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return softmax(attn, hidden_states)

    attention.set_processor(function)
    with apply_edit(model, models.trained_like(model)), pytest.raises(EDiTModelError, match="applied to this"):
        apply_edit(model, models.trained_like(model))
    assert attention.processor is function


@pytest.mark.parametrize("trainable", ["side", "low_rank"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_pefts_adapters_do_not_reach_into_edit(backbone: str, trainable: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model, twin = models.make(backbone), models.make(backbone)

    def add_adapter(transformer: Any) -> None:
        if hasattr(transformer, "add_adapter"):
            transformer.add_adapter(config)
        else:  # diffusers' PixArt has no method for it
            peft.inject_adapter_in_model(config, transformer)

    with apply_edit(model, models.trained_like(model, trainable=trainable)) as handle:
        linear, names = models.forward(model), list(handle.trainable())
        torch.manual_seed(0)
        add_adapter(model)
        assert list(handle.trainable()) == names
        assert models.relative_error(models.forward(model), linear) > 1e-3
        assert not any("lora" in type(module).__module__ for path, module in model.named_modules() if ".edit." in path)
    torch.manual_seed(0)
    add_adapter(twin)
    assert torch.equal(models.forward(model), models.forward(twin))
    assert list(model.state_dict()) == list(twin.state_dict())


def test_reasons_are_told_in_one_order() -> None:
    assert dense_reason((2, 3), 6) is None
    assert dense_reason((2, 3), 6, min_tokens=6) is None
    for reason, part in (
        (dense_reason(None, 6, masked=True), "outside its transformer"),
        (dense_reason((2, 3), 5, masked=True, pictured=True), "attention mask"),
        (dense_reason((2, 3), 5, pictured=True), "IP-Adapter"),
        (dense_reason((2, 3), 5, min_tokens=9), "5 tokens do not fill the 2x3 grid"),
        (dense_reason((2, 3), 6, min_tokens=7, outside=(0.0, 0.5)), "6 tokens are fewer than min_tokens=7"),
        (dense_reason((2, 3), 6, outside=(0.25, 0.5)), "steps outside 0.25-0.5 of the schedule"),
    ):
        assert reason is not None
        assert part in reason
