"""Nodes that read and write files: base models and EDiT weights."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..edit_core import EDiTConfig, EDiTError, EDiTWeights
from ..edit_core.backbones import Base, identify, plain_name
from ..edit_core.basefile import BaseFile
from ..edit_core.config import WITHOUT_WEIGHTS
from ..edit_core.errors import EDiTModelError, quoted
from .common import CATEGORY, Weights, check_values, plain_state, refusal
from .patcher import apply_to_model
from .small_world import is_small_teacher, load_small_teacher

logger = logging.getLogger(__name__)

FOLDER = "edit"
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
PREFIXES = ("", "model.diffusion_model.", "model.", "net.")
"""What ComfyUI itself takes off the names of a diffusion model's tensors."""
NO_WEIGHTS = "none"
PIECEWISE = "piecewise (no weights)"

WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp32": {"dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def register_model_folder() -> None:
    """Makes `models/edit` a model folder, before any that extra_model_paths.yaml names: what is saved goes there."""
    path = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(path, exist_ok=True)
    paths = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0]
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([path, *paths])), {".safetensors"})


def model_files() -> list[str]:
    """`folder/name` of every file that may hold a base model."""
    return [f"{folder}/{name}" for folder in MODEL_FOLDERS for name in folder_paths.get_filename_list(folder)]


def model_path(choice: str) -> str:
    """Where a choice of :func:`model_files` lies.

    Raises:
        EDiTError: it is none, or no longer there.
    """
    folder, _, name = choice.partition("/")
    if folder not in MODEL_FOLDERS:
        raise EDiTError(f"model_name {quoted(choice)} must begin with {' or '.join(f'{f}/' for f in MODEL_FOLDERS)}")
    return file_path(folder, name)


def identify_file(path: str, name: str) -> Base:
    """What a model file holds; of a safetensors file only the header is read.

    Raises:
        EDiTModelError: nothing that EDiT works on, or the file cannot be read.
    """
    if path.lower().endswith((".safetensors", ".sft")):
        return BaseFile(path).identify(name)
    try:
        state = comfy.utils.load_torch_file(path, safe_load=True)
        shapes = {plain_name(key): tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # whatever unpickling meets in a file that is none of PyTorch's
        if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise EDiTModelError(
                f"{name} holds {held[1]} beside its tensors, which is not loaded, since loading it may run anything; "
                "save the tensors alone, as .safetensors"
            ) from None
        raise EDiTModelError(f"{name} is no file of PyTorch with a model's tensors ({type(error).__name__})") from None
    return replace(identify(shapes, name), renamed=shapes.keys() != state.keys())


def file_path(folder: str, name: str) -> str:
    """Where a file of a model folder lies.

    Raises:
        EDiTError: it is not there.
    """
    if path := folder_paths.get_full_path(folder, name):
        return path
    hint = "; none are published for the real models yet, see the pack's README" if folder == FOLDER else ""
    raise EDiTError(f"{quoted(name)} is not in models/{folder}{hint}")


def load_model(path: str, name: str, base: Base, options: dict[str, Any]) -> Any:
    """A MODEL from a file that holds `base`.

    Raises:
        EDiTModelError: ComfyUI cannot load the file after all.
    """
    try:
        if is_small_teacher(base):
            return load_small_teacher(path, base.depth, options, base.prefix)
        if base.prefix in PREFIXES and not base.renamed:
            return comfy.sd.load_diffusion_model(path, model_options=options)
        return load_renamed(path, base.prefix, options)
    except comfy.model_management.OOM_EXCEPTION:
        raise
    except (RuntimeError, KeyError) as error:  # tensors of other shapes than their model's, or too few of them
        detail = " ".join(str(error).split())
        raise EDiTModelError(f"{name} is {base}, but ComfyUI cannot load it: {detail[:200]}") from None


def load_renamed(path: str, prefix: str, model_options: dict[str, Any], **kwargs: Any) -> Any:
    """`comfy.sd.load_diffusion_model` for a file whose names bear what ComfyUI does not take off.

    Args:
        path: the file.
        prefix: of its plain names.
        model_options: as ComfyUI's function takes them.
        kwargs: what ComfyUI asks of the factories that make independent copies for several GPUs.
    """
    state = plain_state(path, prefix)
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options=model_options, **kwargs)
    if model is None:
        raise RuntimeError("it cannot detect the model's type")
    model.cached_patcher_init = (load_renamed, (path, prefix, model_options))
    return model


class EDiTLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTLoadModel",
            display_name="EDiT: Load Model",
            category=CATEGORY,
            description="Loads PixArt or Stable Diffusion 3, and EDiT weights with it if wanted.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files(),
                    tooltip="A file in models/diffusion_models or models/checkpoints, "
                    "with ComfyUI's, the original or diffusers' tensor names.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="What the base model's weights are kept in; default is what ComfyUI chooses.",
                ),
                io.Combo.Input(
                    "edit_weights",
                    options=[NO_WEIGHTS, PIECEWISE, *folder_paths.get_filename_list(FOLDER)],
                    default=NO_WEIGHTS,
                    tooltip="EDiT weights in models/edit to apply to all blocks; piecewise attention, without any; "
                    "or none for the plain model.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, with EDiT if chosen.")],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, weight_dtype: str | None = None, edit_weights: str | None = None
    ) -> bool | str:
        return refusal(lambda: cls._check(model_name, weight_dtype, edit_weights))

    @classmethod
    def _check(cls, model_name: str | None, weight_dtype: str | None, edit_weights: str | None) -> None:
        if model_name is not None:  # what is linked is None at first
            model_path(model_name)
        check_values(cls, weight_dtype=weight_dtype)
        if edit_weights not in (None, NO_WEIGHTS, PIECEWISE):
            file_path(FOLDER, edit_weights)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, weight_dtype: str | None, edit_weights: str | None) -> float:
        # A linked input is None here.
        return 0.0 if edit_weights in (None, NO_WEIGHTS, PIECEWISE) else weights_time(edit_weights)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, edit_weights: str) -> io.NodeOutput:
        cls._check(model_name, weight_dtype, edit_weights)
        path = model_path(model_name)
        base = identify_file(path, model_name)
        logger.info("EDiT: %s is %s", model_name, base)
        model = load_model(path, model_name, base, dict(WEIGHT_DTYPES[weight_dtype]))
        if edit_weights == PIECEWISE:
            model = apply_to_model(model, EDiTConfig.preset(WITHOUT_WEIGHTS))
        elif edit_weights != NO_WEIGHTS:
            model = apply_to_model(model, load_weights(edit_weights))
        return io.NodeOutput(model)


def weights_time(name: str) -> float:
    """For `fingerprint_inputs`: a file that was replaced is read again."""
    return os.path.getmtime(file_path(FOLDER, name))


def load_weights(name: str) -> EDiTWeights:
    weights, report = EDiTWeights.load_with_report(file_path(FOLDER, name))
    logger.info("EDiT: %s: %s", name, report)
    return weights


class EDiTLoadWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTLoadWeights",
            display_name="EDiT: Load Weights",
            category=CATEGORY,
            description="Loads EDiT weights from models/edit.",
            inputs=[
                io.Combo.Input(
                    "edit_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file with EDiT weights in models/edit.",
                ),
            ],
            outputs=[Weights.Output(display_name="EDIT_WEIGHTS", tooltip="The weights in the file.")],
        )

    @classmethod
    def validate_inputs(cls, edit_name: str | None = None) -> bool | str:
        return True if edit_name is None else refusal(lambda: file_path(FOLDER, edit_name))  # None: linked

    @classmethod
    def fingerprint_inputs(cls, edit_name: str | None) -> float:
        return 0.0 if edit_name is None else weights_time(edit_name)

    @classmethod
    def execute(cls, edit_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_weights(edit_name))


def check_prefix(prefix: str) -> None:
    """Whether a prefix names a file in `models/edit` or below.

    Raises:
        EDiTError: it does not, or no file can have this name.
    """
    name = os.path.basename(os.path.normpath(prefix))
    root = os.path.realpath(folder_paths.get_folder_paths(FOLDER)[0])
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in prefix):  # control characters, half a letter
        problem = "has characters that no file's name can have"
    elif name in ("", ".", ".."):
        problem = "names no file"
    elif not os.path.realpath(os.path.join(root, prefix)).startswith(root + os.sep):
        problem = f"leads out of models/{FOLDER}"
    else:
        return
    raise EDiTError(f"filename_prefix {quoted(prefix)} {problem}; write a name such as edit, or folder/edit")


def save_numbered(weights: EDiTWeights, stem: str, number: int) -> str:
    """Saves under the first free number from `number` on, whoever else saves at the same time; gives the path."""
    while True:
        path = f"{stem}_{number:05}_.safetensors"
        try:
            weights.save(path, replace=False)
        except FileExistsError:
            number += 1
        else:
            return path


class EDiTSaveWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTSaveWeights",
            display_name="EDiT: Save Weights",
            category=CATEGORY,
            description="Saves EDiT weights to models/edit under a new, numbered name.",
            inputs=[
                Weights.Input("edit_weights", tooltip="The weights to save."),
                io.String.Input(
                    "filename_prefix",
                    default="edit",
                    tooltip="The file's name without its number; may name a folder below models/edit.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return True if filename_prefix is None else refusal(lambda: check_prefix(filename_prefix))  # None: linked

    @classmethod
    def execute(cls, edit_weights: EDiTWeights, filename_prefix: str) -> io.NodeOutput:
        check_prefix(filename_prefix)
        root = folder_paths.get_folder_paths(FOLDER)[0]
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, root)
            path = save_numbered(edit_weights, os.path.join(folder, name), counter)
        except OSError as error:  # a name that is too long, a file where a folder should be, a full disk
            detail = error.strerror or error
            raise EDiTError(f"filename_prefix {quoted(filename_prefix)}: cannot be written ({detail})") from None
        saved = os.path.relpath(path, root)
        logger.info("EDiT: saved %s", path)
        return io.NodeOutput(ui=ui.PreviewText(f"models/{FOLDER}/{saved}"))
