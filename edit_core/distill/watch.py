"""Looks at a training while it runs: the distance to the teacher, and pictures, on what is not trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backbones import Backbone
from ..hosts.diffusers import EDiTHandle
from .config import RunConfig
from .dataset import CachedLatents
from .distance import Distance, teacher_distance
from .losses import dense_tap
from .sampling import Sampler, grid
from .stages import Stage

__all__ = ["Watcher"]


class Watcher:
    """Measures and draws the student as its handle has it at the time; who calls sets autocast.

    Args:
        config: the training's.
        transformer: the teacher, with the student applied.
        handle: the student.
        backbone: what the teacher is of.
        empty_prompt: a sample's tensors of the empty prompt.

    Raises:
        EDiTModelError: pictures are wanted, and the teacher's folder has no VAE or scheduler that can be loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer: Any,
        handle: EDiTHandle,
        backbone: Backbone,
        empty_prompt: dict[str, Tensor],
    ) -> None:
        self.config, self.transformer, self.handle = config, transformer, handle
        self.backbone, self.empty_prompt = backbone, empty_prompt
        # Now, so that a VAE that is missing is known before the first step.
        self._sampler = Sampler(config.model, transformer) if config.watch.preview_every else None
        self._teachers: dict[int, Tensor] = {}

    def distance(self, data: CachedLatents, stage: Stage, batch: int) -> Distance:
        """The distance to the teacher on the held-out samples, `batch` at a time."""
        parts = [data.held_out[i : i + batch] for i in range(0, len(data.held_out), batch)]
        seed = self.config.seed
        return teacher_distance(
            self.transformer, self.handle, self.backbone, map(data.collate, parts), seed, stage.weighting, stage.shift
        )

    def picture(self, data: CachedLatents) -> Any:
        """A PIL image: held-out captions, the teacher's pictures above the student's of the same noise.

        Raises:
            ValueError: the configuration asks for no pictures.
        """
        watch = self.config.watch
        samples = data.collate(data.held_out[: watch.preview_pictures])
        if data.resolution not in self._teachers:  # they do not change
            self._teachers[data.resolution] = self._draw(samples, dense_tap)
        return grid([self._teachers[data.resolution], self._draw(samples, None)])

    def _draw(self, samples: dict[str, Tensor], tap: Any) -> Tensor:
        watch, sampler = self.config.watch, self._sampler
        if sampler is None:
            raise ValueError("preview_every=0 says that nothing is to be drawn")
        height, width = samples["latent"].shape[-2:]
        condition = {name: value for name, value in samples.items() if name != "latent"}
        negative = {name: self.empty_prompt[name].expand_as(value) for name, value in condition.items()}
        seeds = range(self.config.seed, self.config.seed + len(samples["latent"]))
        self.handle.tap = tap
        try:
            latents = sampler.draw(
                condition, negative, seeds, height, width, watch.preview_steps, watch.preview_guidance
            )
        finally:
            self.handle.tap = None
        return sampler.decode(latents)
