"""Which blocks to make linear: their errors and times, measured, and the sets of them that trade one for the other.

Or to make piecewise, which needs no weights; what is said of linear blocks is meant of these, too.

A block's error is that of the student's *prediction* with this block alone linear, which takes as many passes as there
are blocks. The error of its attentions on the teacher's inputs, which a `transfer` stage trains and one pass gives for
all, is noted beside it but not gone by: it says how well an attention is imitated, not how much depends on it. Nor do
errors simply add up. So the blocks are ordered by error per second saved, the first one, two, three … of them are
measured as a whole, and the choice is among what was measured. All of this is ours; the paper makes every block linear.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.forms import KERNELS
from ..backbones import backbone_named, identify_module
from ..bench import device_name
from ..config import EDiTConfig
from ..errors import EDiTError
from ..hosts.diffusers import EDiTHandle, apply_edit
from ..layers import format_layers
from ..models import random_inputs
from ..runtime import progress, timed
from ..weights import EDiTWeights, fingerprint, weights_for
from .distance import Distance, teacher_distance
from .losses import dense_tap

__all__ = [
    "DEFAULT_BUDGET",
    "BlockCost",
    "Choice",
    "Plan",
    "Times",
    "call_times",
    "make_plan",
    "measure_times",
    "step_speed",
]

DEFAULT_BUDGET = 0.02
"""Ours, and not tried on a real teacher: a fiftieth of the prediction's mean square."""


@dataclass(frozen=True)
class Times:
    """Medians, in seconds, of one picture."""

    dense: dict[int, float]
    """By block: its attentions as the teacher has them, projections included."""
    linear: dict[int, float]
    """By block: the same as EDiT."""
    teacher: float
    """A whole call of the transformer."""
    student: float
    """A whole call with every block linear that there are weights for."""


@dataclass(frozen=True)
class BlockCost:
    """What making one block linear costs and saves."""

    block: int
    error: float
    """Of the prediction, with this block alone linear: squared, relative to the teacher's mean square."""
    attention: float
    """Of its attentions on the teacher's inputs, likewise; their mean where there are two."""
    dense: float
    """Seconds."""
    linear: float
    """Seconds."""

    @property
    def saving(self) -> float:
        return self.dense - self.linear


@dataclass(frozen=True)
class Choice:
    """A set of blocks and what it comes to."""

    layers: str
    """As `apply_edit` takes it."""
    error: float
    """Of the prediction, measured with these blocks linear."""
    speed: float
    """How many times as fast as the teacher, by the sum of the blocks' savings."""


@dataclass(frozen=True)
class Plan:
    """What was measured, and what follows from it."""

    backbone: str
    form: str
    """What the chosen blocks become: `linear`, or the name of another form."""
    size: int
    """Pixels per side of the square picture that was timed."""
    dtype: str
    device: str
    pictures: int
    """How many noised pictures the errors are means over."""
    goal: str
    times: Times
    blocks: list[BlockCost]
    curve: list[Choice]
    """One more block each."""
    chosen: Choice
    measured_speed: float
    """Of the chosen set, over whole calls."""

    def to_json(self) -> dict[str, Any]:
        return {"layers": self.chosen.layers, **asdict(self)}

    def __str__(self) -> str:
        times, form = self.times, self.form
        wide = max(10, len(f"{form} ms"))
        lines = [
            f"{backbone_named(self.backbone).title}, {self.size}² pixels, {self.dtype}, {self.device}; errors over "
            f"{self.pictures} noised pictures",
            f"a call: teacher {1e3 * times.teacher:.2f} ms, all of these blocks {form} {1e3 * times.student:.2f} ms, "
            f"{times.teacher / times.student:.2f}×",
            "",
            f"block      error  attention   dense ms {f'{form} ms':>{wide}}  saving ms",
        ]
        for cost in self.blocks:
            times_of = f"{1e3 * cost.dense:10.3f} {1e3 * cost.linear:{wide}.3f} {1e3 * cost.saving:10.3f}"
            lines.append(f"{cost.block:5} {cost.error:10.3g} {cost.attention:10.3g} {times_of}")
        lines += ["", "     error    speed  blocks"]
        lines += [f"{point.error:10.3g} {point.speed:7.2f}×  {point.layers}" for point in self.curve]
        if slow := [cost.block for cost in self.blocks if cost.saving <= 0]:
            lines.append(f"blocks {format_layers(slow)} stay dense: {form} attention is not faster there")
        if self.chosen.layers == "none":
            outcome = f"no block can be made {form}"
        else:
            outcome = (
                f"prediction error {self.chosen.error:.3g}; speed {self.chosen.speed:.2f}× by the blocks' times, "
                f"{self.measured_speed:.2f}× measured"
            )
        return "\n".join([*lines, "", f"{self.goal}: {outcome}", f"layers: {self.chosen.layers}"])


def make_plan(
    transformer: Any,
    student: EDiTWeights | EDiTConfig,
    batches: Sequence[Mapping[str, Tensor]],
    size: int,
    *,
    budget: float | None = None,
    speed: float | None = None,
    repeats: int = 5,
    seed: int = 0,
    shift: float = 1.0,
) -> Plan:
    """Chooses the most blocks that stay within an error, or the least error that reaches a speed.

    A block that is not faster when linear is never chosen.

    Args:
        transformer: the teacher, a diffusers transformer; it is left as it was.
        student: its weights; only blocks that they hold can be made linear. Or a config that needs none.
        batches: as :meth:`CachedLatents.collate` gives them, with `latent (B, c, h, w)`.
        size: pixels per side of the square pictures to be fast at.
        budget: highest prediction error, squared and relative to the teacher's mean square. Without this and `speed`,
            it is :data:`DEFAULT_BUDGET`.
        speed: how many times as fast as the teacher to be, by the blocks' times; `budget` does not count then.
        repeats: timed passes, after one to warm up.
        seed: seeds noise and times; all sets of blocks see the same.
        shift: of SD3.5's times towards noise.

    Raises:
        EDiTError: bad numbers, a size that the transformer cannot draw, or a speed that no set reaches.
        EDiTWeightsError: the weights do not fit the transformer.
    """
    if repeats < 1 or not batches:
        raise EDiTError("a plan needs at least one repeat and one batch of pictures")
    goal = _goal(budget, speed, size)
    weights = weights_for(identify_module(transformer), student)
    times = measure_times(transformer, weights, size, repeats)
    sets = _Sets(transformer, weights, batches, seed, shift)
    trade = _Trade(sets, times)
    prefixes = trade.prefixes(goal)
    curve = [trade.choice(blocks) for blocks in progress(prefixes, len(prefixes), "sets of blocks")]
    chosen = goal.choose(trade, prefixes)
    return Plan(
        backbone=weights.backbone,
        form=_form(weights.config),
        size=size,
        dtype=str(transformer.dtype).removeprefix("torch."),
        device=device_name(transformer.device),
        pictures=sum(len(batch["latent"]) for batch in batches),
        goal=str(goal),
        times=times,
        blocks=trade.costs,
        curve=curve,
        chosen=chosen,
        measured_speed=step_speed(transformer, sets.weights, size, repeats, chosen.layers),
    )


class _Sets:
    """Sets of blocks and how far the student is from the teacher with each of them, measured once."""

    def __init__(
        self,
        transformer: Any,
        weights: EDiTWeights,
        batches: Sequence[Mapping[str, Tensor]],
        seed: int,
        shift: float,
    ) -> None:
        # `measure_times` has said already whether the base is another one, and need not say so for every set.
        base, state = identify_module(transformer), transformer.state_dict()
        self.weights = weights
        if weights.tensors:
            self.weights = replace(weights, base_hash=fingerprint(base, state.__getitem__))
        self.transformer, self.batches, self.seed, self.shift = transformer, batches, seed, shift
        self._errors: dict[frozenset[int], float] = {frozenset(): 0.0}

    def error(self, blocks: Iterable[int]) -> float:
        """Of the prediction, these blocks being linear."""
        known = frozenset(blocks)
        if known not in self._errors:
            self.distance(known)
        return self._errors[known]

    def distance(self, blocks: Iterable[int]) -> Distance:
        blocks = frozenset(blocks)
        with apply_edit(self.transformer, self.weights, format_layers(blocks)) as handle:
            found = teacher_distance(
                self.transformer,
                handle,
                backbone_named(self.weights.backbone),
                self.batches,
                self.seed,
                shift=self.shift,
            )
        if not math.isfinite(found.prediction):
            raise EDiTError(
                f"with blocks {format_layers(blocks)} {_form(self.weights.config)} the prediction is not finite in "
                f"{self.transformer.dtype}; "
                "use bfloat16 or float32, or leave them out of the weights"
            )
        self._errors[blocks] = found.prediction
        return found


class _Trade:
    """What sets of blocks cost in error and save in time.

    Args:
        sets: measures their errors; every block is measured by itself at once.
        times: of the blocks and of whole calls.
    """

    def __init__(self, sets: _Sets, times: Times) -> None:
        self.sets, self.teacher = sets, times.teacher
        attentions = sets.distance(sets.weights.sites).attentions
        self.costs: list[BlockCost] = []
        for block in progress(sets.weights.sites, len(sets.weights.sites), "blocks"):
            sites = [error for key, error in attentions.items() if int(key.split(".")[0]) == block]
            found = sets.error([block]), statistics.mean(sites), times.dense[block], times.linear[block]
            self.costs.append(BlockCost(block, *found))

    def speed(self, blocks: Iterable[int]) -> float:
        """How many times as fast as the teacher these blocks make it, by their times."""
        linear = [cost for cost in self.costs if cost.block in blocks]
        left = self.teacher - sum(cost.saving for cost in linear)
        return self.teacher / max(left, sum(cost.linear for cost in linear))  # however unsteady the clock

    def choice(self, blocks: Sequence[int]) -> Choice:
        return Choice(format_layers(blocks), self.sets.error(blocks), self.speed(blocks))

    def prefixes(self, goal: _Within | _Reaching) -> list[list[int]]:
        """One more block each: those that save time, by error per second saved, and last those that alone are too much
        for the goal."""
        faster = [cost for cost in self.costs if cost.saving > 0]
        faster.sort(key=lambda cost: (not goal.allows(cost.error), cost.error / cost.saving))
        order = [cost.block for cost in faster]
        return [order[: count + 1] for count in range(len(order))]


@dataclass(frozen=True)
class _Within:
    """The most blocks that stay within an error."""

    budget: float
    note: str = ""

    def __str__(self) -> str:
        return f"budget {self.budget:g}{self.note}"

    def allows(self, error: float) -> bool:
        return error <= self.budget

    def choose(self, trade: _Trade, prefixes: Sequence[Sequence[int]]) -> Choice:
        points = map(trade.choice, reversed(prefixes))
        return next((point for point in points if self.allows(point.error)), trade.choice([]))


@dataclass(frozen=True)
class _Reaching:
    """The least error that reaches a speed."""

    speed: float
    size: int

    def __str__(self) -> str:
        return f"speed {self.speed:g}×"

    def allows(self, error: float) -> bool:
        return True

    def choose(self, trade: _Trade, prefixes: Sequence[Sequence[int]]) -> Choice:
        """Among the sets that reach it, and the first of them without what it can spare.

        Raises:
            EDiTError: none does.
        """
        fast = [blocks for blocks in prefixes if trade.speed(blocks) >= self.speed]
        if not fast:
            every, form = prefixes[-1] if prefixes else [], _form(trade.sets.weights.config)
            raise EDiTError(
                f"a speed of {self.speed:g}× cannot be reached at {self.size}² pixels here: blocks "
                f"{format_layers(every)}, all that are faster when {form}, make it {trade.speed(every):.2f}×"
            )
        sets = [*fast, self._without_spare(fast[0], trade)]
        return min(map(trade.choice, sets), key=lambda point: point.error)

    def _without_spare(self, blocks: Sequence[int], trade: _Trade) -> list[int]:
        """What is left when blocks that are not needed are made dense again, those of largest error first."""
        kept = list(blocks)
        for cost in sorted(trade.costs, key=lambda cost: -cost.error):
            rest = [block for block in kept if block != cost.block]
            if trade.speed(rest) >= self.speed:
                kept = rest
        return kept


def _form(config: EDiTConfig) -> str:
    """What to call blocks that have this attention."""
    return config.kernel if KERNELS[config.kernel].as_is else "linear"


def _goal(budget: float | None, speed: float | None, size: int) -> _Within | _Reaching:
    """Checks the two numbers; a budget does not count beside a speed."""
    if budget is not None and not budget >= 0:
        raise EDiTError(f"a budget of {budget:g} cannot be: an error is at least 0")
    if speed is not None:
        if not speed > 1:
            raise EDiTError(f"a speed of {speed:g}× needs no plan: the teacher's own is 1×")
        return _Reaching(speed, size)
    return _Within(budget) if budget is not None else _Within(DEFAULT_BUDGET, " (the default)")


@torch.inference_mode()
def measure_times(transformer: Any, weights: EDiTWeights, size: int, repeats: int) -> Times:
    """Times every attention in its place, dense and linear in alternation, and whole calls.

    Args:
        transformer: a diffusers transformer that the weights fit.
        weights: for the blocks to time.
        size: pixels per side of a square picture of noise.
        repeats: timed passes, after one to warm up.

    Raises:
        EDiTError: the transformer cannot draw that size.
        EDiTWeightsError: the weights do not fit.
    """
    inputs = random_inputs(transformer, backbone_named(weights.backbone), size, batch=1)
    with apply_edit(transformer, weights) as handle:
        watch = _Stopwatch(transformer.device)
        handle.tap = watch
        for turn in range(repeats + 1):
            watch.linear_first = bool(turn % 2)
            transformer(**inputs)
            if turn == 0:
                watch.seconds.clear()
        medians = {key: statistics.median(values) for key, values in watch.seconds.items()}
        teacher, student = call_times(transformer, handle, inputs, repeats)

    def of_blocks(kind: str) -> dict[int, float]:
        return {
            block: sum(medians[kind, f"{block}.{site}"] for site in sites) for block, sites in weights.sites.items()
        }

    return Times(of_blocks("dense"), of_blocks("linear"), teacher, student)


@torch.inference_mode()
def step_speed(transformer: Any, weights: EDiTWeights, size: int, repeats: int, layers: str) -> float:
    """How many times as fast as the teacher whole calls are with these blocks linear, measured in alternation.

    Raises:
        EDiTError: as :func:`measure_times` and :func:`~edit_core.apply_edit` do.
    """
    with apply_edit(transformer, weights, layers) as handle:
        inputs = random_inputs(transformer, backbone_named(weights.backbone), size, batch=1)
        teacher, student = call_times(transformer, handle, inputs, repeats)
    return teacher / student


def call_times(transformer: Any, handle: EDiTHandle, inputs: dict[str, Any], repeats: int) -> tuple[float, float]:
    """Median seconds of whole calls of the teacher and of the applied student, in alternation."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(repeats + 1):
        for dense in (True, False):
            handle.tap = dense_tap if dense else None
            _, seconds = timed(lambda: transformer(**inputs), transformer.device)
            if turn:  # the first pair warms up
                found[dense].append(seconds)
    return statistics.median(found[True]), statistics.median(found[False])


class _Stopwatch:
    """Times both calls of every attention; the pass goes on with the teacher's output."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.linear_first = False
        self.seconds: dict[tuple[str, str], list[float]] = {}
        """By `dense` or `linear`, and `<block>.<site>`."""

    def __call__(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        calls = {"dense": dense, "linear": edit}
        outputs = {}
        for kind in sorted(calls, reverse=self.linear_first):
            outputs[kind], seconds = timed(calls[kind], self.device)
            self.seconds.setdefault((kind, key), []).append(seconds)
        return outputs["dense"]
