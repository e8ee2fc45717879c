"""The node that times two models against each other."""

from __future__ import annotations

import re
import statistics
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..edit_core import EDiTError
from ..edit_core.backbones import CELL, Backbone, Condition, unwrapped
from ..edit_core.errors import quoted
from ..edit_core.runtime import timed
from . import charts
from .common import CATEGORY, check_values, refusal
from .patcher import compute_dtype, identify_model
from .teacher import Teacher, sample_with

NAMES = ("model a", "model b")
_MOST_SIZES, _LARGEST = 16, 8192


class EDiTBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTBenchmark",
            display_name="EDiT: Benchmark",
            category=CATEGORY,
            description="Times two models, such as the plain one and the one with EDiT, on this machine: single calls "
            "on one picture, without guidance, in alternation. Text encoding and the VAE do not count.",
            inputs=[
                io.Model.Input("model_a", tooltip="What to compare with, such as the model before EDiT."),
                io.Model.Input("model_b", tooltip="What to measure, such as the model with EDiT."),
                io.String.Input(
                    "sizes",
                    default="512, 1024",
                    tooltip='Pixels per side of square pictures, multiples of 16, such as "512, 1024, 2048".',
                ),
                io.Int.Input(
                    "repeats",
                    default=5,
                    min=1,
                    max=1000,
                    tooltip="Timed calls of each model at each size, after one to warm up; medians are shown.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="Seconds per call against size, on logarithmic axes."),
                io.String.Output(display_name="table", tooltip="The figures as a Markdown table."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, sizes: str | None = None) -> bool | str:
        return True if sizes is None else refusal(lambda: parse_sizes(sizes))  # None: linked

    @classmethod
    def execute(cls, model_a: Any, model_b: Any, sizes: str, repeats: int) -> io.NodeOutput:
        check_values(cls, repeats=repeats)
        models, sides = (model_a, model_b), parse_sizes(sizes)
        bases = [identify_model(model) for model in models]
        for base, model in zip(bases, models, strict=True):
            for side in sides:  # says which size it cannot draw, before any is timed
                base.backbone.comfy_grid(side // CELL, side // CELL)
                base.backbone.check_size(side, side, unwrapped(model.get_model_object("diffusion_model")))
        bar = comfy.utils.ProgressBar(len(sides) * (repeats + 1) * 2)
        times: dict[int, tuple[list[float], list[float]]] = {}
        for side in sides:
            inputs = [random_inputs(model, base.backbone, side) for model, base in zip(models, bases, strict=True)]
            times[side] = ([], [])
            for turn in range(repeats + 1):
                for model, (conditioning, latent), seconds in zip(models, inputs, times[side], strict=True):
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    found = sample_with(model, {"positive": conditioning}, 1.0, latent, 1, _time_call)
                    bar.update(1)
                    if turn:  # the first pair warms up
                        seconds.append(found)
        medians = {name: [statistics.median(times[side][i]) for side in sides] for i, name in enumerate(NAMES)}
        ratios = [statistics.median(a / b for a, b in zip(*times[side], strict=True)) for side in sides]
        chart = charts.as_image(charts.time_curves(sides, medians, ratios))
        notes = [
            f"{name} is {base.backbone.title} in {str(compute_dtype(model)).removeprefix('torch.')}"
            for name, base, model in zip(NAMES, bases, models, strict=True)
        ]
        device = comfy.model_management.get_torch_device_name(model_a.load_device)
        where = f"{device}; PyTorch {torch.__version__}; {'; '.join(notes)}; {repeats} calls"
        table = _table(where, sides, times, ratios)
        shown = {**ui.PreviewImage(chart, cls=cls).as_dict(), **ui.PreviewText(table).as_dict()}
        return io.NodeOutput(chart, table, ui=shown)


def parse_sizes(text: str) -> list[int]:
    """Sides in pixels of a text such as `"512, 1024"`, rising.

    Raises:
        EDiTError: it is no such list.
    """
    sides = set()
    for item in (part.strip() for part in text.split(",")):
        if not re.fullmatch(r"[0-9]{1,6}", item) or int(item) % 16 or not 16 <= int(item) <= _LARGEST:
            raise EDiTError(
                f"sizes: {quoted(item)} in {quoted(text)} is not a multiple of 16 up to {_LARGEST}; "
                "write such as 512, 1024"
            )
        sides.add(int(item))
    if len(sides) > _MOST_SIZES:
        raise EDiTError(f"sizes: {len(sides)} are too many; name up to {_MOST_SIZES}")
    return sorted(sides)


def random_inputs(model: Any, backbone: Backbone, side: int) -> tuple[Any, Tensor]:
    """A conditioning of noise as wide as the model takes it, and an empty latent for a square picture."""
    generator = torch.Generator().manual_seed(0)

    def width_of(condition: Condition) -> int:
        # As wide as the layer takes it: the state of a GGUF base has the sizes of packed bytes.
        return int(model.get_model_object(f"diffusion_model.{condition.comfy}").in_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    noise = backbone.random_condition(width_of, normal)
    prompt = noise.pop("prompt_embeds")  # (1, T, width)
    extra = {f"{name}_output": tensor for name, tensor in noise.items()}  # such as pooled_output
    channels = model.get_model_object("latent_format").latent_channels
    return [[prompt, extra]], torch.zeros(1, channels, side // CELL, side // CELL)


def _time_call(teacher: Teacher) -> float:
    x = teacher.noised(seed=0)
    return timed(lambda: teacher.call(x, teacher.sigmas[0]), x.device)[1]


def _table(where: str, sides: list[int], times: dict[int, tuple[list[float], list[float]]], ratios: list[float]) -> str:
    header = "".join(f" {name}, s per call |" for name in NAMES)
    rows = [where, "", f"| picture | tokens |{header} {NAMES[1]}, times as fast |", "|---|---|---|---|---|"]
    for side, ratio in zip(sides, ratios, strict=True):
        cells = "".join(f" {statistics.median(t):.3g} ({min(t):.3g}–{max(t):.3g}) |" for t in times[side])
        rows.append(f"| {side}² | {(side // 16) ** 2} |{cells} {ratio:.2f}× |")
    return "\n".join(rows)
