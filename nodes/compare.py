"""The node that compares two pictures."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..edit_core import EDiTError
from ..edit_core.similarity import psnr, ssim
from .common import CATEGORY, check_values


class EDiTCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTCompare",
            display_name="EDiT: Compare Pictures",
            category=CATEGORY,
            description="Shows two pictures and where they differ, and measures how alike they are. Pictures of one "
            "seed by the plain model and by EDiT differ in details that both draw well, so low figures alone do not "
            "mean a bad picture.",
            inputs=[
                io.Image.Input("image_a", tooltip="One picture, or a batch."),
                io.Image.Input("image_b", tooltip="Another of the same size, or a batch of as many."),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    step=0.5,
                    tooltip="How many times brighter than it is the difference is drawn; the figures do not change.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="difference", tooltip="Absolute differences, brightened; black is equal."),
                io.Float.Output(
                    display_name="psnr",
                    tooltip="Peak signal-to-noise ratio in dB, mean over a batch; infinite for equal pictures.",
                ),
                io.Float.Output(display_name="ssim", tooltip="Structural similarity, mean over a batch; 1 is equal."),
                io.String.Output(display_name="text", tooltip="The figures in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a: Tensor, image_b: Tensor, gain: float) -> io.NodeOutput:
        check_values(cls, gain=gain)
        if image_a.shape != image_b.shape:
            raise EDiTError(
                f"two pictures of one size can be compared, and these are {_shape(image_a)} and {_shape(image_b)}; "
                "draw or scale them to the same size"
            )
        pairs = list(zip(_bytes(image_a), _bytes(image_b), strict=True))
        noise = statistics.fmean(psnr(b, a) for a, b in pairs)
        similarity = statistics.fmean(ssim(b, a) for a, b in pairs)
        difference = ((image_a - image_b)[..., :3].abs() * gain).clamp(0, 1)
        text = f"PSNR {noise:.2f} dB, SSIM {similarity:.4f}"
        a, b = (ui.PreviewImage(image, cls=cls).as_dict()["images"] for image in (image_a, image_b))
        # The node shows `images` by itself; a slider over them takes the other two.
        shown: dict[str, Any] = {"images": [*a, *b], "a_images": a, "b_images": b, **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(difference, noise, similarity, text, ui=shown)


def _shape(image: Tensor) -> str:
    batch, height, width, channels = image.shape
    return f"{batch} of {width}x{height} pixels in {channels} channels"


def _bytes(image: Tensor) -> Tensor:
    """`(B, H, W, C)` in 0-1 -> `(B, H, W, 3)` uint8, without transparency."""
    return (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
