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

from edit_core.backbones import backbone_named
from edit_core.distill.distance import teacher_distance
from edit_core.distill.losses import dense_tap
from edit_core.distill.picture_metrics import fid
from edit_core.distill.plan import call_times
from edit_core.hosts.diffusers import EDiTHandle
from edit_core.world.draw import batch_of, call_of, held_out, real
from edit_core.world.reader import right
from edit_core.world.scenes import HELD_OUT, Scene

from .classifier import Classifier

__all__ = ["cost", "distance", "worth"]


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
    shown = held_out(count)
    batches = [batch_of(backbone, shown[start : start + 16], size) for start in range(0, count, 16)]
    found = teacher_distance(transformer, handle, backbone_named(backbone), batches)
    return {"prediction": found.prediction, "attention": found.mean_attention}


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
