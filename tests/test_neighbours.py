"""diffusers' own hooks, helpers and pipelines beside EDiT: what they change is noticed, honoured or said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FasterCacheConfig, PixArtSigmaPipeline
from diffusers.hooks import LayerSkipConfig, apply_faster_cache, apply_layer_skip
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from support import models
from support.tools import TOOLS, tool
from torch import Tensor, nn

from edit_core import EDiTConfig, apply_edit

PIECEWISE = EDiTConfig.preset("piecewise")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What EDiT has logged so far."""
    caplog.set_level(logging.WARNING, "edit_core")
    return lambda: [text for text in caplog.messages if text.startswith("EDiT")]


def attentions(model: Any) -> list[Any]:
    """Those that EDiT replaces."""
    names = ("attn1",) if hasattr(model.transformer_blocks[0], "attn1") else ("attn", "attn2")
    return [x for block in model.transformer_blocks for name in names if (x := getattr(block, name, None)) is not None]


def fuse(model: Any) -> None:
    model.fuse_qkv_projections()
    if hasattr(model.transformer_blocks[0], "attn"):  # diffusers' own joint processor cannot run a fused attn2
        for block in model.transformer_blocks:
            if getattr(block, "attn2", None) is not None:
                block.attn2.set_processor(JointAttnProcessor2_0())


def default(model: Any) -> None:
    model.set_attn_processor(AttnProcessor2_0() if hasattr(model.transformer_blocks[0], "attn1") else Joint())


class Joint(JointAttnProcessor2_0):
    pass


def ip_adapter(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(192, 24, 64, timesteps_emb_dim=192))


CHANGES = {"fuse": (fuse, "Fused"), "set": (default, "rocessor"), "ip": (ip_adapter, "SD3IPAdapter")}


@pytest.mark.parametrize(
    ("backbone", "way"),
    [("pixart_sigma", "fuse"), ("pixart_sigma", "set"), ("sd35_medium", "fuse"), ("sd35_medium", "ip")],
)
@torch.no_grad()
def test_processors_that_were_replaced_are_said_once_and_their_blocks_are_not_called_linear(
    backbone: str, way: str, said: Any
) -> None:
    model = models.make(backbone)
    with apply_edit(model, models.trained_like(model), layers="1, 0") as handle:
        assert handle.blocks == (0, 1)
        CHANGES[way][0](model)
        assert handle.blocks == ()
        for _ in range(2):
            models.forward(model)
        assert len(said()) == 1
        assert "blocks 0-1 are not linear any more" in said()[0]
        assert CHANGES[way][1] in said()[0]
    assert handle.blocks == ()


@torch.no_grad()
def test_one_replaced_processor_of_two_makes_its_block_alone_not_linear(said: Any) -> None:
    model = models.sd35()
    with apply_edit(model, models.trained_like(model)) as handle:
        ours = model.transformer_blocks[1].attn2.processor
        model.transformer_blocks[1].attn2.set_processor(Joint())
        assert handle.blocks == (0, 2)
        models.forward(model)
        assert "blocks 1 are not linear any more: Joint took" in said()[0]
        model.transformer_blocks[1].attn2.set_processor(ours)
        assert handle.blocks == (0, 1, 2), "put back, as perturbed attention guidance does"


@pytest.mark.parametrize("backbone", models.SHIPPED)
@torch.no_grad()
def test_a_second_edit_lives_on_when_the_first_that_lost_its_processors_is_removed(backbone: str) -> None:
    model = models.make(backbone)
    before, keys = models.forward(model), list(model.state_dict())
    weights = models.trained_like(model)
    with apply_edit(model, weights):
        linear = models.forward(model)
    first = apply_edit(model, models.trained_like(model, seed=9))
    default(model)
    second = apply_edit(model, weights)
    first.remove()
    assert len(second.blocks) == len(model.transformer_blocks)
    assert torch.equal(models.forward(model), linear)
    assert torch.equal(models.forward(model.to(torch.float64)).float(), models.forward(model).float()), "it moves along"
    model.to(torch.float32)
    second.remove()
    assert torch.equal(models.forward(model), before)
    assert list(model.state_dict()) == keys


class Adapted(nn.Module):
    """A linear with an adapter, as PEFT puts it in the linear's place."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.base_layer = linear
        self.more = nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.more(x)


@pytest.mark.parametrize("when", ["before EDiT", "while it is applied"])
@pytest.mark.parametrize("backbone", models.SHIPPED)
@torch.no_grad()
def test_an_adapter_acts_after_the_projections_were_fused_and_unfused(backbone: str, when: str) -> None:
    model, twin = models.make(backbone), models.make(backbone)
    weights = models.trained_like(model)
    if when == "before EDiT":
        model.fuse_qkv_projections()
        model.unfuse_qkv_projections()
    with apply_edit(model, weights):
        if when != "before EDiT":
            model.fuse_qkv_projections()
            model.unfuse_qkv_projections()
        plain = models.forward(model)
        for each in (model, twin):
            for attention in attentions(each):
                torch.manual_seed(0)
                attention.to_q = Adapted(attention.to_q)
        adapted = models.forward(model)
    with apply_edit(twin, weights):
        assert torch.equal(models.forward(twin), adapted)
    assert models.relative_error(adapted, plain) > 1e-3


@torch.no_grad()
def test_fused_layers_that_compute_another_model_are_named(said: Any) -> None:
    model = models.sd35()
    model.fuse_qkv_projections()
    attention = model.transformer_blocks[0].attn
    attention.to_q = Adapted(attention.to_q)
    with apply_edit(model, models.trained_like(model)):
        for _ in range(2):
            models.forward(model)
    assert len(said()) == 2
    assert "FusedJointAttnProcessor2_0 leaves out this model's norms of queries and keys" in said()[0]
    assert "which the adapters on to_q, to_k and to_v are not in" in said()[1]


@pytest.mark.parametrize("backbone", models.SHIPPED)
@torch.no_grad()
def test_faster_cache_meets_tensors_in_the_last_block_too(backbone: str) -> None:
    model = models.make(backbone)
    with apply_edit(model, models.trained_like(model)):
        linear = models.forward(model)
        apply_faster_cache(
            model,
            FasterCacheConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 681),
                spatial_attention_block_identifiers=("transformer_blocks",), tensor_format="BCHW",
                is_guidance_distilled=True, current_timestep_callback=lambda: 900,
            ),
        )  # fmt: skip
        assert torch.equal(models.forward(model), linear)


@torch.no_grad()
def test_every_joint_attention_gives_prompt_rows_as_diffusers_does() -> None:
    model = models.sd35(dual=())
    shapes: list[Any] = []
    for attention in attentions(model):
        attention.register_forward_hook(lambda _, __, output: shapes.append([part.shape for part in output]))
    models.forward(model)
    with apply_edit(model, PIECEWISE):
        models.forward(model)
    assert shapes[:3] == shapes[3:]


@torch.no_grad()
def test_a_tap_is_not_given_the_prompt_rows_that_the_last_block_drops() -> None:
    model = models.sd35(dual=())
    seen: list[bool] = []

    def tap(key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        output = edit()
        seen.append(output[1] is None)
        return output

    with apply_edit(model, models.trained_like(model)) as handle:
        linear = models.forward(model)
        handle.tap = tap
        assert torch.equal(models.forward(model), linear)
    assert seen == [False, False, True], "a loss would compare them with the teacher's"


@pytest.mark.parametrize("kind", ["student", "piecewise"])
@torch.no_grad()
def test_layers_whose_attention_is_skipped_are_those_that_diffusers_skips(kind: str) -> None:
    model, twin = models.pixart(), models.pixart()
    config: Callable[[], Any] = lambda: LayerSkipConfig([0, 1], "transformer_blocks", skip_ff=False)  # noqa: E731
    apply_layer_skip(twin, config())
    with apply_edit(model, models.trained_like(model) if kind == "student" else PIECEWISE):
        apply_layer_skip(model, config())
        assert torch.equal(models.forward(model), models.forward(twin))


@pytest.mark.parametrize("kind", ["student", "piecewise"])
@torch.no_grad()
def test_layers_whose_scores_are_skipped_stay_dense_and_say_so(kind: str, said: Any) -> None:
    model, twin = models.pixart(), models.pixart()
    config: Callable[[], Any] = lambda: LayerSkipConfig(  # noqa: E731
        [0, 1], "transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    plain = models.forward(twin)
    apply_layer_skip(twin, config())
    skipped = models.forward(twin)
    assert models.relative_error(skipped, plain) > 1e-3
    with apply_edit(model, models.trained_like(model) if kind == "student" else PIECEWISE):
        apply_layer_skip(model, config())
        assert torch.equal(models.forward(model), skipped)
    assert len(said()) == 1
    assert "AttentionScoreSkipFunctionMode, which replaces softmax attention" in said()[0]


# --- arguments of the attention ---


class Regional(AttnProcessor2_0):
    """A processor of somebody's, with arguments of its own."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        temb: Any = None, regions: Tensor | None = None, strength: float = 1.0,
    ) -> Tensor:  # fmt: skip
        y = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        y = y if regions is None else y + strength * regions
        return y if temb is None else y * temb


class RegionalJoint(JointAttnProcessor2_0):
    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        regions: Tensor | None = None, strength: float = 1.0, temb: Any = None,
    ) -> Any:  # fmt: skip
        found = super().__call__(attn, hidden_states, encoder_hidden_states)
        y = found[0] if isinstance(found, tuple) else found
        y = y if regions is None else y + strength * regions
        y = y if temb is None else y * temb
        return (y, *found[1:]) if isinstance(found, tuple) else y


@pytest.mark.parametrize("kind", ["student", "piecewise"])
@pytest.mark.parametrize("backbone", models.SHIPPED)
@torch.no_grad()
def test_arguments_that_only_the_replaced_processor_knows_reach_it_and_are_named(
    backbone: str, kind: str, said: Any
) -> None:
    model = models.make(backbone)
    for attention in attentions(model):
        attention.set_processor(Regional() if backbone == "pixart_sigma" else RegionalJoint())
    name = "cross_attention_kwargs" if backbone == "pixart_sigma" else "joint_attention_kwargs"
    given: dict[str, Any] = {"regions": torch.tensor(0.5), "strength": 0.25}
    if backbone == "sd35_medium":  # in PixArt the cross-attention gets them, too
        given = {"temb": torch.tensor(1.5)}
    dense = models.forward(model, **{name: given})
    with apply_edit(model, models.trained_like(model) if kind == "student" else PIECEWISE):
        linear = models.forward(model)
        assert not said()
        assert torch.equal(models.forward(model, **{name: given}), dense)
        assert said() == [
            f"EDiT: stays dense: {' and '.join(given)} in the attention's call, which may change what it computes"
        ]
        nothing = dict.fromkeys(given)
        if backbone == "sd35_medium":
            assert torch.equal(models.forward(model, **{name: nothing}), linear), "None is nothing"
    assert models.relative_error(dense, linear) > 1e-3


@pytest.mark.parametrize("backbone", models.SHIPPED)
@torch.no_grad()
def test_arguments_that_nobody_knows_change_nothing_with_edit_and_without(backbone: str, said: Any) -> None:
    model = models.make(backbone)
    name = "cross_attention_kwargs" if backbone == "pixart_sigma" else "joint_attention_kwargs"
    given = {name: {"regions": torch.tensor(0.5), "temb": torch.randn(2, 192)}}
    assert torch.equal(models.forward(model, **given), models.forward(model))
    with apply_edit(model, models.trained_like(model)):
        assert torch.equal(models.forward(model, **given), models.forward(model))
    assert not said()


@pytest.mark.parametrize("kind", ["student", "piecewise"])
@torch.no_grad()
def test_a_mask_that_the_host_takes_no_notice_of_changes_nothing(kind: str, said: Any) -> None:
    model = models.sd35()
    mask = torch.zeros(2, 1, 340).index_fill(2, torch.arange(100), -1e4)
    given = {"joint_attention_kwargs": {"attention_mask": mask}}
    dense = models.forward(model, **given)
    with apply_edit(model, models.trained_like(model) if kind == "student" else PIECEWISE):
        assert torch.equal(models.forward(model, **given), dense)
    assert ["an attention mask on image tokens" in text for text in said()] == [True]


# --- sizes ---


@pytest.mark.parametrize(("asked", "small"), [((64, 64), (128, 128)), ((256, 512), (1024, 2048))])
@torch.no_grad()
def test_a_picture_that_the_pipeline_draws_smaller_than_asked_is_said(
    asked: tuple[int, int], small: tuple[int, int], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma
    from test_hosts import vae

    monkeypatch.setattr(pipeline_pixart_sigma, "ASPECT_RATIO_512_BIN", {"1.0": [64.0, 64.0], "0.5": [64.0, 128.0]})
    model = models.pixart()
    pipe = PixArtSigmaPipeline(None, None, vae(4), model, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = torch.randn(1, 7, 64), torch.ones(1, 7)

    def draw(height: int, width: int, **more: Any) -> None:
        pipe(prompt=None, negative_prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds, height=height,
             prompt_attention_mask=mask, negative_prompt_attention_mask=mask, num_inference_steps=2, width=width,
             output_type="latent", **more)  # fmt: skip

    with apply_edit(model, PIECEWISE):
        models.forward(model)
        draw(*asked, use_resolution_binning=False)
        if asked == (64, 64):
            draw(*asked)
        assert not said()
        draw(*small)
    height, width = small
    tokens = "4x4" if height == width else "8x4"
    assert said() == [
        f"EDiT: the pipeline draws {tokens} tokens and scales the picture to the {width}x{height} pixels that were "
        "asked for; pass use_resolution_binning=False to draw that size"
    ]


# --- the table ---


def test_the_table_holds_every_neighbour_and_no_fault_of_edits() -> None:
    neighbours = tool("neighbours")
    page = (TOOLS.parent / "docs" / "neighbours.md").read_text(encoding="utf-8")
    for title in neighbours.TITLES.values():
        table = page.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
        assert [line.split(" | ")[0].removeprefix("| ") for line in table] == [x.name for x in neighbours.NEIGHBOURS]
        assert not [line for line in table if "**" in line or "not run" in line]


def test_the_tables_cells_are_what_comes_of_it() -> None:
    neighbours = tool("neighbours")
    off = neighbours.Neighbour("off", lambda model: model._forward_pre_hooks.clear(), 1.0)
    chosen = [
        x for x in neighbours.NEIGHBOURS if x.name in ("MagCache", "layer skip, attention", "fused and unfused again")
    ]
    cells = {name: found[:3] for name, found in neighbours.rows((*chosen, off))}
    said = "`EDiT: stays dense: an attention was called from outside its transformer`"
    assert cells.pop("off")[1:] == [f"the host's own attention: {said}"] * 2
    assert len(cells) == 3
    assert all(found == ["works"] * 3 for found in cells.values())
