"""The composition matrix's slow cells inside a real ComfyUI process: see `test_matrix_comfyui.py`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from host import BASE, apply, error, lora_for, main, same, user_error, with_lora  # first: it readies ComfyUI
from matrix_host import agreement, bare, draw, side, teacher
import torch

import comfy.model_management
import comfy.sd
import folder_paths
import nodes
from comfy_api.torch_helpers import set_torch_compile_wrapper

GGUF_PACK = Path(os.environ.get("COMFYUI_GGUF_PATH") or Path.home() / "comfy/packs/ComfyUI-GGUF")


def check_gguf_base(b: str) -> Any:
    """A base quantised to 8 and 4 bits, loaded by ComfyUI-GGUF: EDiT, LoRAs on it, and the base afterwards."""
    if not (GGUF_PACK / "__init__.py").is_file():
        return {"skipped": "no ComfyUI-GGUF: set COMFYUI_GGUF_PATH, or put it in ~/comfy/packs/ComfyUI-GGUF"}
    if "UnetLoaderGGUF" not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.load_custom_node(str(GGUF_PACK)))
    load_gguf = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet
    if b == "pixart_sigma":
        quantise(b, "Q8_0", "pixart")
        return {"said by ComfyUI-GGUF": user_error("architecture", load_gguf, f"{b}_Q8_0.gguf")}
    reference, figures = apply(teacher(b), side(b)), {}
    want, plain = draw(reference, b), draw(teacher(b), b)
    for kind, least in (("Q8_0", 0.9), ("Q4_0", 0.3)):
        quantise(b, kind, "sd3")
        base = load_gguf(f"{b}_{kind}.gguf")[0]
        before = draw(base, b)
        patched = apply(base, side(b))
        edit, lora = draw(patched, b), lora_for(teacher(b), 0.1)
        figures[f"{kind} student against float32"] = error(edit, want)
        change = agreement((want, edit), (plain, before), least)
        figures[f"{kind}, cosine of EDiT's change with float32's"] = change["cosine of both"]
        tuned = draw(with_lora(patched, lora), b)
        change = agreement((draw(with_lora(reference, lora), b), tuned), (want, edit), least)
        figures[f"{kind}, cosine of a LoRA's change with float32's"] = change["cosine of both"]
        figures[f"{kind}, LoRA before against after"] = error(draw(apply(with_lora(base, lora), side(b)), b), tuned)
        assert figures[f"{kind}, LoRA before against after"] < 1e-4, figures
        same(draw(base, b), before, f"the {kind} base afterwards")
    return figures


def quantise(b: str, kind: str, architecture: str) -> None:
    """Writes a teacher as a GGUF file: matrices of the blocks in the given kind, all else in float32."""
    import gguf  # only where the pack is, which needs it

    writer = gguf.GGUFWriter(BASE / "models/diffusion_models" / f"{b}_{kind}.gguf", architecture)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, tensor in teacher(b).model.diffusion_model.state_dict().items():
        array = tensor.float().numpy()
        if array.ndim == 2 and "blocks." in name and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder_paths.filename_list_cache.clear()


def check_partial_loading_at_five_budgets(b: str) -> Any:
    """With room for a part of the base alone, as on a small GPU: the picture is the one of the whole, LoRA and all."""
    base, w = teacher(b), side(b)
    plain, figures = draw(base, b), {}
    for name, model in (("student", apply(base, w)), ("student and LoRA", with_lora(apply(base, w), lora_for(base)))):
        want, size = draw(model, b), model.model_size()
        for fraction in (0.05, 0.25, 0.5, 0.75, 0.95):
            comfy.model_management.unload_all_models()
            model.partially_load(torch.device("cpu"), extra_memory=int(size * fraction))
            loaded = model.loaded_size() / size
            with torch.inference_mode():
                figures[f"{name}, {fraction:.0%}"] = error(draw(model, b), want)
            assert loaded < 1, (fraction, loaded)
            model.partially_unload(torch.device("cpu"), size // 2)
            assert error(draw(model, b), want) < 1e-5
    assert max(figures.values()) < 1e-5, figures
    comfy.model_management.unload_all_models()
    same(draw(base, b), plain, "the base afterwards")
    return figures


def compiled(model: Any, backend: str) -> Any:
    """What TorchCompileModel does, with any backend."""
    model = model.clone()
    set_torch_compile_wrapper(model=model, backend=backend)
    return model


def check_torch_compile_without_code_generation(b: str) -> Any:
    """Traced by TorchDynamo, before or after EDiT: the pictures of the untraced ones, which stay as they were."""
    base, w = teacher(b), bare(b)
    patched = apply(base, w, layers="0")
    plain, want = draw(base, b), draw(patched, b)
    figures = {
        "student": error(draw(compiled(patched, "eager"), b), want),
        "student, compiled first": error(draw(apply(compiled(base, "eager"), w, layers="0"), b), want),
        "base": error(draw(compiled(base, "eager"), b), plain),
    }
    assert max(figures.values()) < 1e-4, figures
    same(draw(patched, b), want, "the student afterwards")
    same(draw(base, b), plain, "the base afterwards")
    return figures


def check_torch_compile_with_inductor(b: str) -> Any:
    """TorchCompileModel's own backend, on one block's EDiT: the same picture."""
    base, w = teacher(b), bare(b)
    patched = apply(base, w, layers="0")
    want, plain = draw(patched, b), draw(base, b)
    figures = {"student": error(draw(compiled(patched, "inductor"), b), want)}
    assert figures["student"] < 1e-3, figures
    same(draw(base, b), plain, "the base afterwards")
    return figures


main(globals())
