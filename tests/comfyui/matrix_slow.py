"""The composition matrix's slow cells inside a real ComfyUI process: see `test_matrix_comfyui.py`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

from host import BASE, apply, error, lora_for, main, same, user_error, with_lora  # first: it readies ComfyUI
from matrix_host import bare, draw, side, teacher
from matrix_loras import kept
import torch

import comfy.model_management
import comfy.model_patcher
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
    lora, full, figures = lora_for(teacher(b), 0.1), (teacher(b), apply(teacher(b), side(b))), {}
    wanted = [(draw(with_lora(model, lora), b), draw(model, b)) for model in full]
    for kind in ("Q8_0", "Q4_0"):
        quantise(b, kind, "sd3")
        base = load_gguf(f"{b}_{kind}.gguf")[0]
        before, patched = draw(base, b), apply(base, side(b))
        costs = error(before, wanted[0][1]), error(draw(patched, b), wanted[1][1])
        figures |= {f"{kind}, teacher against float32": costs[0], f"{kind}, student against float32": costs[1]}
        assert costs[1] < 1.5 * costs[0], figures  # as of LoRAs: the rounding is the base's
        figures |= kept(b, lora, wanted, (base, patched), kind)
        tuned = draw(with_lora(patched, lora), b)
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


def check_dynamic_loading_as_far_as_a_processor_has_it(b: str) -> Any:
    """ComfyUI's patcher with dynamic loading, the default on NVIDIA's GPUs, forced onto the processor: layers without
    memory until they are filled, loading, unloading, the base afterwards, a student without differences. Not run: the
    paging of weights into a GPU's memory, which is CUDA's, and LoRAs and differences, which on the processor this
    patcher adds to no layer above 16 KiB."""
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if dynamic is None:
        return {"not in this ComfyUI": "dynamic loading"}
    base, w = teacher(b), bare(b)
    plain, want = draw(base, b), draw(apply(base, w), b)
    with forced_onto_the_processor(dynamic):
        base = teacher(b)
        patched = apply(base, w)
        beside = patched.get_additional_models_with_key("edit")[0]
        assert base.is_dynamic() and patched.is_dynamic() and beside.is_dynamic()
        figures = {"base": error(draw(base, b), plain), "student": error(draw(patched, b), want)}
        comfy.model_management.unload_all_models()
        assert not any("forward" in module.__dict__ for module in base.model.modules())
        figures["student, loaded again"] = error(draw(patched, b), want)
        figures["student, block 0 applied twice"] = error(draw(apply(patched, w, layers="0"), b), want)
        figures["base afterwards"] = error(draw(base, b), plain)
    assert max(figures.values()) < 1e-5, figures
    return figures


@contextlib.contextmanager
def forced_onto_the_processor(dynamic: Any) -> Any:
    """What main.py does for a GPU, and without what asks for one."""
    import comfy_aimdo.control  # only where ComfyUI has it
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    assert comfy_aimdo.control.init()
    for module in (comfy_aimdo.host_buffer, comfy_aimdo.model_vbar):
        importlib.reload(module)  # they look for the library when they are imported
    with (
        mock.patch.object(dynamic, "__new__", lambda cls, *_, **__: object.__new__(cls)),
        mock.patch.object(dynamic, "partially_unload", lambda self, *_, **__: self.restore_loaded_backups()),
        mock.patch.object(comfy.model_patcher, "CoreModelPatcher", dynamic),
        mock.patch.object(comfy.memory_management, "aimdo_enabled", True),
    ):
        yield


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
