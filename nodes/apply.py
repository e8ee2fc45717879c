"""Nodes that patch a MODEL, and that make weights for one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..edit_core import EDiTConfig, EDiTError, EDiTWeights
from ..edit_core.config import CHOICES, WITHOUT_WEIGHTS
from ..edit_core.crossover import measured_at, resolve
from ..edit_core.layers import check_layers
from .common import CATEGORY, Weights, check_values, layers_input, refusal
from .patcher import KEY, apply_to_model, base_tensor, compute_dtype, identify_model


def linear_blocks(model: Any) -> set[int]:
    """The blocks of a patched MODEL that any EDiT: Apply Linear Attention made linear."""
    applications = [each for injection in model.get_injections(KEY) for each in injection.applications]
    return {block for application in applications for block in application.blocks}


class EDiTApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTApply",
            display_name="EDiT: Apply Linear Attention",
            category=CATEGORY,
            description="Makes large pictures fast: replaces the softmax attention of PixArt or Stable Diffusion 3 "
            "by one whose cost does not grow with the square of the picture. Without weights that is piecewise "
            "attention, which works on any such model at once; with EDiT weights it is the attention that they were "
            "trained for. "
            "Works with LoRA, ControlNet and sampling nodes before or after it; bypassing it undoes it. "
            "Weights that also change the model's own layers do so as a LoRA does: throughout, whatever the range "
            "and min_tokens.",
            inputs=[
                io.Model.Input("model", tooltip="A PixArt or Stable Diffusion 3 model, from any loader."),
                Weights.Input(
                    "edit_weights",
                    optional=True,
                    tooltip="EDiT weights made for this model. Without any, piecewise attention, which needs none.",
                ),
                layers_input(),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule linear attention begins; before it the model's own attention runs.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule linear attention ends; after it the model's own attention runs.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=0,
                    min=-1,
                    max=1_048_576,
                    tooltip="Pictures with fewer image tokens keep the model's own attention. "
                    "512x512 pixels are 1024 tokens, 1024x1024 are 4096. -1: as many as "
                    "`python -m edit_core bench --crossover` measured on this device, 0 before that.",
                ),
                # Optional, since workflows from before it was there do not have it.
                io.Combo.Input(
                    "quality",
                    options=list(CHOICES["quality"]),
                    default=EDiTConfig.quality,
                    optional=True,
                    tooltip="Without weights: how much of the picture each part looks at in full. faithful is nearest "
                    "to the model, fast is fastest.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with linear attention.")],
        )

    @classmethod
    def validate_inputs(
        cls, layers: str | None = None, start_percent: float | None = None, end_percent: float | None = None
    ) -> bool | str:
        return refusal(lambda: cls._check(layers, start_percent, end_percent))

    @classmethod
    def _check(cls, layers: str | None, start_percent: float | None, end_percent: float | None) -> None:
        """What can be said before anything is loaded; what is linked is None then. How many blocks there are is seen
        later."""
        if layers is not None:
            check_layers(layers)
        check_values(cls, start_percent=start_percent, end_percent=end_percent)
        if start_percent is not None and end_percent is not None and start_percent > end_percent:
            raise EDiTError(
                f"start_percent {start_percent:g} is after end_percent {end_percent:g}, so nothing would be linear; "
                "exchange them, or bypass the node"
            )

    @classmethod
    def fingerprint_inputs(cls, min_tokens: int | None, **others: Any) -> float:
        # -1 may mean another number after a measurement. A linked input is None here.
        return 0.0 if min_tokens is not None and min_tokens >= 0 else measured_at()

    @classmethod
    def execute(
        cls,
        model: Any,
        layers: str,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        edit_weights: EDiTWeights | None = None,
        quality: str = EDiTConfig.quality,
    ) -> io.NodeOutput:
        cls._check(layers, start_percent, end_percent)
        check_values(cls, min_tokens=min_tokens, quality=quality)
        if min_tokens < 0:
            name, device = identify_model(model).backbone.name, model.load_device
            min_tokens = resolve("auto", name, compute_dtype(model), device)
        chosen = edit_weights or EDiTConfig.preset(WITHOUT_WEIGHTS, quality=quality)
        patched = apply_to_model(model, chosen, layers, start_percent, end_percent, min_tokens)
        # Plain numbers, which ComfyUI does not count as results: for the badge and the layer picker on the page.
        return io.NodeOutput(patched, ui={"edit_blocks": [len(linear_blocks(patched)), identify_model(patched).depth]})


class EDiTInit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTInit",
            display_name="EDiT: Init Weights",
            category=CATEGORY,
            description="Makes untrained EDiT weights that start near the given model. "
            "They are where a distillation begins: by themselves they draw worse than the model.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: a PixArt or Stable Diffusion 3 model."),
                io.Int.Input(
                    "compression",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="ConvFusion works on this many times fewer channels; it must divide the model's channels.",
                ),
                layers_input(),
            ],
            outputs=[Weights.Output(display_name="EDIT_WEIGHTS", tooltip="Untrained weights for this model.")],
        )

    @classmethod
    def validate_inputs(cls, layers: str | None = None) -> bool | str:
        return True if layers is None else refusal(lambda: check_layers(layers))  # None: linked

    @classmethod
    def execute(cls, model: Any, compression: int, layers: str) -> io.NodeOutput:
        check_values(cls, compression=compression)
        config, base = EDiTConfig.preset(compression=compression), identify_model(model)
        weights = EDiTWeights.init_for(base, base_tensor(model), config, layers)
        return io.NodeOutput(weights, ui={"edit_blocks": [len(weights.sites), base.depth]})  # for the layer picker
