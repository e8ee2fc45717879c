"""What the composition matrix's checks share: the small world's trained models, drawing, and how far changes agree.

The shipped teachers and students are used, not random models, since only a trained student can be asked whether what
another node does to it is what that node does to its teacher.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from host import CHECKOUT, apply, error, load, run, same, weights
import torch

import nodes

CAPTION = "a large red circle at the top left, in the bottom centre a small blue bar, on grey rows"
SAMPLING = {"pixart_sigma": ("dpmpp_2m", "sgm_uniform"), "sd35_medium": ("euler", "normal")}
SIZES = {"pixart_sigma": (34, 32), "sd35_medium": (20, 24)}
"""Latents about as small as ComfyUI lets them be."""
AGREE = 0.2
"""The least cosine between a change of the teacher's picture and of the student's. Unrelated ones of this many numbers
have one of less than 0.05; untrained students' agree no better than that either."""

Make = Callable[[Any], Any]


def stock(name: str, file: str | None = None, **inputs: Any) -> Any:
    """The first output of one of ComfyUI's own nodes, whose file in comfy_extras is loaded on first use."""
    if file is not None:
        load_extra(file)
    node = nodes.NODE_CLASS_MAPPINGS[name]
    if not hasattr(node, "define_schema"):
        return (getattr(node(), node.FUNCTION)(**inputs) or (None,))[0]
    output = node.execute(**inputs)
    return getattr(output, "result", output)[0]


@functools.cache
def load_extra(file: str) -> None:
    path = CHECKOUT / "comfy_extras" / file
    asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))


def teacher(b: str, dtype: str = "fp32") -> Any:
    return load(f"edit_small_world_{b}", dtype)


def side(b: str) -> Any:
    return weights(f"edit_small_world_{b}_student")


def bare(b: str) -> Any:
    """The student's side weights without its differences on the base's own layers, which act as a LoRA does."""
    w = side(b)
    return replace(w, tensors={name: t for name, t in w.tensors.items() if not name.startswith("base.")})


@functools.cache
def text(b: str, caption: str = CAPTION) -> Any:
    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(run("EDiTSmallWorldText", backbone=b), caption)[0]


def empty(model: Any, height: int, width: int, batch: int = 1) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, model.get_model_object("latent_format").latent_channels, height, width)}


def draw(
    model: Any,
    b: str,
    steps: int = 1,
    cfg: float = 1.0,
    positive: Any = None,
    negative: Any = None,
    latent: dict[str, torch.Tensor] | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    denoise: float = 1.0,
    seed: int = 1,
) -> torch.Tensor:
    """The latent that KSampler gives."""
    latent = latent or empty(model, *(size or SIZES[b]), batch)
    texts = positive or text(b), negative or text(b, "")
    with torch.inference_mode():
        return nodes.common_ksampler(model, seed, steps, cfg, *SAMPLING[b], *texts, latent, denoise)[0]["samples"]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def agreement(
    of: tuple[torch.Tensor, torch.Tensor], from_: tuple[torch.Tensor, torch.Tensor], least: float = AGREE
) -> dict[str, float]:
    """How large a change of teacher and student is, and how alike; of and from_ hold the teacher's and the student's.

    Raises:
        AssertionError: one did not change (a hundred times what float32 leaves of two equal ones), not as strongly as
            the other (a node that a model ignores or has twice would show), or they changed in different directions.
    """
    figures = {
        "change of the teacher": error(of[0], from_[0]),
        "change of the student": error(of[1], from_[1]),
        "cosine of both": cosine(of[0] - from_[0], of[1] - from_[1]),
    }
    teacher_change, student_change, alike = figures.values()
    assert min(teacher_change, student_change) > 1e-4, figures
    assert 1 / 5 < student_change / teacher_change < 5, figures
    assert alike > least, figures
    return figures


def composes(b: str, make: Make, least: float = AGREE, **how: Any) -> dict[str, float]:
    """A node beside EDiT: before or after it gives the same picture, changes it as it changes the teacher's, and the
    base is afterwards what it was."""
    (base, patched), plain = pair(b), plain_pair(b, **how)
    changed = draw(make(base), b, **how), draw(make(patched), b, **how)
    figures = agreement(changed, plain, least)
    figures["before against after"] = error(draw(apply(make(base), side(b)), b, **how), changed[1])
    # Both are patches on the same weights, which are added up in another order.
    assert figures["before against after"] < 1e-4, figures
    same(draw(base, b, **how), plain[0], "the base afterwards")
    same(draw(patched, b, **how), plain[1], "the student afterwards")
    return figures


def leaves_alone(b: str, make: Make, **how: Any) -> dict[str, float]:
    """A node that does not reach these models: neither teacher nor student change, in either order."""
    (base, patched), plain = pair(b), plain_pair(b, **how)
    figures = {
        "change of the teacher": error(draw(make(base), b, **how), plain[0]),
        "change of the student": error(draw(make(patched), b, **how), plain[1]),
        "change of the student, node first": error(draw(apply(make(base), side(b)), b, **how), plain[1]),
    }
    assert max(figures.values()) < 1e-4, figures
    return figures


@functools.cache
def pair(b: str) -> tuple[Any, Any]:
    """One teacher and one student on it for all checks that leave both as they are, which they have to."""
    base = teacher(b)
    return base, apply(base, side(b))


@functools.cache
def plain_pair(b: str, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What both draw when nothing is beside them."""
    base, patched = pair(b)
    return draw(base, b, **how), draw(patched, b, **how)
