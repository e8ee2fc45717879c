"""A training's configuration: a YAML file, checked field by field before anything is loaded.

pydantic does the checking: its errors name the field, and ComfyUI already ships it.
"""

from __future__ import annotations

import importlib.resources
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ..config import DEFAULT, EDiTConfig
from ..errors import EDiTConfigError, said, shown
from ..weights.differences import Trainable, check_trainable
from .optimizer import BASE_LR, OptimizerKind
from .stages import Count, Positive, Stage, Strict

__all__ = ["RunConfig", "Watching", "load_config"]


class Watching(Strict):
    """How a training is watched. What it looks at is drawn from noise of fixed seeds, so that steps compare."""

    held_out: Annotated[int, Field(ge=0)] = 8
    """Pictures of each stage's largest bucket that are not trained on, but evaluated and drawn; 0 for none."""
    evaluate_every: Annotated[int, Field(ge=0)] = 250
    """Steps between measurements of the distance to the teacher on the held-out pictures; 0 for never."""
    preview_every: Annotated[int, Field(ge=0)] = 500
    """Steps between grids of pictures, the teacher's above the student's, of held-out captions; 0 for never."""
    preview_pictures: Count = 4
    preview_steps: Count = 20
    """Of the sampler."""
    preview_guidance: Positive = 4.5

    @model_validator(mode="after")
    def _something_to_look_at(self) -> Watching:
        if not self.held_out and (self.evaluate_every or self.preview_every):
            raise ValueError("held_out=0 leaves nothing to look at; set evaluate_every and preview_every to 0 as well")
        return self


class RunConfig(Strict):
    """Everything that a training depends on."""

    model: Path
    """The teacher: a diffusers pipeline's folder."""
    cache: str
    """What `cache` wrote for it: a folder, or the URL of one, whose shards are then read over the network as needed."""
    output: Path
    """Folder for checkpoints, logs and the student; made if need be."""
    student: dict[str, Any] = Field(default_factory=dict)
    """Which `preset` of EDiTConfig, `local` if none is named, and the fields that differ from it."""
    layers: str = "all"
    """Blocks to make linear."""
    trainable: Trainable = "side"
    """What is trained: the side weights alone; low-rank differences on the base's attention linears as well; or
    differences on these linears in full. The student's file holds the differences, never the base."""
    rank: Count = 16
    """Of low-rank differences."""
    base_lr: Positive = BASE_LR
    """Learning rate of the differences, relative to a stage's lr."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    """In this order."""
    optimizer: OptimizerKind = "adamw"
    """adamw8bit needs bitsandbytes, prodigy prodigyopt. Prodigy finds its rate, and a stage's lr, 1 if none is given,
    multiplies it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are what is published; 0 for none. It rises to this over the first steps,
    so that short runs are averaged too."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the frozen base and the computation; trained weights are kept in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto; under `accelerate launch` each process gets its own."""
    seed: int = 0
    checkpoint_every: Count = 500
    """Steps between checkpoints; one more is written at the end of a stage and when stopped."""
    keep_checkpoints: Count = 3
    watch: Watching = Watching()
    max_skipped: Count = 20
    """More steps in a row than these whose loss or gradient is not finite stop the run."""

    @model_validator(mode="before")
    @classmethod
    def _prodigy_rates(cls, data: Any) -> Any:
        """The stages' own default rates are AdamW's."""
        if not isinstance(data, dict) or data.get("optimizer") != "prodigy" or not isinstance(data.get("stages"), list):
            return data
        stages = [{"lr": 1.0, **stage} if isinstance(stage, dict) else stage for stage in data["stages"]]
        return {**data, "stages": stages}

    @model_validator(mode="after")
    def _student(self) -> RunConfig:
        check_trainable(self.edit_config(), self.trainable)
        for index, stage in enumerate(self.stages):
            if self.optimizer == "prodigy" and stage.lr < _LEAST_PRODIGY:
                raise ValueError(
                    f"stages.{index}.lr={stage.lr:g} is a rate for AdamW; prodigy finds its own, and multiplies it by "
                    f"this: set stages.{index}.lr=1"
                )
            if self.optimizer != "prodigy" and stage.lr > _MOST_ADAMW:
                raise ValueError(
                    f"stages.{index}.lr={stage.lr:g} is a factor for prodigy; {self.optimizer} takes the rate itself: "
                    f"set stages.{index}.lr=1e-3 or less"
                )
        if self.optimizer == "prodigy" and self.trainable != "side" and self.base_lr != 1:
            raise ValueError("prodigy takes one learning rate for all that is trained; set base_lr to 1")
        return self

    def edit_config(self) -> EDiTConfig:
        fields = {"preset": DEFAULT, **self.student}
        return EDiTConfig.preset(fields.pop("preset"), **fields)


_LEAST_PRODIGY = 0.1  # of its own rate: less learns too little to notice, and nobody chooses it
_MOST_ADAMW = 0.3  # each step moves a weight by about the rate, and the weights are smaller than that


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration.

    Args:
        name: a path, or the name of one that ships in `edit_core/configs`.
        overrides: `field=value` or `stages.0.steps=100`, the value in YAML.

    Raises:
        EDiTConfigError: no such file, no YAML, or a wrong field; the message names the field.
    """
    shipped = importlib.resources.files(__package__.rpartition(".")[0]) / "configs" / f"{name}.yaml"
    if os.path.isfile(name):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise EDiTConfigError(f"{name}: cannot be read ({said(error)})") from None
    elif os.path.isfile(str(shipped)):
        text = shipped.read_text(encoding="utf-8")
    else:
        raise EDiTConfigError(f"{name}: there is no such file, nor a configuration of that name in this package")
    data = _yaml(text, name)
    for override in overrides:
        _override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = shown([".".join(str(part) for part in first["loc"])])
        if ours := first.get("ctx", {}).get("error"):  # of a check above, whose sentence is whole
            wrong = said(str(ours))
        elif first["type"] == "extra_forbidden":
            wrong = "there is no such field"
        else:
            wrong = f"{said(first['msg'])}, not {_shown(first['input'])}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise EDiTConfigError(f"{': '.join(filter(None, (name, place, wrong)))}{more}") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases, a few of which can stand for more than any memory holds, and without depths."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read here; write out what it stands for")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_DEEPEST = 20
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def _shown(value: Any) -> str:
    try:
        return _short.repr(value)
    except ValueError:  # YAML has numbers in hexadecimal of any length, which Python does not write out
        return "a number of so many digits"


def _yaml(text: str, name: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # PyYAML raises every kind there is for a malformed date, number or depth
        raise EDiTConfigError(f"{name} is not YAML: {said(error)}") from None


def _override(data: Any, text: str) -> None:
    field, equals, value = text.partition("=")
    *path, last = field.split(".")
    if not equals:
        raise EDiTConfigError(f"{text!r} is not of the form field=value")
    try:
        for part in path:  # a part that the file leaves out has its defaults
            data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
        data[int(last) if isinstance(data, list) else last] = _yaml(value, field)
    except EDiTConfigError:
        raise
    except (AttributeError, IndexError, ValueError, TypeError):
        raise EDiTConfigError(f"{field}: the configuration has no such place") from None
