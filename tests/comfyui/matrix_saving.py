"""Cells of the composition matrix: model merging and the nodes that write a MODEL to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from host import BASE, apply, error, load, lora_for, merged, same, with_lora
from matrix_host import agreement, bare, draw, side, stock, teacher
from safetensors.torch import load_file
import torch

import folder_paths

MERGING = "nodes_model_merging.py"


def another(b: str) -> Any:
    """The same teacher with all layers a little off; ComfyUI does not merge a parameter that is in no layer."""
    model, g = teacher(b), torch.Generator().manual_seed(5)
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith((".weight", ".bias")):
            parameter.data += 0.1 * parameter.std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=g)
    return model


def check_model_merging(b: str) -> Any:
    """ModelMergeSimple before or after EDiT gives what averaging the weights by hand gives; the first model's EDiT
    stays, the second's does not, as with every patch but weights."""
    one, two, w = teacher(b), another(b), bare(b)

    def merge(first: Any, second: Any) -> Any:
        return stock("ModelMergeSimple", MERGING, model1=first, model2=second, ratio=0.7)

    patched, by_hand, other = apply(one, w), teacher(b), two.model.state_dict()
    for name, parameter in by_hand.model.named_parameters():
        parameter.data.lerp_(other[name], 0.3)
    plain = draw(one, b), draw(patched, b)
    after = draw(merge(patched, two), b)
    figures = agreement((draw(merge(one, two), b), after), plain)
    figures["before against after"] = error(draw(apply(merge(one, two), w), b), after)
    figures["against averaged by hand"] = error(after, draw(apply(by_hand, w), b))
    figures["second model patched, against not"] = error(draw(merge(two, patched), b), draw(merge(two, one), b))
    assert figures["before against after"] < 1e-5 and figures["against averaged by hand"] < 1e-4, figures
    assert figures["second model patched, against not"] < 1e-6, figures
    same(draw(one, b), plain[0], "the base afterwards")
    return figures


def check_saving_a_patched_model(b: str) -> Any:
    """ModelSave and CheckpointSave of a student write the base's weights alone, bit-equal, with LoRAs and the
    student's differences in them; the file draws what the base does, and under EDiT what the student does."""
    base, w = teacher(b), bare(b)
    lora, want = lora_for(base), prefixed(base)
    tuned = prefixed(merged(teacher(b), lora))
    plain = draw(base, b)
    patched = apply(base, w)
    edit = draw(patched, b)
    figures: dict[str, Any] = {}
    for node, model, expected in (
        ("ModelSave", patched, want),
        ("CheckpointSave", patched, want),
        ("ModelSave", with_lora(patched, lora), tuned),
    ):
        path = saved(node, model, f"{b}_{node}_{len(figures)}")
        found = {k: v for k, v in load_file(path).items() if k.startswith(PREFIX) and not k.endswith(UNUSED)}
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        worst = max(error(v, expected[k]) for k, v in found.items() if expected[k].norm())
        figures[f"{node}{' with a LoRA' if expected is tuned else ''}, worst tensor"] = worst
        assert worst <= (0 if expected is want else 1e-5), figures
        if expected is want:
            loaded = load(path.stem, "fp32")
            same(draw(loaded, b), plain, f"the file of {node}")
            same(draw(apply(loaded, w), b), edit, f"EDiT on the file of {node}")
    whole = apply(base, side(b))
    path = saved("ModelSave", whole, f"{b}_whole")
    loaded = load(path.stem, "fp32")
    figures["with differences, against the student"] = error(draw(apply(loaded, w), b), draw(whole, b))
    assert figures["with differences, against the student"] < 1e-5, figures
    same(draw(patched, b), edit, "the student afterwards")
    same(draw(base, b), plain, "the base afterwards")
    return figures


PREFIX = "model.diffusion_model."
UNUSED = "y_embedder.y_embedding"
"""No file holds it and nothing reads it: it is what the memory held."""


def prefixed(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a MODEL's weights, as they are just now, under a checkpoint's names."""
    state = model.model.diffusion_model.state_dict()
    return {PREFIX + name: t.clone() for name, t in state.items() if not name.endswith(UNUSED)}


def saved(node: str, model: Any, name: str) -> Path:
    """The file that one of ComfyUI's nodes writes, moved to where models are loaded from."""
    more = {"clip": None, "vae": None} if node == "CheckpointSave" else {}
    stock(node, MERGING, model=model, filename_prefix=f"matrix/{name}", **more)
    (written,) = Path(folder_paths.get_output_directory()).glob(f"matrix/{name}_*.safetensors")
    return written.rename(BASE / "models/diffusion_models" / f"{name}.safetensors")
