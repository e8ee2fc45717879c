"""Compare a student with its teacher, or attention that needs no weights: both draw the same prompts from one noise.

Writes a folder with eval.json, which holds the scores and all that a rerun needs, index.html, grid.png and the
pictures. Scores of sets of pictures (CLIP score, CMMD, FID) need a CLIP or Inception on this disk; nothing is fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..backbones import Base
from ..basefile import BaseFile
from ..bench import device_name
from ..errors import EDiTError
from ..files import write_file
from ..hosts.diffusers import apply_edit
from ..layers import format_layers
from ..runtime import DTYPES
from ..weights import EDiTWeights, fingerprint, weights_for
from .common import Result, add_device_arguments, add_student_arguments, device_of, read_prompts, student_of

if TYPE_CHECKING:
    from ..distill.dataset import CachedLatents
    from ..distill.encoders import PipelineEncoder
    from ..distill.picture_features import ClipFeatures, InceptionFeatures

FORMAT_VERSION = 1
PROMPTS = (
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "a portrait of an old fisherman with a grey beard, studio light",
    "a red fox asleep in fresh snow, telephoto photograph",
    "a bowl of ramen with a soft egg, seen from above",
    "a narrow street in a rainy city at night, neon signs in the puddles",
    "an astronaut riding a horse on the moon, detailed illustration",
    "a wooden sign by a trail that says WELCOME",
    "three green apples and a glass of water on a white table",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the teacher: a diffusers pipeline's folder")
    add_student_arguments(parser)
    parser.add_argument("--output", required=True, help="the folder to write to; it must hold no eval.json yet")
    parser.add_argument("--prompts", help="a text file with one prompt per line; 8 of this package's by default")
    parser.add_argument("--cache", help="compare the attentions on this cache's latents, not on what the teacher drew")
    parser.add_argument(
        "--resolution", type=int, help="with --cache: which of its resolutions; that of --size if not given"
    )
    parser.add_argument("--images", help="with --clip or --inception: a folder of real images to compare with")
    parser.add_argument(
        "--clip", help="a CLIP's folder, as transformers saves it: CLIP score, CMMD, FID in its features"
    )
    parser.add_argument("--inception", help="torch-fidelity's Inception weights: FID")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps per picture")
    parser.add_argument("--guidance", type=float, default=4.5, help="scale of classifier-free guidance")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0, help="seeds the first picture; each further one has the next")
    parser.add_argument("--size", type=int, default=1024, help="pixels per side; a multiple of 16")
    parser.add_argument("--samples", type=int, default=64, help="latents on which the attentions are compared, at most")
    parser.add_argument("--layers", default="all", help='transformer blocks: "all", "none" or "0, 3-9, 27"')
    add_device_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="pictures per call")


def run(options: Any) -> Result:
    output, prompts = Path(options.output), PROMPTS if options.prompts is None else read_prompts(options.prompts)
    _check(options, output)
    try:
        from ..distill.encoders import PipelineEncoder
        from ..distill.eval_page import page, table
        from ..distill.evaluate import Evaluation, Settings, cached_batches
        from ..distill.sampling import Sampler
        from ..distill.teacher import load_teacher
    except ImportError as error:
        raise EDiTError(f"eval needs {error.name}: install edit-attention[distill]") from None
    settings = Settings(
        prompts, options.seed, options.seeds, options.steps, options.guidance, options.size, options.batch,
        options.samples,
    )  # fmt: skip
    # Everything that can be wrong is looked at before the text encoders, which take a while to load.
    device, dtype, model = device_of(options), DTYPES[options.dtype], Path(options.model)
    student, file = student_of(options), BaseFile(model)
    base = file.identify()
    weights = weights_for(base, student)
    base.backbone.check_size(options.size, options.size)
    blocks = weights.choose(options.layers, base)
    beside = _Beside.of(options, base, device)
    cached = cached_batches(beside.cache, settings.samples, settings.batch) if beside.cache else []
    encoder = PipelineEncoder(model, device, dtype)
    conditions = _conditions(encoder, prompts, settings.batch)
    negative, encoders = encoder.encode_prompts([""]), encoder.fingerprint
    del encoder  # T5 alone is larger than the transformer
    transformer = load_teacher(model, dtype, device)
    base.backbone.check_size(options.size, options.size, transformer)
    sampler = Sampler(model, transformer)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EDiTError(f"{output}: this folder cannot be made ({error.strerror})") from None
    with apply_edit(transformer, weights, options.layers) as handle:
        evaluation = Evaluation(
            sampler, handle, base.backbone, settings, output, beside.clip, beside.inception, beside.real, cached
        )
        found = evaluation.run(conditions, negative)
    if warning := weights.warning(base, file.tensor):
        found["notes"].append(warning)
    architecture = {"class": type(transformer).__name__, **_base(base, file)}
    chosen = {"layers": options.layers, "dtype": options.dtype, "device": options.device}
    report = {
        "format": "edit-eval",
        "format_version": FORMAT_VERSION,
        "model": {**architecture, "encoders": encoders, "scheduler": _scheduler(sampler.scheduler)},
        "weights": _weights(weights, options, blocks),
        "settings": {**asdict(settings), **chosen, "resolution": beside.cache.resolution if beside.cache else None},
        "data": beside.described(),
        "machine": _machine(device),
        "versions": _versions(),
        **found,
    }
    write_file(output / "index.html", page(report).encode())
    # The last of all: where there is an eval.json, everything is there.
    write_file(output / "eval.json", json.dumps(report, indent=1, allow_nan=False).encode())
    return Result(f"{table(report)}\n\n{output / 'index.html'}", report)


@dataclass(frozen=True)
class _Beside:
    """What there is to compare with beside the teacher's own pictures."""

    clip: ClipFeatures | None
    inception: InceptionFeatures | None
    real: Sequence[Path]
    cache: CachedLatents | None
    place: str | None
    """Of the cache."""

    @classmethod
    def of(cls, options: Any, base: Base, device: torch.device) -> _Beside:
        from ..distill.dataset import CachedLatents
        from ..distill.picture_features import ClipFeatures, InceptionFeatures
        from ..distill.sources import FolderSource

        clip = ClipFeatures(Path(options.clip), device) if options.clip else None
        inception = InceptionFeatures(Path(options.inception), device) if options.inception else None
        real = FolderSource(options.images).files if options.images else []
        if not options.cache:
            return cls(clip, inception, real, None, None)
        cache = CachedLatents(options.cache, options.resolution or options.size)
        if cache.backbone != base.backbone.name:
            raise EDiTError(f"{options.cache} was made for {cache.backbone}, but the teacher is {base.backbone.name}")
        return cls(clip, inception, real, cache, options.cache)

    def described(self) -> dict[str, Any]:
        return {
            "cache": self.cache.describe(self.place) if self.cache and self.place else None,
            "images": {"count": len(self.real), "sha256": _digest(self.real)} if self.real else None,
            "clip": {"dim": self.clip.dim, "sha256": _digest(self.clip.files)} if self.clip else None,
            "inception": {"sha256": _digest(self.inception.files)} if self.inception else None,
        }


def _conditions(encoder: PipelineEncoder, prompts: Sequence[str], batch: int) -> list[dict[str, Tensor]]:
    """Every prompt's tensors, `(1, …)` each."""
    conditions = []
    for start in range(0, len(prompts), batch):
        encoded = encoder.encode_prompts(prompts[start : start + batch])
        parts = {name: value.split(1) for name, value in encoded.items()}
        conditions += [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    return conditions


def _check(options: Any, output: Path) -> None:
    if (output / "eval.json").exists():
        raise EDiTError(f"{output} holds an eval.json already; choose another folder")
    for name in ("steps", "seeds", "batch", "samples"):
        if getattr(options, name) < 1:
            raise EDiTError(f"--{name} must be at least 1")
    if not 0 <= options.guidance < math.inf:
        raise EDiTError(f"--guidance must be a number from 0 on, not {options.guidance}; up to 1 there is none")
    if not 0 <= options.seed < 1 << 32:
        raise EDiTError("--seed must be from 0 to 4294967295")
    if options.images and not (options.clip or options.inception):
        raise EDiTError("--images is compared in the features of --clip or --inception; give one of them")
    if options.resolution and not options.cache:
        raise EDiTError("--resolution is one of a cache's; give --cache too")


def _base(base: Base, file: BaseFile) -> dict[str, Any]:
    name = base.backbone.name
    return {"backbone": name, "blocks": base.depth, "dim": base.dim, "base_hash": fingerprint(base, file.tensor)}


def _weights(weights: EDiTWeights, options: Any, blocks: Iterable[int]) -> dict[str, Any]:
    return {
        "sha256": _digest([Path(options.weights)]) if options.weights else None,
        "preset": options.preset,
        "blocks": format_layers(blocks),
        "config": json.loads(weights.config.to_json()),
        "base_hash": weights.base_hash,
        "training": weights.training,
    }


def _machine(device: torch.device) -> dict[str, str]:
    return {"device": device_name(device), "backend": f"torch scaled_dot_product_attention on {device.type}"}


def _scheduler(scheduler: Any) -> dict[str, Any]:
    """Its class and what it was made with, without diffusers' own notes."""
    own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    # JSON knows no -inf, which is the default of one of DPMSolver's fields.
    plain = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in own.items()}
    return {"class": type(scheduler).__name__, **plain}


def _digest(files: Iterable[Path]) -> str:
    """sha256 of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "torchmetrics")
    return {"edit_core": __version__, **{name: importlib.metadata.version(name) for name in names}}
