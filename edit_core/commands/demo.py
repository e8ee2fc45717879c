"""Draw with both models, with their own attention and with EDiT, and compare pictures and seconds.

The models have real widths, few blocks and random weights: no teacher's weights can be shipped, and untrained EDiT
weights are only near the teacher. The demo shows that the patching works and what it saves, not how pictures look.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..apply import apply_edit
from ..backbones import BACKBONES
from ..bench import device_name
from ..errors import EDiTError
from ..models import PROMPT_TOKENS, random_transformer
from ..runtime import DTYPES, progress
from ..weights import EDiTWeights
from .common import Result, add_config_arguments, add_model_arguments, backbones_of, config_of, device_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument("--size", type=int, default=1024, help="pixels per side")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of each model")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps")
    parser.add_argument("--output", default="out", help="folder for the pictures")


def run(options: Any) -> Result:
    if options.size < 64 or options.size % 16:
        raise EDiTError(f"--size {options.size}: sides must be multiples of 16, from 64 pixels on")
    if options.steps < 1:
        raise EDiTError("--steps must be at least 1")
    output, device = Path(options.output), device_of(options)
    output.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []
    for backbone in backbones_of(options):
        row = _compare(backbone, options, device, output)
        rows.append(row)
        lines.append(
            f"| {BACKBONES[backbone].title} | {row['teacher_seconds']:.2f} | {row['edit_seconds']:.2f} | "
            f"{row['ratio']:.2f}x | {row['relative_difference']:.4f} | {'yes' if row['restored'] else 'NO'} |"
        )
    head = [
        f"{options.size}x{options.size} pixels, {(options.size // 16) ** 2} tokens, {options.blocks} blocks of real "
        f"width, {options.steps} steps, random weights; {options.dtype} on {device_name(device)}",
        "",
        "| model | teacher, s/step | EDiT, s/step | speed | difference of the latents | bit-equal after removal |",
        "|---|---|---|---|---|---|",
    ]
    tail = ["", *(f"picture: {row['picture']}" for row in rows)]
    return Result("\n".join([*head, *lines, *tail]), rows)


def _compare(backbone: str, options: Any, device: torch.device, output: Path) -> dict[str, Any]:
    transformer = random_transformer(backbone, options.blocks, DTYPES[options.dtype], options.size).to(device)
    config = config_of(options)
    # Without side weights the smallest differences stand for a student's.
    weights = EDiTWeights.init(transformer, config, trainable="side" if config.side_weights else "low_rank", rank=1)
    draw = _sampler(backbone, transformer, options)
    teacher, teacher_seconds = draw(f"{backbone}, teacher")
    with apply_edit(transformer, weights, layers=options.layers):
        edit, edit_seconds = draw(f"{backbone}, EDiT")
    again, _ = draw(f"{backbone}, teacher again")
    picture = output / f"demo_{backbone}.png"
    _save_picture(picture, teacher, edit)
    return {
        "backbone": backbone,
        "teacher_seconds": teacher_seconds,
        "edit_seconds": edit_seconds,
        "ratio": teacher_seconds / edit_seconds,
        "relative_difference": float((edit - teacher).norm() / teacher.norm()),
        "restored": bool(torch.equal(teacher, again)),
        "picture": str(picture),
    }


def _sampler(backbone: str, transformer: Any, options: Any) -> Any:
    """A function that samples latents from one seed through diffusers' own pipeline."""
    from diffusers import (
        AutoencoderTiny,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        PixArtSigmaPipeline,
        StableDiffusion3Pipeline,
    )

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(transformer.device, transformer.dtype)

    vae = AutoencoderTiny(latent_channels=transformer.config.in_channels)  # gives the pipelines their factor of 8
    call: dict[str, Any] = {"prompt_embeds": normal(PROMPT_TOKENS[backbone], 4096), "guidance_scale": 0.0}
    if backbone == "pixart_sigma":
        pipeline: Any = PixArtSigmaPipeline(None, None, vae, transformer, DPMSolverMultistepScheduler())
        call["prompt_attention_mask"] = torch.ones(1, PROMPT_TOKENS[backbone], device=transformer.device)
        call.update(negative_prompt=None, use_resolution_binning=False)
    else:
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(transformer, flow, vae, None, None, None, None, None, None)
        call["pooled_prompt_embeds"] = normal(2048)
    pipeline.set_progress_bar_config(disable=True)

    def draw(label: str) -> tuple[Tensor, float]:
        stamps: list[float] = []
        bar = iter(progress(range(options.steps), options.steps, label))

        def step_done(*_: Any) -> None:
            stamps.append(time.perf_counter())
            next(bar, None)

        watch = transformer.register_forward_hook(step_done)
        start = time.perf_counter()
        try:
            latents = pipeline(
                num_inference_steps=options.steps,
                height=options.size,
                width=options.size,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                **call,
            ).images
        finally:
            watch.remove()
        list(bar)
        return latents.float().cpu(), (stamps[-1] - start) / len(stamps)

    return draw


def _save_picture(path: Path, teacher: Tensor, edit: Tensor) -> None:
    """Teacher, EDiT and their difference side by side, the first three latent channels as colours."""
    from PIL import Image, ImageDraw

    low, high = teacher[0, :3].quantile(0.01), teacher[0, :3].quantile(0.99)

    def colours(latent: Tensor, minimum: Tensor, maximum: Tensor) -> Image.Image:
        rgb = ((latent[0, :3] - minimum) / (maximum - minimum)).clamp(0, 1).mul(255).byte()
        return Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy()).resize((384, 384), Image.Resampling.NEAREST)

    difference = (edit - teacher).abs()
    panels = {
        "teacher": colours(teacher, low, high),
        "EDiT, untrained": colours(edit, low, high),
        "difference, 10 times": colours(10 * difference, torch.zeros(()), high - low),
    }
    sheet = Image.new("RGB", (len(panels) * 392 - 8, 408), "white")
    for i, (title, panel) in enumerate(panels.items()):
        sheet.paste(panel, (i * 392, 24))
        ImageDraw.Draw(sheet).text((i * 392 + 4, 6), title, fill="black")
    sheet.save(path)
