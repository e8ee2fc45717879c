"""Compare a student with its teacher: both draw the same prompts from the same noise.

Writes a folder with eval.json, which holds the scores and all that a rerun needs, index.html, grid.png and the
pictures. Scores of sets of pictures (CLIP score, CMMD, FID) need a CLIP or Inception on this disk; nothing is fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..backbones import Base
from ..basefile import BaseFile
from ..bench import device_name
from ..errors import EDiTError
from ..files import write_file
from ..hosts.diffusers import apply_edit
from ..layers import format_layers
from ..runtime import DTYPES
from ..weights import EDiTWeights, fingerprint
from .common import Result, add_device_arguments, device_of, read_prompts

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
    parser.add_argument("--weights", required=True, help="the student: EDiT weights for it")
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
        from ..distill.dataset import CachedLatents
        from ..distill.encoders import PipelineEncoder
        from ..distill.eval_page import page, table
        from ..distill.evaluate import Evaluation, Settings, cached_batches
        from ..distill.picture_features import ClipFeatures, InceptionFeatures
        from ..distill.sampling import Sampler
        from ..distill.sources import FolderSource
        from ..distill.teacher import load_teacher
    except ImportError as error:
        raise EDiTError(f"eval needs {error.name}: install edit-attention[distill]") from None
    settings = Settings(
        prompts, options.seed, options.seeds, options.steps, options.guidance, options.size, options.batch,
        options.samples,
    )  # fmt: skip
    # Everything that can be wrong is looked at before the text encoders, which take a while to load.
    device, dtype, model = device_of(options), DTYPES[options.dtype], Path(options.model)
    weights, file = EDiTWeights.load(options.weights), BaseFile(model)
    base = file.identify()
    blocks = weights.choose(options.layers, base)
    clip = ClipFeatures(Path(options.clip), device) if options.clip else None
    inception = InceptionFeatures(Path(options.inception), device) if options.inception else None
    real = FolderSource(options.images).files if options.images else []
    cached = []
    if options.cache:
        data = CachedLatents(options.cache, options.resolution or options.size)
        if data.backbone != base.backbone.name:
            raise EDiTError(f"{options.cache} was made for {data.backbone}, but the teacher is {base.backbone.name}")
        cached = cached_batches(data, settings.samples, settings.batch)
    encoder = PipelineEncoder(model, device, dtype)
    conditions = []
    for start in range(0, len(prompts), settings.batch):
        encoded = encoder.encode_prompts(prompts[start : start + settings.batch])
        parts = {name: value.split(1) for name, value in encoded.items()}
        conditions += [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    negative, encoders = encoder.encode_prompts([""]), encoder.fingerprint
    del encoder  # T5 alone is larger than the transformer
    transformer = load_teacher(model, dtype, device)
    _check_size(transformer, options.size)
    sampler = Sampler(model, transformer)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EDiTError(f"{output}: this folder cannot be made ({error.strerror})") from None
    with apply_edit(transformer, weights, options.layers) as handle:
        evaluation = Evaluation(
            sampler, handle, weights.backbone, settings, output, clip, inception, real, cached
        )  # fmt: skip
        found = evaluation.run(conditions, negative)
    if warning := weights.warning(base, file.tensor):
        found["notes"].append(warning)
    report = {
        "format": "edit-eval",
        "format_version": FORMAT_VERSION,
        "model": {
            "class": type(transformer).__name__,
            **_base(base, file),
            "encoders": encoders,
            "scheduler": _scheduler(sampler.scheduler),
        },
        "weights": {
            "sha256": _digest([Path(options.weights)]),
            "blocks": format_layers(blocks),
            "config": json.loads(weights.config.to_json()),
            "base_hash": weights.base_hash,
            "training": weights.training,
        },
        "settings": {
            **asdict(settings),
            "layers": options.layers,
            "dtype": options.dtype,
            "device": options.device,
            "resolution": data.resolution if options.cache else None,
        },
        "data": {
            "cache": CachedLatents.describe(options.cache) if options.cache else None,
            "images": {"count": len(real), "sha256": _digest(real)} if real else None,
            "clip": {"dim": clip.dim, "sha256": _digest(clip.files)} if clip else None,
            "inception": {"sha256": _digest(inception.files)} if inception else None,
        },
        "machine": {
            "device": device_name(device),
            "backend": f"torch scaled_dot_product_attention on {device.type}",
        },
        "versions": _versions(),
        **found,
    }
    write_file(output / "index.html", page(report).encode())
    # The last of all: where there is an eval.json, everything is there.
    write_file(output / "eval.json", json.dumps(report, indent=1, allow_nan=False).encode())
    return Result(f"{table(report)}\n\n{output / 'index.html'}", report)


def _check(options: Any, output: Path) -> None:
    if (output / "eval.json").exists():
        raise EDiTError(f"{output} holds an eval.json already; choose another folder")
    if options.size < 16 or options.size % 16:
        raise EDiTError(f"--size {options.size}: must be a multiple of 16")
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


def _check_size(transformer: Any, size: int) -> None:
    most = 16 * getattr(transformer.config, "pos_embed_max_size", size)  # SD3.5's table of positions; PixArt-Σ has none
    if size > most:
        raise EDiTError(f"--size {size}: this model draws at most {most} pixels per side")


def _base(base: Base, file: BaseFile) -> dict[str, Any]:
    name = base.backbone.name
    return {"backbone": name, "blocks": base.depth, "dim": base.dim, "base_hash": fingerprint(base, file.tensor)}


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
