"""How near a student's pictures are to its teacher's: both draw the same prompts from the same noise, in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..backbones import Backbone
from ..errors import EDiTError
from ..files import write_file
from ..hosts.diffusers import EDiTHandle
from ..runtime import progress, timed
from . import picture_metrics
from .dataset import CachedLatents, collate
from .distance import Distance, teacher_distance
from .encoders import CELL
from .losses import dense_tap
from .picture_features import ClipFeatures, FeatureSets, InceptionFeatures, real_pictures
from .sampling import Sampler, grid, png

__all__ = ["Evaluation", "Settings", "cached_batches"]

# Noise for the latents of the attentions' errors must not be what the same latents were drawn from.
_NOISE_SEED = 1 << 32
_OVERVIEW = 8  # pictures of each
_OVERVIEW_SIDE = 2048  # pixels
_DIFFERENCE = 4  # times as large as it is
_TITLES = {"clip": "CLIP", "inception": "Inception"}
_PAIR_SCORES = ("psnr", "ssim", "lpips", "latent_cosine")


@dataclass(frozen=True)
class Settings:
    """What is drawn, and how: with the models, all that the scores depend on."""

    prompts: tuple[str, ...]
    seed: int
    """Of the first picture; each further one has the next."""
    seeds: int
    """Pictures per prompt."""
    steps: int
    """Of the sampling."""
    guidance: float
    """Scale of classifier-free guidance."""
    size: int
    """Pixels per side; a multiple of 16."""
    batch: int
    """Pictures per call."""
    samples: int
    """Latents on which the attentions are compared, at most."""


class _Picture(NamedTuple):
    number: int
    prompt: int
    seed: int


class Evaluation:
    """One comparison of an applied student with the teacher that it stands in.

    Args:
        sampler: draws with the transformer that `handle` was applied to.
        handle: the student; its tap is None again afterwards.
        backbone: what it is of.
        settings: what to draw.
        output: an existing folder; pictures go to `pictures/` in it, `grid.png` beside it.
        clip: for CLIP scores, CMMD and FID in CLIP's features.
        inception: for FID as it is commonly given.
        real: image files to compare the sets of pictures with, cut to squares of the same size.
        cached: batches as :func:`cached_batches` gives them, to compare the attentions on; by default it is done on
            what the teacher drew.
    """

    def __init__(
        self,
        sampler: Sampler,
        handle: EDiTHandle,
        backbone: Backbone,
        settings: Settings,
        output: Path,
        clip: ClipFeatures | None = None,
        inception: InceptionFeatures | None = None,
        real: Sequence[Path] = (),
        cached: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.sampler, self.handle, self.backbone, self.settings = sampler, handle, backbone, settings
        self.output, self.real, self.cached = output, real, cached
        self.clip = clip
        networks = {"clip": clip, "inception": inception}
        self.features = {name: FeatureSets(network) for name, network in networks.items() if network is not None}
        self.absent: dict[str, str] = {}
        self.notes: list[str] = []
        self.lpips, reason = picture_metrics.lpips(settings.size)
        if self.lpips is None:
            self.absent["lpips"] = reason

    def run(self, conditions: Sequence[Mapping[str, Tensor]], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        """Draws, compares, and writes the pictures.

        Args:
            conditions: per prompt, `prompt_embeds (1, T, C)` and `prompt_mask (1, T)` or `pooled (1, P)`.
            negative: the same for the negative prompt.

        Returns:
            `scores`: means over the pictures, None where there is none; equal settings give equal ones. `absent`: why
            a score is None. `notes`: what to know before quoting one. `seconds`: per picture and batch, without the
            VAE. `pictures`: each one's prompt, seed, files and scores.

        Raises:
            EDiTError: latents that are not finite, or a real image that cannot be read.
        """
        settings = self.settings
        # First, since one of them may be damaged.
        for some in real_pictures(self.real, settings.size, settings.batch):
            for features in self.features.values():
                features.add("real", some)
        (self.output / "pictures").mkdir(exist_ok=True)
        plan = [_Picture(i, i // settings.seeds, settings.seed + i) for i in range(self._count())]
        batches = [plan[i : i + settings.batch] for i in range(0, len(plan), settings.batch)]
        records: list[dict[str, Any]] = []
        seconds: dict[str, list[float]] = {"teacher": [], "student": []}
        overview: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        samples: list[dict[str, Tensor]] = []
        warm = _collate([conditions[picture.prompt] for picture in batches[0]])
        for tap in (dense_tap, None):  # the first calls of a shape are slower
            self._draw(tap, warm, negative, batches[0], steps=1)
        for batch in progress(batches, len(batches), "eval"):
            condition = _collate([conditions[picture.prompt] for picture in batch])
            latents: dict[str, Tensor] = {}
            pictures: dict[str, Tensor] = {}
            for who, tap in (("teacher", dense_tap), ("student", None)):
                draw = partial(self._draw, tap, condition, negative, batch, settings.steps)
                latents[who], took = timed(draw, self.sampler.transformer.device)
                seconds[who].append(took / len(batch))
                self._check_finite(who, latents[who], batch)
                pictures[who] = self.sampler.decode(latents[who])
                overview[who] += pictures[who][: _OVERVIEW - len(overview[who])]
                for features in self.features.values():
                    features.add(who, pictures[who])
            for i, picture in enumerate(batch):
                near = picture_metrics.latent_cosine(latents["student"][i], latents["teacher"][i])
                record = self._record(picture, pictures["teacher"][i], pictures["student"][i])
                records.append({**record, "latent_cosine": near})
                if len(samples) < settings.samples and not self.cached:
                    one = {name: value[0] for name, value in conditions[picture.prompt].items()}
                    samples.append({"latent": latents["teacher"][i].cpu(), **one})
        sheet = grid([torch.stack(overview["teacher"]), torch.stack(overview["student"])])
        sheet.thumbnail((_OVERVIEW_SIDE, _OVERVIEW_SIDE))
        write_file(self.output / "grid.png", png(sheet))
        scores = {**self._pair_scores(records), **self._distance(samples), **self._set_scores(records)}
        return {
            "scores": scores,
            "absent": self.absent,
            "notes": self.notes,
            "seconds": _timing(seconds),
            "pictures": records,
        }

    # --- drawing ---

    def _count(self) -> int:
        return len(self.settings.prompts) * self.settings.seeds

    def _draw(
        self,
        tap: Any,
        condition: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        batch: list[_Picture],
        steps: int,
    ) -> Tensor:
        cells = self.settings.size // CELL
        seeds = [picture.seed for picture in batch]
        self.handle.tap = tap
        try:
            return self.sampler.draw(condition, negative, seeds, cells, cells, steps, self.settings.guidance)
        finally:
            self.handle.tap = None

    def _check_finite(self, who: str, latents: Tensor, batch: list[_Picture]) -> None:
        for latent, picture in zip(latents, batch, strict=True):
            if not bool(latent.isfinite().all()):
                dtype = str(self.sampler.transformer.dtype).removeprefix("torch.")
                raise EDiTError(
                    f"the {who}'s picture of {self.settings.prompts[picture.prompt]!r} (seed {picture.seed}) is not "
                    f"finite in {dtype}; try another dtype"
                )

    # --- scores ---

    def _record(self, picture: _Picture, teacher: Tensor, student: Tensor) -> dict[str, Any]:
        """Writes a picture's files; says what it is and how near."""
        difference = (student.int() - teacher.int()).abs().mul(_DIFFERENCE).clamp(max=255).byte()
        files = {}
        for name, pixels in (("teacher", teacher), ("student", student), ("difference", difference)):
            files[name] = f"pictures/{picture.number:05}_{name}.png"
            write_file(self.output / files[name], png(Image.fromarray(pixels.contiguous().numpy())))
        noise_ratio = picture_metrics.psnr(student, teacher)
        return {
            "prompt": self.settings.prompts[picture.prompt],
            "seed": picture.seed,
            "files": files,
            "psnr": noise_ratio if math.isfinite(noise_ratio) else None,
            "ssim": picture_metrics.ssim(student, teacher),
            "lpips": self.lpips(student, teacher) if self.lpips else None,
        }

    def _pair_scores(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for name in _PAIR_SCORES:
            values = [record[name] for record in records if record[name] is not None]
            scores[name] = statistics.fmean(values) if values else None
            if name == "psnr" and len(values) < len(records):
                same = len(records) - len(values)
                self.notes.append(
                    f"PSNR is infinite, and left out, for {same} of {len(records)} pictures: no difference"
                )
                if not values:
                    self.absent["psnr"] = "all pictures are the teacher's, so that it is infinite"
        return scores

    def _distance(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        size = self.settings.batch
        batches = self.cached or [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
        transformer, seed = self.sampler.transformer, _NOISE_SEED + self.settings.seed
        bar = progress(batches, len(batches), "attentions")
        found: Distance = teacher_distance(transformer, self.handle, self.backbone, bar, seed)
        if not all(map(math.isfinite, (found.prediction, *found.attentions.values()))):
            dtype = str(transformer.dtype).removeprefix("torch.")
            raise EDiTError(f"the student's error is not finite in {dtype}; try another dtype")
        if not found.attentions:
            self.absent["attention_error"] = "no attention was replaced"
        return {
            "prediction_error": found.prediction,
            "attention_error": statistics.fmean(found.attentions.values()) if found.attentions else None,
            "attentions": found.attentions,
        }

    def _set_scores(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        scores: dict[str, Any] = dict.fromkeys(("clip_score", "cmmd", "fid_clip", "fid_inception"))
        if self.clip is not None:
            features, size = self.features["clip"], self.settings.batch
            prompts = self.settings.prompts
            parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
            texts = torch.cat([self.clip.texts(part) for part in parts]).repeat_interleave(self.settings.seeds, 0)
            scores["clip_score"] = {
                who: picture_metrics.clip_score(features.of(who), texts) for who in ("teacher", "student")
            }
            scores["cmmd"] = features.compare(picture_metrics.cmmd)
        for name in ("clip", "inception"):
            if name in self.features:
                scores[f"fid_{name}"] = self._fid(name)
            else:
                missing = ("clip_score", "cmmd", "fid_clip") if name == "clip" else ("fid_inception",)
                self.absent.update(dict.fromkeys(missing, f"no --{name} was given"))
        return scores

    def _fid(self, name: str) -> dict[str, float] | None:
        features = self.features[name]
        counts = {who: len(features.of(who)) for who in features.found}
        fewest = min(counts.values())
        if fewest < 2:
            self.absent[f"fid_{name}"] = "it needs 2 pictures of each or more"
            return None
        dim = features.network.dim
        if fewest <= dim:
            self.notes.append(
                f"FID in {_TITLES[name]} features: {fewest} pictures do not determine a covariance of {dim} features, "
                "so it cannot be compared with a FID of other numbers of pictures"
            )
        found = features.compare(picture_metrics.fid)
        if 0 in found.values():
            self.notes.append(f"FID in {_TITLES[name]} features: 0 stands for what rounding left at 0 or below")
        return found


def cached_batches(data: CachedLatents, samples: int, batch: int) -> list[dict[str, Tensor]]:
    """Batches of one bucket each, of up to `samples` pictures that are spread evenly over a cache."""
    count = min(samples, len(data))
    chosen = [i * len(data) // count for i in range(count)]
    batches = []
    for span in data.buckets.values():
        inside = [index for index in chosen if index in span]
        batches += [data.collate(inside[i : i + batch]) for i in range(0, len(inside), batch)]
    return batches


def _collate(conditions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`(1, ...)` each -> `(B, ...)`."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def _timing(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratio = statistics.median(t / s for t, s in zip(seconds["teacher"], seconds["student"], strict=True))
    medians = {f"{who}_median": statistics.median(values) for who, values in seconds.items()}
    return {**medians, "ratio": ratio, **seconds}
