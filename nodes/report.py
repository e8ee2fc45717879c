"""The node that measures how well each attention is imitated, and suggests which blocks to make linear."""

from __future__ import annotations

import math
import statistics
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui

from ..edit_core import EDiTError, EDiTWeights
from ..edit_core.distill.losses import TransferTap
from ..edit_core.layers import format_layers
from . import charts
from .common import CATEGORY, Weights, check_values
from .patcher import identify_model
from .teacher import Student, Teacher, sample_with

STEPS = 10
THRESHOLD = 0.25
"""Ours, from the small SD3.5, of 6 captions' attributes at 10 steps; the teacher gets 87% right. After 100 steps of
calibration on one prompt the worst errors of its blocks are 0.18, 0.34 and 0.11, and with that block alone linear 83%,
10% and 85% are right; untrained they are 0.33, 0.67 and 0.23, with 82%, 9% and 76%. At 0.5 all three would be made
linear after the calibration, with 9% right.
"""


class EDiTLayerReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTLayerReport",
            display_name="EDiT: Layer Report",
            category=CATEGORY,
            description="Measures how far each linear attention is from the one that it replaces, and suggests the "
            f"blocks to make linear. The model draws one picture in {STEPS} steps without guidance, and every "
            "attention is compared on the model's own inputs.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: a PixArt or Stable Diffusion 3 model without EDiT."),
                Weights.Input("edit_weights", tooltip="The EDiT weights to measure."),
                io.Conditioning.Input("conditioning", tooltip="What the teacher draws meanwhile."),
                io.Latent.Input("latent", tooltip="An empty latent of the size to measure at."),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.0,
                    max=1_000.0,
                    step=0.01,
                    tooltip="The suggestion leaves a block dense if one of its attentions has an error above this: its "
                    "squared error relative to the teacher's mean square. 0 is a perfect imitation, 1 as bad as giving "
                    "nothing. The error says how well an attention is imitated, not how much depends on it: the "
                    "command `edit plan` measures that, and takes longer.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart", tooltip="The error of every attention; grey is better left dense."
                ),
                io.String.Output(
                    display_name="layers", tooltip="The suggested blocks, for EDiT: Apply Linear Attention's layers."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, edit_weights: EDiTWeights, conditioning: Any, latent: dict[str, Any], threshold: float
    ) -> io.NodeOutput:
        check_values(cls, threshold=threshold)
        errors = attention_errors(model, edit_weights, conditioning, latent)
        layers = suggest_layers(errors, threshold)
        chart = charts.as_image(charts.error_bars(errors, threshold))
        shown: dict[str, Any] = {
            **ui.PreviewImage(chart, cls=cls).as_dict(),
            **ui.PreviewText(f"layers: {layers}").as_dict(),
            "block_errors": block_errors(errors, identify_model(model).depth),  # colours the layer pickers
        }
        return io.NodeOutput(chart, layers, ui=shown)


def attention_errors(model: Any, weights: EDiTWeights, conditioning: Any, latent: dict[str, Any]) -> dict[str, float]:
    """Squared errors relative to the teacher's mean square, means over one picture's steps, by `<block>.<site>`.

    Raises:
        EDiTError: as :class:`Student` does, or the errors could not be measured.
    """
    student = Student(model, weights, latent)
    bar = comfy.utils.ProgressBar(STEPS)
    found: dict[str, list[float]] = {}

    def measure(teacher: Teacher) -> None:
        with student.beside(teacher.latent.device):
            drawing = teacher.draw(seed=0)
            for _ in range(STEPS):
                student.tap = tap = TransferTap(None)
                next(drawing)
                for key, loss in tap.losses.items():
                    found.setdefault(key, []).append(float(loss))
                bar.update(1)

    sample_with(model, {"positive": conditioning}, 1.0, student.latent, STEPS, measure)
    if not found:
        raise EDiTError("the model ran without any of the attentions that were to be measured")
    return {key: statistics.fmean(values) for key, values in found.items()}


def worst_errors(errors: dict[str, float]) -> dict[int, float]:
    """The largest error among a block's attentions, by block."""
    worst: dict[int, float] = {}
    for key, error in errors.items():
        block = int(key.split(".")[0])
        # An error that is not a number must not pass.
        worst[block] = max(worst.get(block, 0.0), error) if error == error else float("inf")
    return worst


def suggest_layers(errors: dict[str, float], threshold: float) -> str:
    """The blocks none of whose attentions is above the threshold, as a `layers` text."""
    return format_layers(block for block, error in worst_errors(errors).items() if error <= threshold)


def block_errors(errors: dict[str, float], depth: int) -> list[float | None]:
    """The worst error of every block; None where none is known, or it is not finite, which JSON cannot say."""
    worst = worst_errors(errors)
    return [worst[block] if math.isfinite(worst.get(block, math.inf)) else None for block in range(depth)]
