"""A diffusers pipeline's own VAE and text encoders, from a folder on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbones import BACKBONES, CELL, Backbone, backbone_named
from ..basefile import BaseFile
from ..errors import EDiTModelError
from .prompts import cleans_captions, limits_passed
from .variants import only_variant

__all__ = ["CELL", "Encoder", "PipelineEncoder", "quiet"]

_SAMPLES = 16  # values per tensor in a fingerprint


class Encoder(Protocol):
    """What a cache is made with."""

    backbone: str
    """Its name."""
    dtype: torch.dtype
    """Of the text embeddings."""

    @property
    def fingerprint(self) -> str:
        """The same for the same weights, vocabularies and factors in the same dtype."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, 8h, 8w) uint8 -> (B, c, h, w) on the CPU, scaled and shifted as the transformer takes them."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the backbone's prompts become, on the CPU: `prompt_embeds` (B, T, C), and such as `prompt_mask` (B, T)
        bool or `pooled` (B, P). T is the same for every prompt."""


class PipelineEncoder:
    """The VAE and the text encoders of a pipeline's folder; the transformer is not loaded.

    Prompts go through the pipeline's own `encode_prompt`, so that a cache holds what the pipeline would draw with: that
    includes PixArt-Σ's `clean_caption`, on in its call and not in that method, where ftfy and bs4 are installed.
    Nothing is fetched, and nothing is unpickled.

    Args:
        folder: as `save_pretrained` writes it, with `model_index.json`.
        device: where to compute.
        dtype: of the text encoders and their embeddings. The VAE works in float32: it is small, PixArt-Σ's overflows
            in float16, and bfloat16 costs latents a percent.

    Raises:
        EDiTModelError: not such a folder, a part is missing or cannot be loaded, or diffusers is not installed.
    """

    def __init__(self, folder: str | Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        pipeline_class, backbone = _check_folder(self.folder)
        self.backbone = backbone.name
        try:
            import diffusers
            import transformers  # noqa: F401 - diffusers replaces what it cannot import by stubs that fail later
        except ImportError:
            raise EDiTModelError("this needs diffusers and transformers: install edit-attention[distill]") from None
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # older versions know torch_dtype and not dtype
                self.pipeline: Any = getattr(diffusers, pipeline_class).from_pretrained(
                    self.folder,
                    transformer=None,
                    scheduler=None,
                    torch_dtype={"default": dtype, "vae": torch.float32},
                    local_files_only=True,
                    use_safetensors=True,
                    variant=only_variant(self.folder, backbone.parts),
                )
        except EDiTModelError:
            raise
        except Exception as error:  # diffusers and transformers raise every kind there is for a damaged folder
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EDiTModelError(f"{self.folder}: its VAE or text encoders cannot be loaded ({reason})") from None
        self.vae: Any = self.pipeline.vae
        if self.pipeline.vae_scale_factor != CELL:
            raise EDiTModelError(
                f"{self.folder}: its VAE makes one cell of {self.pipeline.vae_scale_factor} pixels, not of {CELL}"
            )
        self.pipeline.to(device)
        self.cleans = backbone.cleans and cleans_captions()
        """Whether captions are cleaned, as the pipeline does before it draws."""

    @property
    def fingerprint(self) -> str:
        """A digest of the VAE's factors, the vocabularies, and a few values of every tensor."""
        config = self.vae.config
        digest = hashlib.sha256(f"{self.backbone} {config.scaling_factor} {config.shift_factor}".encode())
        if self.cleans:
            digest.update(b"clean_caption")
        for name in backbone_named(self.backbone).parts:
            part = getattr(self.pipeline, name)
            if name.startswith("tokenizer"):
                digest.update(json.dumps(sorted(part.get_vocab().items())).encode())
                continue
            for key, tensor in sorted(part.state_dict().items()):
                flat = tensor.reshape(-1)
                places = torch.tensor([(len(flat) - 1) * i // (_SAMPLES - 1) for i in range(_SAMPLES)])
                digest.update(f"{name} {key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """See :meth:`Encoder.encode_images`. The latents are the most likely ones, not drawn; float32."""
        image = pixels.to(self.device, torch.float32) / 255 * 2 - 1
        latent = self.vae.encode(image).latent_dist.mode()
        latent = (latent - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return self._finite("VAE", latent)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See :meth:`Encoder.encode_prompts`. T is that of a whole prompt, such as PixArt-Σ's 300."""
        with quiet():  # every long caption would be quoted, since CLIP takes 77 tokens of it
            found = backbone_named(self.backbone).encode(self.pipeline, list(prompts), self.device, self.cleans)
        return {name: self._finite("text encoders", value) for name, value in found.items()}

    def too_long(self, caption: str) -> list[str]:
        """The limits of the text encoders that a caption is longer than."""
        with quiet():  # a tokenizer warns of every long caption
            return limits_passed(self.pipeline, backbone_named(self.backbone), caption, self.cleans)

    def _finite(self, part: str, tensor: Tensor) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise EDiTModelError(
                f"{self.folder}: its {part} give numbers that are not finite in {tensor.dtype}; use another dtype"
            )
        return tensor.cpu()


def _check_folder(folder: Path) -> tuple[str, Backbone]:
    """The pipeline's class and what its transformer is, once everything that is needed is known to be there."""
    index = _read_index(folder)
    pipeline_class = index["_class_name"]
    backbone = _backbone_of(folder, pipeline_class)
    missing = [part for part in backbone.parts if index.get(part, [None])[0] is None or not (folder / part).is_dir()]
    if missing:
        raise EDiTModelError(
            f"{folder}: a cache needs {', '.join(backbone.parts)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; found {_listing(folder)}"
        )
    for part in backbone.parts:
        if part.startswith("tokenizer"):
            _check_vocabulary(folder / part)
    return pipeline_class, backbone


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        content["_class_name"] = str(content["_class_name"])
    except FileNotFoundError:
        raise EDiTModelError(
            f"{folder}: not a diffusers pipeline's folder, which has a model_index.json; found {_listing(folder)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EDiTModelError(f"{path}: cannot be read ({error})") from None
    return content


def _backbone_of(folder: Path, pipeline_class: str) -> Backbone:
    """What a pipeline of this class draws with; where it can draw with several, the transformer's files tell."""
    able = [backbone for backbone in BACKBONES.values() if pipeline_class in backbone.pipelines]
    if not able:
        known = dict.fromkeys(backbone.pipelines[0] for backbone in BACKBONES.values())
        raise EDiTModelError(f"{folder}: is a {pipeline_class}, and a cache needs {' or '.join(known)}")
    if len(able) == 1:
        return able[0]
    base = BaseFile(folder).identify()
    if base.backbone not in able:
        raise EDiTModelError(f"{folder}: is a {pipeline_class}, but its transformer is {base}")
    return base.backbone


def _check_vocabulary(tokenizer: Path) -> None:
    """transformers makes an empty vocabulary without a word where a tokenizer's files are missing."""
    files = {path.name for path in tokenizer.iterdir()}
    if not files & {"tokenizer.json", "spiece.model"} and not {"vocab.json", "merges.txt"} <= files:
        raise EDiTModelError(f"{tokenizer}: holds no vocabulary; found {_listing(tokenizer)}")
    # An optional library of transformers', without which its error speaks of another one, tiktoken.
    if "tokenizer.json" not in files and "spiece.model" in files:
        for module, name in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
            if not _installed(module):
                raise EDiTModelError(f"{tokenizer}: spiece.model needs {name}: install it")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return ", ".join(names[:20]) or "nothing"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps both libraries to errors, and without their own progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    try:
        for library, _ in before:
            library.set_verbosity(logging.ERROR)
        for library in bars:
            library.disable_progress_bar()
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()
