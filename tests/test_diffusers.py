"""EDiT on diffusers transformers and under their pipelines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from support import models
from torch import nn

from edit_core import EDiTConfig, EDiTError, EDiTModelError, EDiTWeights, apply_edit
from edit_core.attention import naive, softmax_attention

CONFIGS = [
    EDiTConfig(),
    EDiTConfig(normaliser="exact", softmax_features="post", kv_stride=1, compression=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "other choices"])
@pytest.mark.parametrize("size", [(34, 40), (40, 34), (2, 64)])
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_remove_restores_bit_equal_outputs(backbone: str, size: tuple[int, int], config: EDiTConfig) -> None:
    model = models.make(backbone)
    keys, before = list(model.state_dict()), models.forward(model, *size)
    handle = apply_edit(model, models.trained_like(model, config=config))
    edit = models.forward(model, *size)
    assert torch.isfinite(edit).all()
    assert models.relative_error(edit, before) > 1e-3, "EDiT changed nothing"
    handle.remove()
    handle.remove()
    assert torch.equal(models.forward(model, *size), before)
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_the_context_manager_removes_even_after_an_error(backbone: str) -> None:
    model = models.make(backbone)
    before = models.forward(model)
    with pytest.raises(RuntimeError, match="stop"), apply_edit(model, EDiTWeights.init(model)):
        raise RuntimeError("stop")
    assert torch.equal(models.forward(model), before)


@torch.no_grad()
def test_a_block_computes_what_the_specification_says() -> None:
    """One attention of PixArt, from the base's own linears through `naive`."""
    model = models.pixart()
    weights = models.trained_like(model)
    attn = model.transformer_blocks[1].attn1
    caught: dict[str, Any] = {}
    attn.register_forward_hook(
        lambda _, a, k, y: caught.update(x=a[0] if a else k["hidden_states"], y=y), with_kwargs=True
    )
    with apply_edit(model, weights):
        models.forward(model)
    x = caught["x"]
    p = {name.removeprefix("1.self."): t for name, t in weights.tensors.items()}
    y = naive.edit_attention(x, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), p, (17, 20), 4, weights.config)
    assert models.relative_error(caught["y"], attn.to_out[0](y)) < 1e-5


@torch.no_grad()
def test_layers_choose_blocks() -> None:
    model = models.sd35()
    weights = models.trained_like(model)
    before = models.forward(model)
    outputs = {}
    for layers in ("none", "0", "1-2", "all"):
        with apply_edit(model, weights, layers=layers) as handle:
            outputs[layers] = models.forward(model)
            assert handle.blocks == {"none": (), "0": (0,), "1-2": (1, 2), "all": (0, 1, 2)}[layers]
    assert torch.equal(outputs["none"], before)
    assert len({float(y.sum()) for y in outputs.values()}) == 4


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_fused_projections_are_called_once_and_give_the_same(backbone: str) -> None:
    model = models.make(backbone)
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        expected = models.forward(model)
    for module in model.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    with apply_edit(model, weights):
        assert models.relative_error(models.forward(model), expected) < 1e-5


class Adapted(nn.Module):
    """A linear under a LoRA, its own parameters one level down, as PEFT puts it where the linear was."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_a_lora_that_was_loaded_first_is_no_other_model(backbone: str) -> None:
    model = models.make(backbone)
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        plain = models.forward(model)
        for block in model.transformer_blocks:
            attention = block.attn1 if backbone.startswith("pixart") else block.attn
            attention.to_q, attention.to_out[0] = Adapted(attention.to_q), Adapted(attention.to_out[0])
        expected = models.forward(model)
    assert models.relative_error(expected, plain) > 1e-3
    with apply_edit(model, weights):
        assert torch.equal(models.forward(model), expected)
    assert EDiTWeights.init(model).base_hash == weights.base_hash


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_a_model_is_offloaded_after_edit_and_refused_before_it(backbone: str) -> None:
    """What a pipeline's `enable_sequential_cpu_offload` does, for which it wants a GPU."""
    model = models.make(backbone)
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        expected = models.forward(model)
        cpu_offload(model, torch.device("cpu"))
        assert next(model.parameters()).is_meta
        assert torch.equal(models.forward(model), expected)
    for call in (lambda: apply_edit(model, weights), lambda: EDiTWeights.init(model)):
        with pytest.raises(EDiTModelError, match="block 0 is not in memory"):
            call()


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_side_weights_follow_the_transformers_dtype(backbone: str) -> None:
    model = models.make(backbone)
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        expected = models.forward(model)
    with apply_edit(model, weights):
        late = models.forward(model.to(torch.bfloat16))
    with apply_edit(model, weights):
        early = models.forward(model)
    assert late.dtype == torch.bfloat16
    assert torch.equal(early, late)
    assert models.relative_error(late, expected) < 0.05


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_gradients_reach_every_side_weight_and_leave_the_base_alone(backbone: str) -> None:
    model = models.make(backbone).requires_grad_(False)
    with apply_edit(model, models.trained_like(model)) as handle:
        handle.sides.requires_grad_(True)
        models.forward(model).square().mean().backward()
        grads = {name: p.grad for name, p in handle.sides.named_parameters()}
    assert all(g is not None and float(g.abs().sum()) > 0 for g in grads.values())
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_gradient_checkpointing_and_training_mode_work() -> None:
    model = models.pixart()
    model.enable_gradient_checkpointing()
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        expected = models.forward(model)
    with apply_edit(model.train(), weights) as handle, torch.enable_grad():
        handle.sides.requires_grad_(True)
        out = models.forward(model)
        out.mean().backward()
    assert models.relative_error(out.detach(), expected) < 1e-5


def test_mistakes_are_one_sentence_and_leave_the_transformer_usable() -> None:
    model, other = models.pixart(), models.sd35()
    weights = EDiTWeights.init(model)
    with torch.no_grad():
        before = models.forward(model)
    for call, part in (
        (lambda: apply_edit(other, weights), "but the model is"),
        (lambda: apply_edit(model, weights, layers="0, 9"), "does not exist"),
        (lambda: apply_edit(nn.Linear(2, 2), weights), "this Linear is of an unknown kind"),
    ):
        with pytest.raises(EDiTError, match=part):
            call()
    with apply_edit(model, weights):
        with pytest.raises(EDiTModelError, match="applied to this transformer already"):
            apply_edit(model, weights)
        with pytest.raises(EDiTModelError, match="33x40 cannot be cut into 2x2 patches"):
            models.forward(model, 33, 40)
        with torch.no_grad():
            assert torch.isfinite(models.forward(model)).all(), "usable after a wrong size"
    with torch.no_grad():
        assert torch.equal(models.forward(model), before)


@torch.no_grad()
def test_a_call_that_stays_dense_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    model = models.pixart()
    weights = models.trained_like(model)
    attn, x = model.transformer_blocks[0].attn1, torch.randn(1, 30, 72)
    expected = attn(x)
    with apply_edit(model, weights), caplog.at_level(logging.WARNING, "edit_core"):
        assert torch.equal(attn(x), expected), "called from outside: no grid is known"
        attn(x)
    assert [r.message for r in caplog.records if "stays dense" in r.message] == [
        "EDiT: stays dense: an attention was called from outside its transformer"
    ]


@torch.no_grad()
def test_a_mask_on_image_tokens_is_honoured_by_staying_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = models.pixart()
    weights = models.trained_like(model)
    mask = (torch.arange(17 * 20) % 3 > 0).long().expand(2, -1)
    expected = models.forward(model, attention_mask=mask)
    assert not torch.equal(expected, models.forward(model))
    with apply_edit(model, weights), caplog.at_level(logging.WARNING, "edit_core"):
        assert torch.equal(models.forward(model, attention_mask=mask), expected)
    assert caplog.messages == [
        "EDiT: stays dense: an attention mask on image tokens, which linear attention cannot honour"
    ]


def with_ip_adapter() -> Any:
    model = models.sd35()
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(192, 24, 64, timesteps_emb_dim=192))
    return model


@torch.no_grad()
def test_an_ip_adapters_picture_is_honoured_by_staying_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = with_ip_adapter()
    weights = models.trained_like(model)
    picture = {"ip_hidden_states": torch.randn(2, 5, 24), "temb": torch.randn(2, 192)}
    dense, without = models.forward(model, joint_attention_kwargs=picture), models.forward(model)
    assert models.relative_error(dense, without) > 1e-3
    with apply_edit(model, weights, layers="2"), caplog.at_level(logging.WARNING, "edit_core"):
        assert torch.equal(models.forward(model, joint_attention_kwargs=picture), dense)
        assert [text for text in caplog.messages if text.startswith("EDiT")] == [
            "EDiT: stays dense: an IP-Adapter's picture, which the attention that was there before EDiT sees"
        ]
        assert not torch.equal(models.forward(model), without), "without a picture it is linear"
    with apply_edit(model, weights, min_tokens=1000):
        assert torch.equal(models.forward(model, joint_attention_kwargs=picture), dense), "the model's own attention"


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_applying_edit_leaves_the_global_random_numbers_alone(backbone: str) -> None:
    """A pipeline without a generator draws its noise from them: with and without EDiT it should be the same."""
    model = models.make(backbone)
    weights = EDiTWeights.init(model, trainable="full")
    state = torch.get_rng_state()
    EDiTWeights.init(model, trainable="low_rank", rank=2)
    apply_edit(model, weights).remove()
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_an_ip_adapter_follows_a_model_that_moves_while_edit_is_applied() -> None:
    model = with_ip_adapter()
    keys = list(model.state_dict())
    picture = {"ip_hidden_states": torch.randn(2, 5, 24).double(), "temb": torch.randn(2, 192).double()}
    with apply_edit(model, EDiTWeights.init(model), min_tokens=1000):
        applied = models.forward(model.to(torch.float64), joint_attention_kwargs=picture)
    assert torch.equal(models.forward(model, joint_attention_kwargs=picture), applied)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_what_replaced_edit_stays_and_what_puts_it_back_after_remove_does_not_revive_it() -> None:
    model = models.pixart()
    before = models.forward(model)
    with apply_edit(model, models.trained_like(model)):
        assert not torch.equal(models.forward(model), before)
        model.fuse_qkv_projections()  # sets processors of its own, and keeps those that it found
        theirs = model.attn_processors
    assert list(model.attn_processors.values()) == list(theirs.values())
    model.unfuse_qkv_projections()
    assert torch.equal(models.forward(model), before)


@torch.no_grad()
def test_a_tap_stands_in_for_every_attention_by_its_name_and_may_run_either_or_both() -> None:
    model = models.sd35()
    weights = models.trained_like(model)
    dense = models.forward(model)
    said: list[str] = []

    def tap(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        said.append(key)
        edit()
        return dense()

    with apply_edit(model, weights) as handle:
        linear = models.forward(model)
        handle.tap = tap
        assert torch.equal(models.forward(model), dense)
        handle.tap = lambda key, dense, edit: edit()
        assert torch.equal(models.forward(model), linear)
    assert said == ["0.joint", "0.self", "1.joint", "1.self", "2.joint"]


def test_blocks_that_are_left_out_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = models.sd35()
    weights = models.trained_like(model)
    with caplog.at_level(logging.INFO, "edit_core"):
        apply_edit(model, weights).remove()
        assert not caplog.messages
        apply_edit(model, weights, layers="1").remove()
    assert caplog.messages == ["EDiT: blocks 0, 2 stay dense: not listed or without weights"]


def test_weights_for_another_base_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edit_core"):
        apply_edit(models.pixart(seed=1), EDiTWeights.init(models.pixart(seed=2))).remove()
        assert "made for another base model" in caplog.text
        caplog.clear()
        apply_edit(models.pixart(seed=2), EDiTWeights.init(models.pixart(seed=2))).remove()
        assert not caplog.records


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_pipelines_draw_with_edit_and_without_again(backbone: str) -> None:
    channels = 4 if backbone.startswith("pixart") else 16
    vae = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
    )
    transformer = models.make(backbone)
    embeds = [torch.randn(1, 7, 64) for _ in range(2)]
    common: dict[str, Any] = {"num_inference_steps": 2, "height": 320, "width": 272, "output_type": "np"}
    common.update(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    if backbone.startswith("pixart"):
        pipeline_class = PixArtAlphaPipeline if backbone == "pixart_alpha" else PixArtSigmaPipeline
        pipe: Any = pipeline_class(None, None, vae, transformer, DPMSolverMultistepScheduler())
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
        common.update(prompt_attention_mask=mask, negative_prompt_attention_mask=mask, use_resolution_binning=False)
        common.update(prompt=None, negative_prompt=None)
    else:
        pipe = StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, None, None
        )
        common.update(pooled_prompt_embeds=torch.randn(1, 32), negative_pooled_prompt_embeds=torch.randn(1, 32))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        return torch.from_numpy(pipe(generator=torch.Generator().manual_seed(0), **common).images)

    before = draw()
    with apply_edit(transformer, models.trained_like(transformer)):
        edit = draw()
        assert torch.equal(draw(), edit)
    assert edit.shape == before.shape == (1, 320, 272, 3)
    assert not torch.equal(edit, before)
    assert torch.equal(draw(), before)


def test_softmax_attention_is_the_usual_one() -> None:
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 9, 12), torch.randn(2, 9, 12)
    got = softmax_attention(q, k, v, 3)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        assert torch.allclose(got[..., part], weights @ v[..., part], atol=1e-6)
