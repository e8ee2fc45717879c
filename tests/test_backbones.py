"""Telling base models apart by the names and shapes of their tensors, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import models

from edit_core import EDiTModelError, backbones
from edit_core.backbones import BACKBONES, identify, identify_module

PIXART = {
    "t_block.1.bias": (6912,),
    "scale_shift_table": (2, 1152),
    **{f"blocks.{i}.attn.{k}": s for i in range(28) for k, s in (("qkv.bias", (3456,)), ("proj.bias", (1152,)))},
    **{f"blocks.{i}.cross_attn.kv_linear.bias": (2304,) for i in range(28)},
}
SD35 = {
    **{f"joint_blocks.{i}.x_block.attn.proj.bias": (1536,) for i in range(24)},
    **{f"joint_blocks.{i}.x_block.attn2.proj.bias": (1536,) for i in range(13)},
    **{f"joint_blocks.{i}.context_block.attn.qkv.bias": (4608,) for i in range(24)},
}
SD35_WITHOUT_ATTN2 = {key: shape for key, shape in SD35.items() if "attn2" not in key}


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


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_diffusers_modules_are_recognised(backbone: str) -> None:
    base = identify_module(models.make(backbone))
    assert (base.backbone.name, base.host) == (backbone, "diffusers")
    assert "diffusers names" in str(base)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({**PIXART, "csize_embedder.mlp.0.weight": (4,)}, "PixArt-α"),
        ({**PIXART, "blocks.14.attn.sr.weight": (4,)}, "own key/value compression"),
        ({**PIXART, "blocks.0.attn.q_norm.weight": (4,)}, "query/key norms"),
        (SD35_WITHOUT_ATTN2, "Stable Diffusion 3 without attn2"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "FLUX"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.weight": (4, 4)}, "FLUX"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4,)}, "UNet"),
        ({"0.self.conv_fusion.up.weight": (72, 18)}, "EDiT weights"),
        ({"transformer.x.lora_A.weight": (4,)}, "LoRA"),
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
    assert "EDiT works on PixArt-Σ and Stable Diffusion 3.5-Medium" in str(caught.value)


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
    assert set(backbones._discover()) == {*BACKBONES, "pixart_omega"}


@pytest.mark.parametrize(
    ("backbone", "size", "grid"),
    [("pixart_sigma", (34, 40), (17, 20)), ("sd35_medium", (34, 40), (17, 20)), ("sd35_medium", (33, 39), (17, 20))],
)
def test_token_grids_in_comfyui(backbone: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert BACKBONES[backbone].comfy_grid(*size) == grid


def test_every_backbone_has_its_own_name() -> None:
    assert set(BACKBONES) == set(models.BACKBONES)
