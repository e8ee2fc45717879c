"""The training loop: stages, steps, checkpoints. One file to read from top to bottom.

A step's batch, noise and times are functions of the seed and the step's number alone. So a checkpoint need not hold
the state of any generator, a resumed run repeats what an uninterrupted one does, and the number of processes does not
change the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..apply import EDiTHandle, apply_edit
from ..errors import EDiTError, EDiTModelError
from ..runtime import DTYPES, progress, usable_device
from ..weights import EDiTWeights
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import DistillStage, RunConfig, Stage, TransferStage
from .dataset import BatchPlan, CachedLatents
from .losses import FeatureTap, TransferTap
from .objective import call_arguments, noise_batch, prediction, task_target

__all__ = ["Engine"]


class Engine:
    """One training, from its configuration to `student.safetensors`.

    Args:
        config: the whole configuration.

    Raises:
        EDiTError: the teacher or the cache cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        self.data = [CachedLatents(config.cache, stage.resolution) for stage in config.stages]
        for data, stage in zip(self.data, config.stages, strict=True):
            BatchPlan(data, stage.batch_size, seed=0)  # a stage that cannot run is known now, not hours later
        self.transformer = load_teacher(config.model, DTYPES[config.precision], self.device)
        initial = EDiTWeights.init(self.transformer, config.edit_config(), config.layers, config.seed)
        cached = self.data[0].backbone
        if cached != initial.backbone:
            raise EDiTError(f"{config.cache} was made for {cached}, but the teacher is {initial.backbone}")
        self.weights = initial
        self.handle: EDiTHandle = apply_edit(self.transformer, initial)
        self.handle.sides.float().requires_grad_(True)
        self.parameters = dict(self.handle.sides.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        self.stage_index = 0
        self.step = 0
        """Within the stage."""
        self.total = 0
        """Over all stages."""
        self.skipped = 0
        """Steps that were not finite; float16's loss scaling finds its scale by a few of them now and then."""
        self.skipped_in_a_row = 0
        self.stopping = False
        self.optimizer = self._optimizer(config.stages[0])
        self.empty_prompt = CachedLatents.empty_prompt(config.cache)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        config.output.mkdir(parents=True, exist_ok=True)

    # --- the loop ---

    def run(self) -> Path:
        """Trains to the end, or until told to stop; returns the student's file, or the last checkpoint's folder."""
        with self._stop_on_signals(), (self.config.output / "metrics.jsonl").open("a", encoding="utf-8") as log:
            while self.stage_index < len(self.config.stages):
                stage = self.config.stages[self.stage_index]
                self._run_stage(stage, log)
                if self.stopping:
                    return self.save()
                self.stage_index, self.step = self.stage_index + 1, 0
                if self.stage_index < len(self.config.stages):
                    self.optimizer = self._optimizer(self.config.stages[self.stage_index])
                self.save()
        return self.export()

    def _run_stage(self, stage: Stage, log: Any) -> None:
        data = self.data[self.stage_index]
        plan = BatchPlan(data, stage.batch_size, seed=self._seed("plan"))
        label = f"{stage.kind} {stage.resolution}"
        for _ in progress(range(self.step, stage.steps), stage.steps - self.step, label):
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = stage.lr * rate(stage, self.step)
            losses = self._train_step(stage, data.collate(plan.batch(self.step)))
            finite = self._update(stage, losses)
            self.step, self.total = self.step + 1, self.total + 1
            record: dict[str, Any] = {
                "step": self.total,
                "stage": self.stage_index,
                "kind": stage.kind,
                "finite": finite,
            }
            record.update({name: float(value) for name, value in losses.items()})
            record.update(lr=self.optimizer.param_groups[0]["lr"], seconds=time.perf_counter() - start)
            log.write(json.dumps(record) + "\n")
            log.flush()
            if self.step % self.config.checkpoint_every == 0 and self.step < stage.steps:
                self.save()
            if self.stopping:
                return

    def _train_step(self, stage: Stage, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds a step's gradients up; returns its losses, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        size = stage.batch_size // stage.accumulation
        found: list[dict[str, Tensor]] = []
        for i in range(stage.accumulation):
            part = {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
            with torch.autocast(self.device.type, DTYPES[self.config.precision], self.config.precision != "float32"):
                found.append(self._micro_step(stage, part, first=i * size))
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def _micro_step(self, stage: Stage, batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
        backbone = self.weights.backbone
        dtype = DTYPES[self.config.precision]
        latent = batch["latent"].to(self.device, dtype)  # (B, c, h, w)
        generators = [self._generator("noise", self.step, first + i) for i in range(len(latent))]
        condition = self._with_dropout(stage, batch, generators)
        noised = noise_batch(backbone, latent, generators, stage.weighting, stage.shift)
        arguments = call_arguments(backbone, noised.latent, noised.timestep, condition, self.device)
        share = 1 / stage.accumulation
        if isinstance(stage, TransferStage):
            tap = TransferTap(lambda loss: self.scaler.scale(loss * share).backward())
            self._call(arguments, tap, grad=False)
            return {"loss": torch.stack(list(tap.losses.values())).mean()}
        features = FeatureTap()
        teacher = prediction(backbone, self._call(arguments, features.teacher, grad=False)).float()
        with self._checkpointing(stage):
            student = prediction(backbone, self._call(arguments, features.student, grad=True)).float()
            losses = {
                "task": F.mse_loss(student, task_target(backbone, latent, noised).float()),
                "prediction": F.mse_loss(student, teacher),
                "feature": features.total(),
            }
            loss = stage.task * losses["task"] + stage.prediction * losses["prediction"]
            loss = loss + stage.feature * losses["feature"]
            self.scaler.scale(loss * share).backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _call(self, arguments: dict[str, Any], tap: Any, grad: bool) -> Tensor:
        self.handle.tap = tap
        try:
            with torch.set_grad_enabled(grad):
                return self.transformer(**arguments)[0]
        finally:
            if not grad:  # a backward pass with gradient checkpointing calls the attentions once more
                self.handle.tap = None

    @contextmanager
    def _checkpointing(self, stage: DistillStage) -> Iterator[None]:
        if stage.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.handle.tap = None
            self.transformer.disable_gradient_checkpointing()

    def _with_dropout(
        self, stage: Stage, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """The batch's conditions, some captions replaced by the empty one."""
        names = [name for name in batch if name in ("prompt_embeds", "prompt_mask", "pooled")]
        drop = [float(torch.rand(1, generator=g)) < stage.caption_dropout for g in generators]
        if not any(drop):
            return {name: batch[name] for name in names}
        empty = self.empty_prompt
        return {
            name: torch.stack([empty[name] if d else value for d, value in zip(drop, batch[name], strict=True)])
            for name in names
        }

    def _update(self, stage: Stage, losses: dict[str, Tensor]) -> bool:
        """Takes the optimiser's step unless something is not finite; says whether it did."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), stage.clip)
        losses["gradient"] = norm.detach()
        finite = bool(torch.isfinite(losses["loss"])) and bool(torch.isfinite(norm))
        if finite:
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
            with torch.no_grad():
                for name, average in self.ema.items():
                    average.lerp_(self.parameters[name], 1 - self.config.ema)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row > self.config.max_skipped:
                raise EDiTError(
                    f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at "
                    f"step {self.total}. "
                    f"The last good checkpoint is in {self.config.output / 'checkpoints'}; try a lower lr or bfloat16"
                )
        self.scaler.update()
        return finite

    # --- keeping and giving ---

    def save(self) -> Path:
        """Writes a checkpoint of everything that the rest of the run depends on."""
        optimizer = self.optimizer.state_dict()
        names = list(self.parameters)
        tensors: dict[str, Tensor] = {f"side.{name}": p for name, p in self.parameters.items()}
        tensors.update({f"ema.{name}": t for name, t in self.ema.items()})
        for index, moments in optimizer["state"].items():
            tensors.update({f"optimizer.{names[index]}.{k}": torch.as_tensor(v) for k, v in moments.items()})
        state = {
            "version": __version__,
            "stage": self.stage_index,
            "step": self.step,
            "total": self.total,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "groups": [{k: _plain(v) for k, v in g.items() if k != "params"} for g in optimizer["param_groups"]],
            "scaler": self.scaler.state_dict(),
            "config": json.loads(self.config.model_dump_json()),
        }
        folder = self.config.output / "checkpoints"
        return save_checkpoint(folder, self.total, tensors, state, self.config.keep_checkpoints)

    def resume(self) -> bool:
        """Goes on from the newest checkpoint; False where there is none.

        Raises:
            EDiTError: it is damaged, or of another student.
        """
        path = latest_checkpoint(self.config.output / "checkpoints")
        if path is None:
            return False
        tensors, state = load_checkpoint(path)
        now = json.loads(self.config.model_dump_json())
        for field in ("student", "layers", "optimizer", "ema", "precision"):
            if state["config"][field] != now[field]:
                raise EDiTError(
                    f"{path} was made with another {field} ({state['config'][field]!r}); choose another output folder"
                )
        self.stage_index, self.step, self.total = state["stage"], state["step"], state["total"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"side.{name}"])
                if name in self.ema:
                    self.ema[name].copy_(tensors[f"ema.{name}"])
        if self.stage_index < len(self.config.stages):
            self.optimizer = self._optimizer(self.config.stages[self.stage_index])
            self._restore_optimizer(tensors, state["groups"])
        self.scaler.load_state_dict(state["scaler"])
        return True

    def _restore_optimizer(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.parameters):
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if moments:
                state[index] = moments
        fresh = self.optimizer.state_dict()["param_groups"]
        if not state:  # the checkpoint closed a stage: the next one begins with an optimiser of its own
            return
        merged = [{**old, **saved, "params": old["params"]} for old, saved in zip(fresh, groups, strict=True)]
        self.optimizer.load_state_dict({"state": state, "param_groups": merged})

    def export(self) -> Path:
        """Writes the student, averaged if there is an average, as an EDiT weights file."""
        best = self.ema or self.parameters
        self.weights.tensors = {name: t.detach().cpu().clone() for name, t in best.items()}
        self.weights.training = {
            "recipe": json.loads(self.config.model_dump_json(exclude={"model", "cache", "output"})),
            "steps": self.total,
            "data": CachedLatents.describe(self.config.cache),
            "tool_version": __version__,
        }
        path = self.config.output / "student.safetensors"
        self.weights.save(path)
        return path

    # --- small parts ---

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        kind = self.config.optimizer
        arguments: dict[str, Any] = {"lr": stage.lr, "weight_decay": self.config.weight_decay}
        try:
            if kind == "adamw8bit":
                from bitsandbytes.optim import AdamW8bit as Optimizer
            elif kind == "prodigy":
                from prodigyopt import Prodigy as Optimizer
            else:
                from torch.optim import AdamW as Optimizer
        except ImportError:
            package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[kind]
            raise EDiTError(f"optimizer: {kind} needs {package}; install it, or choose adamw") from None
        return Optimizer(list(self.parameters.values()), **arguments)

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


def rate(stage: Stage, step: int) -> float:
    """Share of the highest learning rate at a step."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - stage.warmup) / max(1, stage.steps - stage.warmup)))


def load_teacher(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformer of a diffusers pipeline's folder.

    Raises:
        EDiTModelError: there is none, or not one that EDiT works on.
    """
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise EDiTModelError(f"{folder}: there is no transformer/config.json; give a diffusers pipeline's folder")
    classes = {c.__name__: c for c in (PixArtTransformer2DModel, SD3Transformer2DModel)}
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if name not in classes:
        raise EDiTModelError(f"{folder} holds a {name}; EDiT works on {' and '.join(classes)}")
    try:
        loaded: Any = classes[name]
        model = loaded.from_pretrained(config.parent, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EDiTModelError(f"{config.parent} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.to(device).eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)
