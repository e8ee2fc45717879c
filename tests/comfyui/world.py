"""Checks of the small world inside a real ComfyUI process: `python world.py CHECKOUT BASE_DIRECTORY PACK FILES`.

`test_world_comfyui.py` starts it once per ComfyUI, as `test_comfyui.py` does with `inside.py`.
"""

from __future__ import annotations

from typing import Any

from host import (  # first, since it readies ComfyUI to be imported
    BASE,
    PACK,
    apply,
    error,
    load,
    logged,
    lora_for,
    main,
    recorded,
    run,
    same,
    weights,
    with_lora,
)

import torch
from safetensors.torch import save_file

import comfy.sd
import folder_paths
import nodes

CAPTION = "a large red circle at the top left, in the bottom centre a small blue bar, on grey rows"
SAMPLING = {"pixart_sigma": ("dpmpp_2m", "sgm_uniform"), "sd35_medium": ("euler", "normal")}


def model(b: str, dtype: str = "fp32", student: bool = False) -> Any:
    name = f"edit_small_world_{b}"
    return load(name, dtype, f"{name}_student.safetensors" if student else "none")


def clip(b: str) -> Any:
    return run("EDiTSmallWorldText", backbone=b)


def encode(text_encoder: Any, text: str = CAPTION) -> Any:
    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(text_encoder, text)[0]


def draw(m: Any, b: str, height: int = 34, width: int = 40, steps: int = 1, cfg: float = 1.0) -> torch.Tensor:
    """A latent as KSampler gives it."""
    empty = {"samples": torch.zeros(1, m.get_model_object("latent_format").latent_channels, height, width)}
    texts = encode(clip(b)), encode(clip(b), "")
    with torch.inference_mode():
        return nodes.common_ksampler(m, 1, steps, cfg, *SAMPLING[b], *texts, empty)[0]["samples"]


def vae(b: str) -> Any:
    return nodes.VAELoader().load_vae(f"edit_small_world_{b}_vae.safetensors")[0]


def check_shipped_folders_come_after_the_users(b: str) -> Any:
    for kind in ("diffusion_models", "vae", "edit"):
        paths = folder_paths.get_folder_paths(kind)
        assert paths[-1] == str(PACK / "edit_core" / "world" / "models" / kind), paths
        assert paths[0].startswith(str(BASE)), paths
    return None


def check_output_equals_diffusers(b: str) -> Any:
    """Runs teacher and student on latents of both shapes; the outer test compares with diffusers."""
    for name, student in (("base", False), ("edit", True)):
        with logged() as lines:
            m = model(b, student=student)
        assert not any("made for another base" in line for line in lines), lines
        for height, width in ((34, 40), (40, 34)):
            with recorded(m, f"{b}-{name}-{height}x{width}"):
                draw(m, b, height, width)
    return None


def check_whole_draw_equals_diffusers(b: str) -> Any:
    """Draws with guidance, and decodes and encodes noise; the outer test does the same with diffusers."""
    m, g = model(b), torch.Generator().manual_seed(0)
    latent = draw(m, b, steps=3, cfg=3.0)
    noise = torch.randn(1, latent.shape[1], 8, 10, generator=g)  # random weights draw what is no picture's latent
    pixels = torch.rand(1, 64, 80, 3, generator=g)
    with torch.inference_mode():
        decoded = nodes.VAEDecode().decode(vae(b), {"samples": m.model.process_latent_out(noise)})[0]
        encoded = nodes.VAEEncode().encode(vae(b), pixels)[0]["samples"]
    latents = {"latent": latent, "encoded": encoded}
    found = {name: m.model.process_latent_in(t) for name, t in latents.items()}
    found |= {"noise": noise, "decoded": decoded, "pixels": pixels}
    save_file({name: t.clone().contiguous() for name, t in found.items()}, BASE / f"{b}-draw.safetensors")
    return None


def check_text_encoder(b: str) -> Any:
    text_encoder = clip(b)
    ((cond, extra),) = encode(text_encoder)
    words = 1 + len(CAPTION.replace(",", " ,").split())
    tokens = {"pixart_sigma": words, "sd35_medium": 48}[b]
    assert cond.shape == (1, tokens, 192) and extra["pooled_output"].shape == (1, 64), (cond.shape, extra)
    assert encode(text_encoder, "")[0][0].shape == (1, {"pixart_sigma": 1, "sd35_medium": 48}[b], 192)
    same(encode(text_encoder, CAPTION.replace("red", "(red:1.0)"))[0][0], cond, "a weight of one")
    weighted = encode(text_encoder, CAPTION.replace("red circle", "((red) circle:1.5)"))[0][0]
    expected = cond.clone()
    expected[0, 3] *= 1.1 * 1.5
    expected[0, 4] *= 1.5
    assert error(weighted, expected) < 1e-6
    unknown = encode(text_encoder, "(a purple) cow\\(s\\)")[0][0]
    same(unknown[0, 3, :64], encode(text_encoder, "x")[0][0][0, 1, :64], "an unknown word")
    assert encode(text_encoder, "red " * 100)[0][0].shape == (1, 48, 192)
    assert encode(text_encoder.clone())[0][0].shape == cond.shape
    stopped = nodes.CLIPSetLastLayer().set_last_layer(text_encoder, -2)[0]
    same(encode(stopped)[0][0], cond, "CLIP Set Last Layer")
    both = comfy.sd.load_lora_for_models(model(b), text_encoder, lora_for(model(b)), 1.0, 1.0)
    same(encode(both[1])[0][0], cond, "Load LoRA")
    return None


def check_edit_and_loras_work_as_on_other_models(b: str) -> Any:
    m, w = model(b), weights(f"edit_small_world_{b}_student")
    plain, edit = draw(m, b), draw(model(b, student=True), b)
    assert error(edit, plain) > 1e-3, "EDiT changed nothing"
    same(draw(apply(m, w), b), edit, "EDiTApply and EDiTLoadModel")
    assert error(draw(with_lora(m, lora_for(m)), b), plain) > 1e-3, "the LoRA changed nothing"
    same(draw(m, b), plain, "base")
    half = draw(model(b, "fp16", student=True), b)
    assert error(half, edit) < 0.02
    return {"float16": error(half, edit)}


def check_other_ways_of_loading_give_the_same(b: str) -> Any:
    m = model(b)
    plain = draw(m, b)
    state = {f"model.diffusion_model.{k}": v for k, v in m.model.diffusion_model.state_dict().items()}
    save_file(state, BASE / "models" / "checkpoints" / f"saved_{b}.safetensors")
    saved = {"model_name": f"checkpoints/saved_{b}.safetensors", "weight_dtype": "fp32", "edit_weights": "none"}
    same(draw(run("EDiTLoadModel", **saved), b), plain, "under ComfyUI's names")
    if b == "sd35_medium":
        stock = nodes.UNETLoader().load_unet(f"edit_small_world_{b}.safetensors", "default")[0]
        same(draw(stock, b), plain, "Load Diffusion Model")
    if "disable_dynamic" in comfy.sd.load_diffusion_model.__code__.co_varnames:  # as for several GPUs
        factory, arguments = m.cached_patcher_init
        same(draw(factory(*arguments, disable_dynamic=True), b), plain, "independent copy")
    return None


main(globals())
