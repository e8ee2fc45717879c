"""What the checks inside ComfyUI share. Importing it makes this process a ComfyUI on the CPU, as sys.argv says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

CHECKOUT, BASE, PACK, FILES = (Path(a) for a in sys.argv[1:5])
ONLY = sys.argv[5:]
"""The checks to run, each as `check_name[backbone]`; none for all."""
sys.path.insert(0, str(CHECKOUT))
sys.argv = ["inside", "--cpu", "--base-directory", str(BASE), "--disable-all-custom-nodes"]
import comfy.options

comfy.options.enable_args_parsing()
from comfy.cli_args import args

args.cpu = True
import torch
from safetensors.torch import save_file

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import nodes

SHIPPED = ("pixart_sigma", "sd35_medium")
BACKBONES = (*SHIPPED, "sd3", "pixart_alpha")


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def logged():
    log = Log()
    logging.getLogger().addHandler(log)
    try:
        yield log.lines
    finally:
        logging.getLogger().removeHandler(log)


def run(node: str, **inputs: Any) -> Any:
    result = nodes.NODE_CLASS_MAPPINGS[node].execute(**inputs).result
    return result[0] if result else None


def load(backbone: str, dtype: str = "default", edit: str = "none") -> Any:
    return run(
        "EDiTLoadModel", model_name=f"diffusion_models/{backbone}.safetensors", weight_dtype=dtype, edit_weights=edit
    )


def weights(backbone: str) -> Any:
    return run("EDiTLoadWeights", edit_name=f"{backbone}.safetensors")


def apply(
    model: Any, edit_weights: Any = None, layers="all", start_percent=0.0, end_percent=1.0, min_tokens=0, **more: Any
) -> Any:
    """EDiTApply; without weights, piecewise attention."""
    return run(
        "EDiTApply",
        model=model,
        layers=layers,
        start_percent=start_percent,
        end_percent=end_percent,
        min_tokens=min_tokens,
        **({} if edit_weights is None else {"edit_weights": edit_weights}),
        **more,
    )


def conditioning(tokens: int, seed: int) -> list:
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, 4096, generator=g), {"pooled_output": torch.randn(1, 2048, generator=g)}]]


def sample(
    model: Any, height=34, width=40, cfg=1.0, steps=2, batch=1, prompt=(7, 7), seed=1, callback=None
) -> torch.Tensor:
    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(batch, channels, height, width)
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "normal",
            conditioning(prompt[0], 2),
            conditioning(prompt[1], 3),
            latent,
            seed=seed,
            disable_pbar=True,
            callback=callback,
        )


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert torch.equal(a, b), f"{what}: relative difference {error(a, b):.3g}"


def lora_targets(model: Any) -> list[tuple[str, str, slice]]:
    """A LoRA's names on the attentions in diffusers' terms, with the base key and the rows that each acts on."""
    state = model.model.state_dict()
    found = []
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, *offset = (target,) if isinstance(target, str) else target
        if name.startswith("transformer.") and "attn" in key and state.get(key, torch.empty(0)).ndim == 2:
            start, length = offset[0][1:3] if offset and offset[0] else (0, state[key].shape[0])
            found.append((name, key, slice(start, start + length)))
    assert found, "no LoRA keys"
    return found


def lora_for(model: Any, scale: float = 0.05) -> dict:
    sd, g, state = {}, torch.Generator().manual_seed(9), model.model.state_dict()
    for name, key, rows in lora_targets(model):
        sd[f"{name}.lora_A.weight"] = torch.randn(4, state[key].shape[1], generator=g) * scale
        sd[f"{name}.lora_B.weight"] = torch.randn(rows.stop - rows.start, 4, generator=g) * scale
    return sd


def merged(model: Any, sd: dict) -> Any:
    """The LoRA written into the weights by hand."""
    state = model.model.state_dict()
    for name, key, rows in lora_targets(model):
        state[key][rows] += sd[f"{name}.lora_B.weight"] @ sd[f"{name}.lora_A.weight"]
    return model


def with_lora(model: Any, sd: dict) -> Any:
    return comfy.sd.load_lora_for_models(model, None, sd, 1.0, 0.0)[0]


def user_error(part: str, call, *a: Any, **k: Any) -> str:
    try:
        call(*a, **k)
    except ValueError as e:
        assert part in str(e), f"expected {part!r} in {e}"
        return str(e)
    raise AssertionError(f"no error; expected one with {part!r}")


@contextlib.contextmanager
def recorded(model: Any, name: str):
    """Saves what goes into and comes out of a call of the model, for the outer test to give to diffusers."""
    caught: dict[str, Any] = {}

    def hook(module: Any, hook_args: Any, kwargs: Any, output: Any) -> None:
        caught.update(x=hook_args[0], t=hook_args[1], out=output)
        caught.update({k: v for k, v in kwargs.items() if k in ("context", "y") and torch.is_tensor(v)})

    handle = model.model.diffusion_model.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()
    save_file({k: v.clone().contiguous() for k, v in caught.items()}, BASE / f"{name}.safetensors")


def record(model: Any, name: str, height: int, width: int) -> None:
    with recorded(model, f"{name}-{height}x{width}"):
        sample(model, height, width, steps=1)


async def load_nodes() -> None:
    await nodes.load_custom_node(str(PACK))
    assert "EDiTApply" in nodes.NODE_CLASS_MAPPINGS, "the pack did not load"
    for extra in ("nodes_slg.py", "nodes_sd3.py"):
        await nodes.load_custom_node(str(CHECKOUT / "comfy_extras" / extra), module_parent="comfy_extras")


def main(names: dict[str, Any], backbones: tuple[str, ...] = BACKBONES) -> None:
    """Runs every check among the names for all backbones, and writes the results."""
    logging.getLogger().setLevel(logging.INFO)  # as main.py does
    folder_paths.add_model_folder_path("diffusion_models", str(FILES))
    asyncio.run(load_nodes())
    cells = [(name, b) for name in names if name.startswith("check_") for b in backbones]
    results = {}
    for name, b in cells:
        if ONLY and f"{name}[{b}]" not in ONLY:
            continue
        started = time.perf_counter()
        try:
            outcome: dict[str, Any] = {"ok": True, "figures": names[name](b)}
        except Exception:
            outcome = {"ok": False, "error": traceback.format_exc()}
        outcome["seconds"] = round(time.perf_counter() - started, 2)
        results[f"{name}[{b}]"] = outcome
        comfy.model_management.unload_all_models()
        print(name, b, "ok" if outcome["ok"] else "FAILED\n" + outcome["error"], outcome["seconds"], flush=True)
        if not outcome["ok"] and "EDIT_TEST_STOP" in os.environ:
            break  # who asks needs one failure, soon
    (BASE / "results.json").write_text(json.dumps(results, indent=1))
