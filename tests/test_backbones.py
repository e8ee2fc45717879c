"""Telling base models apart by the names and shapes of their tensors, in every format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import save_file
from support import models

from edit_core import EDiTConfig, EDiTModelError, EDiTWeights, apply_edit, backbones
from edit_core.backbones import (
    BACKBONES,
    Backbone,
    Base,
    BaseLinear,
    backbone_named,
    identify,
    identify_module,
    registry,
)
from edit_core.basefile import BaseFile
from edit_core.weights import fingerprint

PIXART = {
    "t_block.1.bias": (6912,),
    **dict.fromkeys(BACKBONES["pixart_sigma"].ends["comfy"], (1152,)),
    **{f"blocks.{i}.attn.{k}": s for i in range(28) for k, s in (("qkv.bias", (3456,)), ("proj.bias", (1152,)))},
    **{f"blocks.{i}.cross_attn.kv_linear.bias": (2304,) for i in range(28)},
}
SD35 = {
    **dict.fromkeys(BACKBONES["sd35_medium"].ends["comfy"], (1536,)),
    **{f"joint_blocks.{i}.x_block.attn.proj.bias": (1536,) for i in range(24)},
    **{f"joint_blocks.{i}.x_block.attn2.proj.bias": (1536,) for i in range(13)},
    **{f"joint_blocks.{i}.context_block.attn.qkv.bias": (4608,) for i in range(24)},
}
SD3 = {key: shape for key, shape in SD35.items() if "attn2" not in key}
PIXART_ALPHA = {**PIXART, "csize_embedder.mlp.0.weight": (384, 256), "ar_embedder.mlp.0.weight": (384, 256)}


def test_real_pixart_is_recognised_in_the_original_names_and_in_a_checkpoint() -> None:
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        base = identify({prefix + key: shape for key, shape in PIXART.items()}, "it")
        assert (base.backbone.name, base.host, base.dim, base.depth) == ("pixart_sigma", "comfy", 1152, 28)
        assert set(base.sites) == {("self",)}


def test_real_sd35_medium_is_recognised_with_its_thirteen_second_attentions() -> None:
    other = {"first_stage_model.decoder.conv_in.weight": (4,), "text_encoders.clip_l.transformer.text_model.x": (4,)}
    base = identify({**{"model.diffusion_model." + key: shape for key, shape in SD35.items()}, **other}, "it")
    assert (base.backbone.name, base.host, base.dim, base.depth) == ("sd35_medium", "comfy", 1536, 24)
    assert base.sites == (("joint", "self"),) * 13 + (("joint",),) * 11


def test_pixart_sigma_of_any_depth_is_pixart_sigma() -> None:
    more = {key.replace("blocks.", "blocks.2"): s for key, s in PIXART.items() if re.match(r"blocks\.\d\.", key)}
    base = identify({**PIXART, **more}, "it")
    assert (base.backbone.name, base.depth) == ("pixart_sigma", 30)


@pytest.mark.parametrize("sized", [True, False])
def test_pixart_alpha_is_told_by_its_size_conditioning_and_else_it_is_said_that_it_cannot_be(sized: bool) -> None:
    base = identify(PIXART_ALPHA if sized else PIXART, "it")
    assert base.backbone.name == ("pixart_alpha" if sized else "pixart_sigma")
    assert ("a PixArt-α without size conditioning" in base.doubt) is not sized
    assert not identify({**PIXART, "y_embedder.y_embedding": (300, 4096)}, "it").doubt
    assert identify({**PIXART, "y_embedder.y_embedding": (120, 4096)}, "it").doubt, "ComfyUI's own, maybe"


@pytest.mark.parametrize("norms", [True, False], ids=["sd35_large", "sd3_medium"])
def test_stable_diffusion_3_without_attn2_is_recognised(norms: bool) -> None:
    keys = {**SD3, **({"joint_blocks.0.x_block.attn.ln_q.weight": (64,)} if norms else {})}
    base = identify(keys, "it")
    assert (base.backbone.name, base.host, base.depth, set(base.sites)) == ("sd3", "comfy", 24, {("joint",)})


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_no_two_backbones_claim_the_same_tensors(backbone: str) -> None:
    model = models.make(backbone)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert [name for name, known in BACKBONES.items() if known.match(shapes)] == [backbone]


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(EDiTModelError, match="'flux' is no backbone that EDiT knows; known are pixart_alpha, pixart_"):
        backbone_named("flux")


class Grouped(type(BACKBONES["pixart_sigma"])):  # type: ignore[misc]
    """Queries in more heads than keys and values, and no biases, as rotary models have them."""

    def linear_shape(self, base: Any, name: str) -> tuple[int, int]:
        return {"to_q": 96, "to_k": 32, "to_v": 32, "to_out": 64}[name], {"to_out": 96}.get(name, 64)

    def linears(self, block: int, site: str) -> tuple[BaseLinear, ...]:
        return tuple(linear._replace(bias=False) for linear in super().linears(block, site))


def test_linears_need_not_be_square_nor_have_biases() -> None:
    base = Base(Grouped(), "comfy", 64, (("self",),))
    assert [base.place(linear) for linear in base.linears(0)] == [
        ("blocks.0.attn.qkv", slice(0, 96)),
        ("blocks.0.attn.qkv", slice(96, 128)),
        ("blocks.0.attn.qkv", slice(128, 160)),
        ("blocks.0.attn.proj", slice(0, 64)),
    ]
    assert base.sampled(0) == "blocks.0.attn.proj.weight"


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_diffusers_modules_are_recognised(backbone: str) -> None:
    base = identify_module(models.make(backbone))
    assert (base.backbone.name, base.host) == (backbone, "diffusers")
    assert "diffusers names" in str(base)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({**PIXART, "blocks.14.attn.sr.weight": (4,)}, "own key/value compression"),
        ({**PIXART_ALPHA, "blocks.14.attn.sr.weight": (4,)}, "own key/value compression"),
        ({**PIXART, "blocks.0.attn.q_norm.weight": (4,)}, "query/key norms"),
        ({**SD3, "controlnet_blocks.0.weight": (4, 4)}, "ControlNet"),
        ({"transformer_blocks.0.attn.add_k_proj.bias": (4,), "transformer_blocks.0.attn.to_out.0.bias": (4,)}, "FLUX"),
        ({"controlnet_blocks.0.weight": (4, 4), "transformer_blocks.0.attn.to_out.0.bias": (4,)}, "a ControlNet"),
        ({"joint_blocks.0.x_block.attn.proj.bias": (1536,)}, "a part of a Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "FLUX"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.weight": (4, 4)}, "FLUX"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4,)}, "UNet"),
        ({"0.self.conv_fusion.up.weight": (72, 18)}, "EDiT weights"),
        ({"transformer.x.lora_A.weight": (4,)}, "a LoRA"),
        ({"diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight": (4,)}, "a LoRA"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1": (4,)}, "a LoKr"),
        ({"lycoris_transformer_blocks_0_attn_to_q.hada_w1_a": (4,)}, "a LoHa"),
        ({"oft_unet_blocks_0_attn_qkv.oft_blocks": (4,)}, "an OFT"),
        ({"lycoris_blocks_0_attn_proj.diff": (4,)}, "a LyCORIS adapter"),
        ({"blocks.0.attn.qkv.base_layer.bias": (4,), "blocks.0.attn.qkv.lora_A.default.weight": (4,)}, "as PEFT saves"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4,)}, "T5"),
        ({"text_model.embeddings.x": (4,)}, "CLIP"),
        ({"decoder.conv_in.weight": (4,)}, "VAE"),
        ({"a.b": (4,), "c": (1,)}, "it holds a.b, c"),
        ({}, "no tensors at all"),
    ],
)
def test_anything_else_is_named_for_what_it_is(keys: dict[str, tuple[int, ...]], found: str) -> None:
    with pytest.raises(EDiTModelError, match=found) as caught:
        identify(keys, "model.safetensors")
    assert str(caught.value).startswith("model.safetensors is ")
    said = str(caught.value).partition("; EDiT works on ")[2]
    assert all(backbone.title in said for backbone in BACKBONES.values())


@pytest.mark.parametrize(
    "prefix",
    ["transformer.", "unet.", "model.diffusion_model._orig_mod.", "_orig_mod.", "module.transformer._orig_mod."],
)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_model_under_a_wrappers_names_is_recognised(prefix: str, backbone: str, tmp_path: Path) -> None:
    state = models.make(backbone).state_dict()
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "model.safetensors")
    file = BaseFile(tmp_path / "model.safetensors")
    base = file.identify()
    assert (base.backbone.name, base.prefix, base.renamed) == (
        backbone, prefix.replace("_orig_mod.", ""), "_orig_mod" in prefix,
    )  # fmt: skip
    assert fingerprint(base, file.tensor) == fingerprint(identify_module(models.make(backbone)), state.__getitem__)
    EDiTWeights.init_for(base, file.tensor, EDiTConfig(), "0")


def test_blocks_that_were_compiled_one_by_one_are_recognised_in_a_file_and_in_memory(tmp_path: Path) -> None:
    model = models.sd35()
    save_file(
        {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    assert BaseFile(tmp_path / "model.safetensors").identify().sites == identify_module(model).sites
    model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1])
    assert identify_module(model).depth == 3


def without(keys: dict[str, tuple[int, ...]], *parts: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in keys.items() if not any(part in key for part in parts)}


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (without(SD35, "joint_blocks.1."), "it lacks block 1, and has block 23"),
        (without(PIXART, "blocks.7.", "blocks.9."), "it lacks block 7, 9, and has block 27"),
        (without(SD35, "joint_blocks.23.x_block"), "its block 23 is not whole, and has block 23"),
        (without(SD35, "final_layer"), "it lacks final_layer.linear.bias"),
        (without(SD35, "final_layer", *(f"joint_blocks.{block}." for block in range(12, 24))), "it lacks final_layer"),
        (without(PIXART, "x_embedder"), "it lacks x_embedder.proj.bias"),
        (without(PIXART, "blocks.4.attn.qkv"), "it lacks blocks.4.attn.qkv.bias"),
        (without(SD35, "joint_blocks.3.context_block"), "it lacks joint_blocks.3.context_block.attn.qkv.bias"),
    ],
)
def test_a_part_of_a_model_is_not_taken_for_a_shallower_one(keys: dict[str, tuple[int, ...]], found: str) -> None:
    with pytest.raises(EDiTModelError, match=re.escape(found)) as caught:
        identify(keys, "model.safetensors")
    assert str(caught.value).startswith("model.safetensors is a part of a ")
    for part in ("model-00001-of-00003.safetensors", "transformer/x-2-of-3.safetensors"):
        with pytest.raises(EDiTModelError, match=f"^{part} is one part of 3: join them into one file"):
            identify(keys, part)


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_every_part_of_a_model_is_said_to_be_one_and_all_of_them_are_the_model(backbone: str, tmp_path: Path) -> None:
    state = models.make(backbone).state_dict()
    names = sorted(state)
    for part in (1, 2, 3):
        save_file(
            {key: state[key] for key in names[(part - 1) * len(names) // 3 : part * len(names) // 3]},
            tmp_path / f"model-{part:05}-of-00003.safetensors",
        )
        with pytest.raises(EDiTModelError, match="is one part of 3: join them"):
            BaseFile(tmp_path / f"model-{part:05}-of-00003.safetensors").identify()
        if part < 3:
            with pytest.raises(EDiTModelError, match=f"holds {part} of a model's 3 parts, and not part {part + 1}"):
                BaseFile(tmp_path)
    assert BaseFile(tmp_path).identify().backbone.name == backbone


@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_a_controlnet_of_diffusers_is_not_taken_for_its_base(dual: tuple[int, ...]) -> None:
    control = SD3ControlNetModel.from_transformer(models.sd35(dual=dual), num_layers=2)
    with pytest.raises(EDiTModelError, match="this SD3ControlNetModel is a ControlNet of Stable Diffusion 3"):
        identify_module(control)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({**PIXART, "blocks.27.attn.proj.bias": (1152, 2)}, "blocks.27.attn.proj.bias is 1152x2"),
        ({**SD35, "joint_blocks.3.x_block.attn.proj.bias": ()}, "joint_blocks.3.x_block.attn.proj.bias is a scalar"),
        ({**SD35, "joint_blocks.0.x_block.attn.proj.bias": (1,) * 50}, f"proj.bias is {'x'.join('1' * 8)}"),
        ({key: (0,) if key.endswith("attn.proj.bias") else of for key, of in PIXART.items()}, "attn.proj.bias is 0"),
    ],
    ids=["matrix", "scalar", "long", "empty"],
)
def test_a_block_of_another_width_is_named(keys: dict[str, tuple[int, ...]], found: str) -> None:
    with pytest.raises(EDiTModelError) as caught:
        identify(keys, "model.safetensors")
    assert str(caught.value).startswith("model.safetensors is damaged: its ")
    assert str(caught.value).endswith(f"{found}, not one number per channel")


def test_a_third_backbone_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pixart_omega.py").write_text(
        "from edit_core.backbones.pixart_sigma import PixArtSigma\n"
        "class Omega(PixArtSigma):\n    name = 'pixart_omega'\n"
        "BACKBONE = Omega()\n"
    )
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    assert set(registry._discover()) == {*BACKBONES, "pixart_omega"}


@pytest.mark.parametrize(
    ("backbone", "size", "grid"),
    [
        ("pixart_sigma", (34, 40), (17, 20)),
        ("pixart_alpha", (34, 40), (17, 20)),
        ("sd35_medium", (34, 40), (17, 20)),
        ("sd35_medium", (33, 39), (17, 20)),
        ("sd3", (33, 39), (17, 20)),
    ],
)
def test_token_grids_in_comfyui(backbone: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert BACKBONES[backbone].comfy_grid(*size) == grid


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=list(BACKBONES))
def test_a_description_says_all_that_one_has_to_say(backbone: Backbone) -> None:
    assert not [name for name in Backbone.__annotations__ if not hasattr(backbone, name)]
    assert set(backbone.limits) <= set(backbone.parts)
    assert set(backbone.comfy_harmless) & set(backbone.comfy_arguments)


def test_every_backbone_has_its_own_name() -> None:
    assert set(BACKBONES) == set(models.BACKBONES)


@pytest.mark.parametrize(
    ("side", "said"), [(8, "multiples of 16"), (1000, "multiples of 16"), (1024, "at most 768 pixels")]
)
def test_sizes_that_cannot_be_drawn(side: int, said: str) -> None:
    with pytest.raises(EDiTModelError, match=said):
        BACKBONES["sd35_medium"].check_size(side, side, models.sd35())


class Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def test_what_is_no_transformer_is_named_and_a_pipeline_said_to_have_one() -> None:
    class Pipeline:
        transformer = models.sd35()

    for use in (identify_module, EDiTWeights.init, lambda given: apply_edit(given, EDiTConfig.preset("piecewise"))):
        with pytest.raises(EDiTModelError, match=r"a Pipeline is no transformer: hand in its \.transformer"):
            use(Pipeline())
        with pytest.raises(EDiTModelError, match=r"a str is no transformer$"):
            use("model.safetensors")
    with pytest.raises(EDiTModelError, match="this Wrapper holds a PixArt-Σ as its model; hand in that one"):
        apply_edit(Wrapper(models.pixart()), EDiTConfig.preset("piecewise"))


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its blocks"])
def test_a_compiled_transformer_is_applied_to_as_the_one_in_it(backbone: str, whole: bool) -> None:
    model = models.make(backbone)
    weights = models.trained_like(model)
    with torch.no_grad(), apply_edit(model, weights):
        want = models.forward(model)
    plain = models.forward(model)
    compiled = torch.compile(model, backend="eager") if whole else model
    for place, block in enumerate(() if whole else model.transformer_blocks):
        model.transformer_blocks[place] = torch.compile(block, backend="eager")
    assert set(EDiTWeights.init(compiled).tensors) == set(weights.tensors)
    with torch.no_grad(), apply_edit(compiled, weights):
        assert models.relative_error(models.forward(model), want) < 1e-5
        if not whole:
            assert models.relative_error(models.forward(compiled), want) < 1e-5
    assert models.relative_error(models.forward(model), plain) < 1e-6
