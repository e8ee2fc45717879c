"""Draws pictures with a transformer in memory: for evaluations, and for what a training shows of its student."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backbones import CELL, identify_module
from ..errors import EDiTModelError
from .encoders import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Sampler", "grid", "png"]

_GAP = 4  # pixels between the pictures of a grid


class Sampler:
    """Draws pictures through the backbone's own diffusers pipeline, from embeddings, so no text encoder is needed.

    Nothing is fetched, and nothing is unpickled.

    Args:
        folder: a pipeline's folder, of which the scheduler and the VAE (in float32) are loaded.
        transformer: of diffusers, which is used as it is at each call: with EDiT applied it draws the student's
            pictures, with the handle's tap at `dense_tap` the teacher's.

    Raises:
        EDiTModelError: the scheduler or the VAE is missing or cannot be loaded.
    """

    def __init__(self, folder: Path, transformer: Any) -> None:
        with quiet():  # importing pipelines, transformers names every optional library that is not there
            import diffusers.pipelines  # noqa: F401

            self.backbone = identify_module(transformer).backbone
            self.transformer = transformer
            self.scheduler = _scheduler(folder)
            self.vae = _vae(folder).to(transformer.device)
            pipeline = self.backbone.make_pipeline(transformer, self.scheduler, self.vae)
        if pipeline.vae_scale_factor != CELL:
            raise EDiTModelError(
                f"{folder}: its VAE makes one cell of {pipeline.vae_scale_factor} pixels, not of {CELL}"
            )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline

    def draw(
        self,
        condition: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        seeds: Sequence[int],
        height: int,
        width: int,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """Samples one latent per seed. Works under `torch.autocast`.

        A seed's noise is drawn in float32 on the CPU by a generator of its own, so it depends on neither the device,
        the dtype nor the other pictures of the batch.

        Args:
            condition: of B prompts, as samples of a cache are batched: `prompt_embeds (B, T, C)` and what else the
                backbone's prompts become.
            negative: the same for the negative prompts; one, `(1, ...)`, may serve them all.
            seeds: B of them.
            height: in latent cells.
            width: in latent cells.
            steps: of the sampling.
            guidance: scale of classifier-free guidance; up to 1 there is none, and the negative prompt is not used.

        Returns:
            latents `(B, c, height, width)`, float32, on the transformer's device.

        Raises:
            EDiTModelError: the transformer cannot draw this size.
        """
        self.backbone.check_size(height * CELL, width * CELL, self.transformer)
        device, dtype = self.transformer.device, self.transformer.dtype
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (self.transformer.config.in_channels, height, width)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (B, c, h, w)

        def ready(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            spread = {name: value.expand(len(seeds), *value.shape[1:]) for name, value in values.items()}
            return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in spread.items()}

        latents: Tensor = self.pipeline(
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height * CELL,
            width=width * CELL,
            latents=noise.to(dtype),
            generator=generators,  # schedulers that add noise on the way go on with the picture's own
            output_type="latent",
            **self.backbone.draw_arguments(ready(condition), ready(negative)),
        ).images
        return latents.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, c, h, w)` to pictures `(B, 8h, 8w, 3)`, uint8 on the CPU; in float32 even under autocast."""
        config = self.vae.config
        pictures = []
        with torch.autocast(self.vae.device.type, enabled=False):
            for latent in latents.to(self.vae.device, torch.float32).split(1):  # one by one: a VAE takes much memory
                image = self.vae.decode(latent / config.scaling_factor + (config.shift_factor or 0.0)).sample
                pictures.append(((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(pictures)


def grid(rows: Sequence[Tensor]) -> Image:
    """Pictures in rows on white, as for a teacher above its student.

    Args:
        rows: each `(B, H, W, 3)` uint8; H and W the same in all.
    """
    from PIL import Image

    height, width = rows[0].shape[1] + _GAP, rows[0].shape[2] + _GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * width - _GAP, len(rows) * height - _GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture.contiguous().numpy()), (x * width, y * height))
    return sheet


def png(image: Image) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _scheduler(folder: Path) -> Any:
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    try:
        name = json.loads(path.read_text("utf-8"))["_class_name"]
        return getattr(diffusers, name).from_pretrained(path.parent, local_files_only=True)
    except FileNotFoundError:
        raise EDiTModelError(f"{path}: there is no such file; a pipeline's folder has one") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EDiTModelError(f"{path}: no scheduler of diffusers' can be made of it ({error})") from None


def _vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    path = folder / "vae"
    config = path / "config.json"
    if not config.is_file():
        raise EDiTModelError(f"{config}: there is no such file; a pipeline's folder has one")
    classes = {c.__name__: c for c in (AutoencoderKL, AutoencoderTiny)}
    try:
        name = json.loads(config.read_text("utf-8"))["_class_name"]
        loaded: Any = classes[name]
        vae = loaded.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except Exception as error:  # diffusers raises every kind there is for a damaged folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EDiTModelError(f"{path}: this VAE cannot be loaded ({reason})") from None
    return vae.eval().requires_grad_(False)
