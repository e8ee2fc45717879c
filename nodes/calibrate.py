"""The node that trains EDiT weights on what their teacher sees while it draws."""

from __future__ import annotations

import logging
import time
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..edit_core import EDiTWeights
from ..edit_core.distill.losses import TransferTap
from ..edit_core.distill.transfer import trained_weights, transfer
from . import charts
from .common import CATEGORY, Weights, check_values
from .teacher import Student, Teacher, sample_with

logger = logging.getLogger(__name__)

GUIDANCE = 4.5
PICTURE_STEPS = 20
"""Of the sampling of each picture that the teacher draws."""
_PREVIEW_SECONDS = 0.5
_BYTES_PER_NUMBER = 16  # float32: the value, its gradient, and AdamW's two moments


class EDiTCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTCalibrate",
            display_name="EDiT: Calibrate Weights",
            category=CATEGORY,
            description="Trains EDiT weights without pictures: the model draws, and every attention of the student "
            "learns to give what the model's own gives for the same input. It does not replace a distillation. The "
            "model is left as it is.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: a PixArt or Stable Diffusion 3 model without EDiT."),
                Weights.Input("edit_weights", tooltip="Where to begin: from EDiT: Init Weights, or trained before."),
                io.Conditioning.Input("positive", tooltip="What the teacher draws while the student learns."),
                io.Conditioning.Input(
                    "negative", tooltip=f"What it avoids; the guidance is {GUIDANCE:g}, and both are learned from."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size to be good at; a whole batch is drawn at once.",
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=100_000,
                    tooltip=f"Training steps; each is a step of the teacher's sampling, {PICTURE_STEPS} to a picture.",
                ),
                io.Float.Input(
                    "lr",
                    default=0.005,
                    min=0.000001,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="Highest learning rate; it falls to zero along a cosine. Lower it if the error rises.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, tooltip="Seeds the noise that the pictures begin with."
                ),
            ],
            outputs=[Weights.Output(display_name="EDIT_WEIGHTS", tooltip="The trained weights.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        edit_weights: EDiTWeights,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        steps: int,
        lr: float,
        seed: int,
    ) -> io.NodeOutput:
        check_values(cls, steps=steps, lr=lr, seed=seed)
        student = Student(model, edit_weights, latent)
        watch = _Watch(steps)

        def learn(teacher: Teacher) -> EDiTWeights:
            device = teacher.latent.device
            numbers = sum(tensor.numel() for tensor in edit_weights.tensors.values())
            teacher.make_room(_BYTES_PER_NUMBER * numbers)
            # ComfyUI runs nodes in inference mode, whose tensors cannot be trained.
            with torch.inference_mode(False), torch.enable_grad(), student.beside(device) as parameters:
                drawing = teacher.draw(seed)

                def teach(tap: TransferTap) -> None:
                    student.tap = tap
                    next(drawing)

                losses = transfer(
                    parameters,
                    teach,
                    steps=steps,
                    lr=lr,
                    device=device,
                    scaled=student.dtype == torch.float16,
                    on_step=watch,
                )
                logger.info("EDiT: calibrated; mean relative error %.3g at first, %.3g at last", losses[0], losses[-1])
                recipe = {"lr": lr, "guidance": GUIDANCE}
                return trained_weights(edit_weights, parameters, recipe, steps, "one prompt, in ComfyUI")

        conds = {"positive": positive, "negative": negative}
        return io.NodeOutput(sample_with(model, conds, GUIDANCE, student.latent, PICTURE_STEPS, learn))


class _Watch:
    """Shows each step as progress, the errors so far as a preview, and stops where the user interrupts."""

    def __init__(self, steps: int) -> None:
        self.bar = comfy.utils.ProgressBar(steps)
        self.steps = steps
        self.losses: list[float] = []
        self._shown = 0.0

    def __call__(self, step: int, loss: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.losses.append(loss)
        now, preview = time.monotonic(), None
        if now - self._shown > _PREVIEW_SECONDS or step + 1 == self.steps:
            self._shown = now
            preview = ("JPEG", charts.loss_curve(self.losses, self.steps), charts.WIDTH)
        self.bar.update_absolute(step + 1, self.steps, preview)
