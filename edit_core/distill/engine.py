"""The training loop: stages, steps, checkpoints. One file to read from top to bottom.

A step's batch, noise and times are functions of the seed and the step's number alone. So a checkpoint need not hold
the state of any generator, a resumed run repeats what an uninterrupted one does, and the number of processes does not
change the numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..backbones import backbone_named
from ..errors import EDiTError, said
from ..hosts.diffusers import EDiTHandle, apply_edit
from ..runtime import DTYPES
from ..weights import EDiTWeights
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import RunConfig
from .dataset import BatchPlan, CachedLatents
from .journal import Journal
from .optimizer import Learner, make_optimizer
from .parallel import Processes
from .resuming import continue_from
from .stages import Stage, Student
from .teacher import load_teacher
from .watch import Watcher

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Engine:
    """One training, from its configuration to `student.safetensors`.

    Args:
        config: the whole configuration.

    Raises:
        EDiTError: the teacher or the cache cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EDiTError(f"{config.output} cannot be made ({error.strerror or error})") from None
        self.processes = Processes(config.device)
        self.device = self.processes.device
        held_out = config.watch.held_out
        self.data = [CachedLatents(config.cache, stage.resolution, held_out=held_out) for stage in config.stages]
        for data, stage in zip(self.data, config.stages, strict=True):
            self._plan(data, stage, 0)  # a stage that cannot run is known now, not hours later
        self.transformer = load_teacher(config.model, DTYPES[config.precision], torch.device("cpu"))
        self.weights = EDiTWeights.init(
            self.transformer, config.edit_config(), config.layers, config.seed, config.trainable, config.rank
        )
        cached = self.data[0].backbone
        if cached != self.weights.backbone:
            raise EDiTError(f"{config.cache} was made for {cached}, but the teacher is {self.weights.backbone}")
        self.handle: EDiTHandle = apply_edit(self.transformer, self.weights)
        for trained in (self.handle.sides, self.handle.differences):
            trained.to(self.device, torch.float32).requires_grad_(True)
        self.parameters = self.handle.trainable()
        if self.processes.sharded:
            self.processes.shard(self.transformer, self.parameters.values())
        self.transformer.to(self.device)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        self.stage_index = 0
        self.step = 0
        """Within the stage."""
        self.total = 0
        """Over all stages."""
        self.skipped = 0
        """Steps that were not finite; float16's loss scaling finds its scale by a few of them now and then."""
        self.skipped_in_a_row = 0
        self.resumed: list[dict[str, Any]] = []
        """What was changed where the run went on, and after which step."""
        self.stopping = False
        optimizer = self._optimizer(config.stages[0])
        self.learner = Learner(self.parameters, optimizer, self.device, scaled=config.precision == "float16")
        empty_prompt, dtype = CachedLatents.empty_prompt(config.cache), DTYPES[config.precision]
        backbone = backbone_named(self.weights.backbone)
        self.student = Student(self.transformer, self.handle, backbone, self.learner, empty_prompt, self.device, dtype)
        self.watcher = Watcher(config, self.transformer, self.handle, backbone, empty_prompt)

    # --- the loop ---

    def run(self) -> Path:
        """Trains to the end, or until told to stop; returns the student's file, or the last checkpoint's folder.

        Raises:
            EDiTError: too many steps in a row were not finite, the output cannot be written, or the device's memory
                does not suffice; the checkpoints so far are intact.
        """
        try:
            journal = Journal(self.config.output, self.total) if self.processes.first else None
            try:
                with self._stop_on_signals():
                    self._run_stages(journal)
                    if self.stage_index < len(self.config.stages):
                        return self.save()  # in here, so that a second signal does not end it
            finally:
                if journal:
                    journal.close()
            return self.export()
        except OSError as error:
            raise EDiTError(
                f"{self.config.output} cannot be written to at step {self.total} ({error.strerror or error}); the "
                "checkpoints so far are intact: make room and go on with --resume latest"
            ) from None
        except torch.OutOfMemoryError as error:
            raise EDiTError(
                f"the device's memory does not suffice after step {self.total} ({said(error)}); raise the accumulation "
                "of that stage, or set watch.preview_every=0 if it was drawing, and go on with --resume latest"
            ) from None

    def _run_stages(self, journal: Journal | None) -> None:
        while self.stage_index < len(self.config.stages):
            if self._run_stage(self.config.stages[self.stage_index], journal):
                return
            self.stage_index, self.step = self.stage_index + 1, 0
            if self.stage_index < len(self.config.stages):
                self.learner.optimizer = self._optimizer(self.config.stages[self.stage_index])
            self.save()

    def _run_stage(self, stage: Stage, journal: Journal | None) -> bool:
        """Says whether it was told to stop, which all processes agree on after a step, and not on a signal alone."""
        data = self.data[self.stage_index]
        plan = self._plan(data, stage, self._seed("plan"))
        batches = read_ahead(lambda step: data.collate(plan.batch(step)), range(self.step, stage.steps))
        quiet = None if self.processes.first else True  # None: quiet where stderr is no terminal
        label = f"{stage.kind} {stage.resolution}"
        with tqdm(batches, label, stage.steps, leave=False, initial=self.step, disable=quiet) as bar:
            for step, batch in bar:
                start = time.perf_counter()
                for group in self.learner.optimizer.param_groups:
                    group["lr"] = stage.lr * group["share"] * stage.rate(step)
                losses = self._train_step(stage, batch)
                finite = self._update(stage, losses)
                self.step, self.total = step + 1, self.total + 1
                values = {name: float(value) for name, value in losses.items()}
                seconds = time.perf_counter() - start
                bar.set_postfix(loss=f"{values['loss']:.4g}", pictures=f"{stage.batch_size / seconds:.2f}/s")
                if journal:
                    where = {"step": self.total, "stage": self.stage_index, "kind": stage.kind, "finite": finite}
                    lr = self.learner.optimizer.param_groups[0]["lr"]
                    journal.write({**where, **values, "lr": lr, "seconds": seconds, "memory": self._memory()})
                self._look(stage, data, journal)
                if self.processes.any(self.stopping):
                    return True
                if self.step % self.config.checkpoint_every == 0 and self.step < stage.steps:
                    self.save()
        return False

    def _plan(self, data: CachedLatents, stage: Stage, seed: int) -> BatchPlan:
        world = self.processes.world
        if stage.batch_size % (world * stage.accumulation):
            raise EDiTError(
                f"batch_size={stage.batch_size} is not a multiple of accumulation={stage.accumulation} times "
                f"{world} processes"
            )
        return BatchPlan(data, stage.batch_size, seed, world, self.processes.rank)

    def _train_step(self, stage: Stage, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds a step's gradients up, over this process's part of the batch; returns its losses, detached."""
        self.learner.begin()
        share = stage.batch_size // self.processes.world
        size = share // stage.accumulation
        found: list[dict[str, Tensor]] = []
        for i in range(stage.accumulation):
            part = {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
            first = self.processes.rank * share + i * size
            generators = [self._generator("noise", self.step, first + j) for j in range(size)]
            with self._autocast():
                found.append(stage.losses(self.student, part, generators))
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def _update(self, stage: Stage, losses: dict[str, Tensor]) -> bool:
        """Takes the optimiser's step unless something is not finite; says whether it did. `losses` become all's."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.processes.average([*gradients, *losses.values()])
        losses["gradient"], finite = self.learner.finish(losses["loss"], stage.clip)
        if finite:
            self.skipped_in_a_row = 0
            taken = self.total + 1 - self.skipped
            decay = min(self.config.ema, (1 + taken) / (10 + taken))
            if self.ema:
                with torch.no_grad():
                    trained: list[Tensor] = [self.parameters[name] for name in self.ema]
                    torch._foreach_lerp_(list(self.ema.values()), trained, 1 - decay)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row > self.config.max_skipped:
                raise EDiTError(
                    f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at "
                    f"step {self.total}. "
                    f"The last good checkpoint is in {self.config.output / 'checkpoints'}; try a lower lr or bfloat16"
                )
        return finite

    # --- looking at it ---

    def _look(self, stage: Stage, data: CachedLatents, journal: Journal | None) -> None:
        """Measures and draws the student that would be published, when it is time; every process takes part."""
        watch = self.config.watch
        where = {"step": self.total, "stage": self.stage_index, "kind": "evaluate"}
        if watch.evaluate_every and self.total % watch.evaluate_every == 0:
            size = stage.batch_size // (self.processes.world * stage.accumulation)
            with self._published(), self._autocast():
                distance = self.watcher.distance(data, stage, size)
            if journal:
                figures = {"attention": distance.mean_attention, "prediction": distance.prediction}
                journal.write({**where, **figures, **distance.attentions})
        if watch.preview_every and self.total % watch.preview_every == 0:
            with self._published(), self._autocast():
                picture = self.watcher.picture(data)
            if journal:
                journal.picture(picture, self.total)

    @contextmanager
    def _published(self) -> Iterator[None]:
        """The averaged weights, if there are any, in place of the trained ones."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, average in self.ema.items():
            parameter = self.parameters[name]
            parameter.data, self.ema[name] = average, parameter.data

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, DTYPES[self.config.precision], enabled=self.config.precision != "float32"
        )

    def _memory(self) -> float:
        """In GB: the most that was held of the device so far, or what the process holds of a CPU's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return psutil.Process().memory_info().rss / 1e9

    # --- keeping and giving ---

    def save(self) -> Path:
        """Writes a checkpoint of everything that the rest of the run depends on; returns its folder."""
        folder = self.config.output / "checkpoints"
        if self.processes.first:
            save_checkpoint(folder, self.total, self._checkpoint_tensors(), self._state(), self.config.keep_checkpoints)
        self.processes.wait()
        return folder / f"{self.total:08d}"

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"weights.{name}": p for name, p in self.parameters.items()}
        tensors.update({f"ema.{name}": t for name, t in self.ema.items()})
        names = list(self.parameters)
        # bitsandbytes' own state_dict nests its tensors for a kind of FSDP that is not used here.
        for index, moments in torch.optim.Optimizer.state_dict(self.learner.optimizer)["state"].items():
            for key, value in moments.items():
                shared = key.startswith("qmap")  # of bitsandbytes, one for all weights; safetensors wants one each
                tensors[f"optimizer.{names[index]}.{key}"] = value.clone() if shared else torch.as_tensor(value)
        return tensors

    def _state(self) -> dict[str, Any]:
        groups = self.learner.optimizer.state_dict()["param_groups"]
        return {
            "version": __version__,
            "stage": self.stage_index,
            "step": self.step,
            "total": self.total,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "resumed": self.resumed,
            "groups": [{k: _plain(v) for k, v in g.items() if k != "params"} for g in groups],
            "scaler": self.learner.scaler.state_dict(),
            "config": json.loads(self.config.model_dump_json()),
            "weights": self._described().metadata(),
        }

    def resume(self) -> bool:
        """Goes on from the newest checkpoint; False where there is none.

        Raises:
            EDiTError: it is damaged, of another student or teacher, or changed where it is too late.
        """
        path = latest_checkpoint(self.config.output / "checkpoints")
        if path is None:
            return False
        tensors, state = load_checkpoint(path)
        now, data = json.loads(self.config.model_dump_json()), CachedLatents.describe(self.config.cache)
        where = continue_from(path, state, now, self.weights.base_hash, data)
        if where.changed and self.processes.first:
            logger.warning("going on from step %s with %s", state["total"], where)
        shapes = {name: tensors[key].shape for name in self.parameters if (key := f"weights.{name}") in tensors}
        if shapes != {name: parameter.shape for name, parameter in self.parameters.items()}:
            raise EDiTError(f"{path} was made with another model, of other shapes; choose another output folder")
        self.stage_index, self.step, self.total, self.resumed = where.stage, where.step, state["total"], where.notes
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                if name in self.ema:
                    self.ema[name].copy_(tensors[f"ema.{name}"])
        if self.stage_index < len(self.config.stages):
            self.learner.optimizer = self._optimizer(self.config.stages[self.stage_index])
            if not where.fresh:
                self._restore_optimizer(tensors, state["groups"])
        self.learner.scaler.load_state_dict(state["scaler"])
        self.processes.wait()  # a run that stopped at a stage's end writes this checkpoint anew before its next step
        return True

    def _restore_optimizer(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.parameters):
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if moments:
                state[index] = moments
        fresh = self.learner.optimizer.state_dict()["param_groups"]
        if not state:  # the checkpoint closed a stage: the next one begins with an optimiser of its own
            return
        kept = ("params", "share", "weight_decay")  # the configuration's, which may have changed since
        merged = [
            {**old, **saved, **{name: old[name] for name in kept}} for old, saved in zip(fresh, groups, strict=True)
        ]
        self.learner.optimizer.load_state_dict({"state": state, "param_groups": merged})

    def export(self) -> Path:
        """Writes the student, averaged if there is an average, as an EDiT weights file."""
        path = self.config.output / "student.safetensors"
        if self.processes.first:
            best = self.ema or self.parameters
            student = replace(self._described(), tensors={name: t.detach().cpu().clone() for name, t in best.items()})
            student.save(path)
        self.processes.wait()
        return path

    def _described(self) -> EDiTWeights:
        """The weights with what a file says of their training; no paths, since files are published."""
        return replace(
            self.weights,
            training={
                "recipe": json.loads(self.config.model_dump_json(exclude={"model", "cache", "output"})),
                "steps": self.total,
                "data": CachedLatents.describe(self.config.cache),
                "tool_version": __version__,
                **({"resumed": self.resumed} if self.resumed else {}),
            },
        )

    # --- small parts ---

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(self.parameters, stage.lr, config.base_lr, config.optimizer, config.weight_decay)

    def _seed(self, *parts: Any) -> int:
        text = json.dumps([self.config.seed, self.stage_index, *parts])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def _generator(self, *parts: Any) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*parts))

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint."""

        def stop(*_: Any) -> None:
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _plain(value: Any) -> Any:
    """A value of an optimiser's group for JSON, which keeps floats exactly."""
    return value.item() if isinstance(value, Tensor) else value


def read_ahead(read: Callable[[int], T], steps: range) -> Iterator[tuple[int, T]]:
    """Yields each step with what `read` gives for it; the next is read while the last is in use."""
    if not steps:
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, steps[0])
        for step in steps:
            found = coming.result()
            if step + 1 in steps:
                coming = reader.submit(read, step + 1)
            yield step, found
