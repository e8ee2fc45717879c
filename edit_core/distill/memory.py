"""What a training will hold in memory, worked out from the headers of the teacher's files before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..backbones import Base, BaseLinear
from ..basefile import BaseFile
from ..layers import parse_layers
from ..runtime import DTYPES
from ..weights import build_sides
from .config import RunConfig
from .stages import Stage, TransferStage

__all__ = ["Estimate", "estimate"]

_WORKING = 24  # of what a block holds while it runs without a graph: MLP, projections, the teacher's attention
_STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # bytes of optimiser state per trained weight
# Of previews: the VAE, and what its decoder holds per pixel of the one picture that it works on, both in float32;
# counted on SDXL's, whose decoder SD3.5's shares.
_VAE, _DECODER = 335_000_000, 4000


@dataclass(frozen=True)
class Estimate:
    """Bytes per process at the peak of a stage's step."""

    stage: str
    base: int
    """The teacher's weights, and its VAE's where pictures are drawn."""
    trained: int
    """Trained weights with gradients, average and optimiser state."""
    activations: int
    previews: int = 0
    """While pictures are drawn and decoded, which is when no step is under way."""

    @property
    def total(self) -> int:
        return self.base + self.trained + max(self.activations, self.previews)

    def __str__(self) -> str:
        parts = (self.total, self.base, self.trained, self.activations, self.previews)
        total, base, trained, activations, previews = (f"{part / 1e9:.1f}" for part in parts)
        most = f"activations {activations}"
        if self.previews > self.activations:
            most = f"previews {previews} (a step's {most})"
        return f"{self.stage}: {total} GB = base {base} + trained {trained} + {most}"


def estimate(config: RunConfig, world: int = 1, sharded: bool = False) -> list[Estimate]:
    """One estimate per stage (ours; kernels' workspaces and the allocator's slack come on top, a few tenths).

    Args:
        config: the training's.
        world: processes that share it.
        sharded: whether they split the base (FSDP).

    Raises:
        EDiTModelError: the teacher's files cannot be read, or are of no model that EDiT knows.
    """
    file = BaseFile(config.model)
    base = file.identify()
    element = DTYPES[config.precision].itemsize
    weights = sum(math.prod(shape) for shape in file.shapes.values()) * element // (world if sharded else 1)
    blocks = parse_layers(config.layers, base.depth)
    sites = {block: base.sites[block] for block in blocks}
    side = build_sides(base.dim, sites, config.edit_config(), device=torch.device("meta"))
    count = sum(p.numel() for p in side.parameters())
    if config.trainable != "side":
        rank = config.rank if config.trainable == "low_rank" else None
        count += sum(_difference(base, linear, rank) for block in blocks for linear in base.linears(block))
    trained = count * (4 + 4 + (4 if config.ema else 0) + _STATES[config.optimizer])
    attentions = sum(len(names) for names in sites.values())
    return [
        Estimate(
            f"{stage.kind} at {stage.resolution}, {_micro_batch(stage, world)} pictures at a time",
            weights + (_VAE if config.watch.preview_every else 0),
            trained,
            _activations(stage, world, base, attentions) * base.dim * element // 2,
            _previews(config, stage, base.backbone.token, base.dim * element // 2),
        )
        for stage in config.stages
    ]


def _activations(stage: Stage, world: int, base: Base, attentions: int) -> int:
    """Bytes per channel."""
    tokens = _micro_batch(stage, world) * (stage.resolution // base.backbone.token) ** 2
    real = base.backbone.real
    if isinstance(stage, TransferStage):
        return tokens * (real.attention_graph + _WORKING)
    if stage.guidance:
        tokens *= 2
    kept = 2 * attentions  # the teacher's attention outputs
    if stage.gradient_checkpointing:
        return tokens * (kept + 2 * base.depth + real.block_graph + _WORKING)
    return tokens * (kept + real.block_graph * base.depth + _WORKING)


def _previews(config: RunConfig, stage: Stage, side: int, channels: int) -> int:
    watch = config.watch
    if not watch.preview_every:
        return 0
    drawn = 2 * min(watch.preview_pictures, watch.held_out) * (stage.resolution // side) ** 2  # tokens, guided
    return max(_WORKING * drawn * channels, _DECODER * stage.resolution**2)


def _difference(base: Base, linear: BaseLinear, rank: int | None) -> int:
    """Numbers in a difference on a linear, in full where it has no rank."""
    rows, columns = base.shape(linear.name)
    return rows * columns + rows * linear.bias if rank is None else (rows + columns) * rank


def _micro_batch(stage: Stage, world: int) -> int:
    return max(1, stage.batch_size // (world * stage.accumulation))
