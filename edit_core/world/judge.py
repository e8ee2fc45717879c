"""What a teacher or a student is worth in the small world: what its pictures get right, how they look, what they cost.

All that is random follows from fixed seeds, so two judgements of the same weights agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..backbones import backbone_named
from ..distill.distance import teacher_distance
from ..distill.losses import dense_tap
from ..distill.picture_metrics import fid
from ..distill.plan import call_times
from ..hosts.diffusers import EDiTHandle
from .classifier import Classifier
from .codec import draw_scenes, encode, through
from .data import WorldEncoder
from .draw import draw
from .reader import right
from .scenes import HELD_OUT, Scene

__all__ = ["call_of", "cost", "distance", "pictures", "real", "scenes", "worth"]


def scenes(count: int) -> list[Scene]:
    """The first held-out scenes."""
    return [Scene.random(HELD_OUT + i) for i in range(count)]


def pictures(
    backbone: str, transformer: Any, asked: Sequence[Scene], size: int, steps: int = 16, batch: int = 16
) -> Tensor:
    """What a model draws of scenes' captions: `(B, size, size, 3)` uint8.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        transformer: as it is at the moment.
        asked: scenes; the noise's seed is the place in this list.
        size: pixels per side.
        steps: of the sampler.
        batch: pictures drawn at once.
    """
    captions, seeds = [scene.caption for scene in asked], range(len(asked))
    return draw(backbone, transformer, captions, seeds, size, size, steps, batch=batch)


def real(backbone: str, shown: Sequence[Scene], size: int) -> Tensor:
    """The scenes themselves through the codec, `(B, size, size, 3)` uint8: the best that a model could draw."""
    return through(backbone, draw_scenes(shown, size, size))


def worth(drawn: Tensor, asked: Sequence[Scene], backbone: str, classifier: Classifier) -> dict[str, float]:
    """Shares of the captions' attributes that are right, by kind, and `frechet`.

    Args:
        drawn: `(B, size, size, 3)` uint8.
        asked: B scenes.
        backbone: whose codec the real pictures go through.
        classifier: whose features are compared with those of as many other real scenes.
    """
    found = right(drawn.numpy(), asked)
    others = [Scene.random(HELD_OUT + (1 << 20) + i) for i in range(len(asked))]
    reference = classifier.images(real(backbone, others, drawn.shape[1]))
    return {**found, "frechet": fid(classifier.images(drawn), reference)}


def distance(backbone: str, transformer: Any, handle: EDiTHandle, size: int, count: int = 64) -> dict[str, float]:
    """A student's error relative to its teacher on noised held-out scenes: `prediction`, and the mean `attention`."""
    shown = scenes(count)
    batches = [_batch(backbone, shown[start : start + 16], size) for start in range(0, count, 16)]
    found = teacher_distance(transformer, handle, backbone_named(backbone), batches)
    return {"prediction": found.prediction, "attention": found.mean_attention}


def _batch(backbone: str, shown: Sequence[Scene], size: int) -> dict[str, Tensor]:
    """Latents and conditions of scenes, as a cache's samples are batched."""
    condition = WorldEncoder(backbone).encode_prompts([scene.caption for scene in shown])
    return {"latent": encode(backbone, draw_scenes(shown, size, size).permute(0, 3, 1, 2)), **condition}


def call_of(backbone: str, transformer: Any, size: int) -> dict[str, Any]:
    """Keyword arguments of a transformer's call halfway to noise, on a scene of this size, for timing and comparing."""
    batch = _batch(backbone, scenes(1), size)
    latent = batch.pop("latent").to(transformer.device, transformer.dtype)
    return backbone_named(backbone).call_arguments(
        latent, torch.tensor([500], device=latent.device), batch, latent.device
    )


@torch.no_grad()
def cost(backbone: str, transformer: Any, handle: EDiTHandle, size: int, repeats: int = 9) -> dict[str, float]:
    """FLOPs of one call, the median seconds of calls of teacher and student in alternation, and their ratio."""
    arguments = call_of(backbone, transformer, size)
    flops = {}
    for who, tap in (("teacher", dense_tap), ("student", None)):
        handle.tap = tap
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no fused CPU kernels
            transformer(**arguments)
        flops[who] = counter.get_total_flops()
    teacher, student = call_times(transformer, handle, arguments, repeats)
    return {
        "flops": flops["student"], "teacher_flops": flops["teacher"], "seconds": student, "teacher_seconds": teacher,
        "speed": teacher / student,
    }  # fmt: skip
