"""Encode images and captions once, for a distillation: latents and text embeddings in shards on disk.

Run the same command again to go on after it was stopped, or once images or captions were added, changed or removed:
what has changed is encoded anew, and what is gone is taken out. Several processes may share the work: start one per GPU
with `accelerate launch` or `torchrun`, or by hand with --rank and --world.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

import torch

from ..distill.cache import build_cache
from ..distill.encoders import PipelineEncoder
from ..distill.sources import DatasetSource, FolderSource, TarSource
from ..runtime import DTYPES, progress
from .common import Result, device_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a PixArt-Σ or SD3.5 pipeline's folder, as diffusers saves it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", help="a folder of images with captions: a .txt or .caption beside each, or metadata.jsonl"
    )
    source.add_argument("--dataset", help="a Hugging Face dataset: a folder, or a name on the hub to stream from")
    source.add_argument("--tars", nargs="+", help="webdataset tars of images and captions: paths or URLs")
    parser.add_argument("--image-column", default="image", help="with --dataset: the column of images")
    parser.add_argument("--caption-column", default="text", help="with --dataset: the column of captions")
    parser.add_argument("--split", default="train", help="with --dataset: which part of it")
    parser.add_argument("--output", required=True, help="the cache's folder; it is made, or continued")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024], help="pixels per side of a square")
    parser.add_argument("--bucket-step", type=int, default=64, help="pictures' sides are multiples of so many pixels")
    parser.add_argument("--max-aspect", type=float, default=2.0, help="longest side over shortest side of a picture")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per call at the smallest resolution")
    parser.add_argument("--shard-size", type=int, default=256, help="pictures per file")
    local = os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the text encoders and embeddings")
    # argparse checks defaults that are texts as it does arguments
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    parser.add_argument("--rank", type=int, default=rank, help="this process's number, from 0 on (RANK)")
    parser.add_argument("--world", type=int, default=world, help="how many processes share the work (WORLD_SIZE)")


def run(options: Any) -> Result:
    source = _source(options)  # before the encoders, which take a while to load
    source.require_captions()
    encoder = PipelineEncoder(options.model, device_of(options), DTYPES[options.dtype])
    report = build_cache(
        source,
        encoder,
        options.output,
        options.resolutions,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        bucket_step=options.bucket_step,
        max_aspect=options.max_aspect,
        rank=options.rank,
        world=options.world,
        progress=progress,
        too_long=encoder.too_long,
    )
    text = f"{options.output}: {report}"
    if not report.complete:
        text += f"\nprocess {options.rank} of {options.world} is through; the others are not yet"
    return Result(text, {"cache": options.output, "backbone": encoder.backbone, **asdict(report)})


def _source(options: Any) -> FolderSource | TarSource | DatasetSource:
    if options.images:
        return FolderSource(options.images)
    if options.tars:
        return TarSource(options.tars)
    return DatasetSource(options.dataset, options.image_column, options.caption_column, options.split)
