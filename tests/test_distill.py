"""The distillation engine on small teachers: that it learns, resumes exactly, and survives what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import models, training
from support.train_child import stop_after

from edit_core import EDiTConfig, EDiTConfigError, EDiTError, EDiTWeights, apply_edit
from edit_core.backbones import BACKBONES
from edit_core.cli import main
from edit_core.config import PRESETS
from edit_core.distill.calibrate import calibrate
from edit_core.distill.checkpoint import latest_checkpoint, save_checkpoint
from edit_core.distill.config import load_config
from edit_core.distill.dataset import CachedLatents
from edit_core.distill.distance import Distance, teacher_distance
from edit_core.distill.engine import Engine
from edit_core.distill.losses import FeatureTap, dense_tap, weighted_mse
from edit_core.distill.teacher import load_teacher

TRANSFER: dict[str, Any] = {"kind": "transfer", "lr": 3e-3}
DISTILL: dict[str, Any] = {"kind": "distill", "lr": 1e-3, "accumulation": 2}


def distance(paths: dict[str, Path], student: EDiTWeights | EDiTConfig) -> Distance:
    """From the teacher, on noise that no training saw."""
    data = CachedLatents(paths["cache"], training.RESOLUTION)
    transformer = load_teacher(paths["model"], torch.float32, torch.device("cpu"))
    with apply_edit(transformer, student) as handle:
        return teacher_distance(
            transformer, handle, BACKBONES[data.backbone], [data.collate(list(range(8)))], seed=10**6
        )


@pytest.mark.parametrize("backbone", models.PIXART_FIRST)
def test_transfer_lowers_each_attentions_error_fivefold_and_distill_the_whole_models(
    backbone: str, prepared: Any, tmp_path: Path
) -> None:
    paths = prepared(backbone)
    initial = EDiTWeights.init(load_teacher(paths["model"], torch.float32, torch.device("cpu")))
    few = {"batch_size": 4, "steps": 400} if backbone == "sd35_medium" else {"batch_size": 8, "steps": 200}
    stages = (
        {**TRANSFER, "lr": 1e-2, "clip": 10.0, "caption_dropout": 0.0, **few},
        {**DISTILL, "steps": 80, "accumulation": 1, "task": 0.0, "prediction": 100.0, "feature": 0.1},
    )
    fields = {"ema": 0.0, "checkpoint_every": 1000, "trainable": "low_rank", "rank": 32, "base_lr": 0.3}
    config = training.config(paths, tmp_path, *stages, **fields)
    engine = Engine(config)
    stop_after(engine, few["steps"])
    engine.run()
    transferred = EDiTWeights.load(engine.export())
    engine = Engine(config)
    assert engine.resume()
    distilled = EDiTWeights.load(engine.run())
    before, between, after = (distance(paths, w) for w in (initial, transferred, distilled))
    print(f"{backbone}: per attention {before.mean_attention:.4f} -> {between.mean_attention:.4f}; "
          f"prediction {before.prediction:.3g} -> {between.prediction:.3g} -> {after.prediction:.3g}")  # fmt: skip
    assert between.mean_attention < before.mean_attention / 5
    assert between.prediction < before.prediction
    assert after.prediction < between.prediction
    assert distilled.training["steps"] == few["steps"] + 80
    assert str(paths["model"]) not in json.dumps(distilled.training), "a path was published"


@pytest.mark.parametrize(("trainable", "fields"), [("full", {}), ("low_rank", {}), ("full", {"query": "separable"})])
@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_a_student_may_start_where_piecewise_attention_stands_without_weights(
    backbone: str, trainable: Any, fields: dict[str, str], prepared: Any, tmp_path: Path
) -> None:
    paths, student = prepared(backbone), {"preset": "piecewise", "quality": "fast", **fields}
    teacher = load_teacher(paths["model"], torch.float32, torch.device("cpu"))
    initial = EDiTWeights.init(teacher, EDiTConfig.preset("piecewise", quality="fast", **fields), trainable=trainable)
    untrained = distance(paths, EDiTConfig.preset("piecewise", quality="fast"))
    before = distance(paths, initial)
    assert before.prediction == pytest.approx(untrained.prediction, rel=1e-4)
    assert before.attentions == pytest.approx(untrained.attentions, rel=1e-4)
    stages = ({**TRANSFER, "steps": 5}, {**DISTILL, "steps": 15, "accumulation": 1, "task": 0.0})
    config = training.config(paths, tmp_path, *stages, student=student, trainable=trainable, ema=0.0)
    trained = EDiTWeights.load(Engine(config).run())
    assert trained.config.kernel == "piecewise"
    assert distance(paths, trained).prediction < untrained.prediction


def equal(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


@pytest.mark.parametrize("backbone", models.PIXART_FIRST)
def test_a_resumed_run_equals_one_that_was_never_stopped(backbone: str, prepared: Any, tmp_path: Path) -> None:
    stages = (TRANSFER, DISTILL)
    straight = Engine(training.config(prepared(backbone), tmp_path / "straight", *stages)).run()
    config = training.config(prepared(backbone), tmp_path / "resumed", *stages)
    for stop_at in (2, 3, 6, 7, 10):  # within a stage, at its end, at the next one's start
        engine = Engine(config)
        assert engine.resume() is (stop_at > 2)
        stop_after(engine, stop_at)
        engine.run()
        assert engine.total == stop_at
    engine = Engine(config)
    assert engine.resume()
    resumed = engine.run()
    assert engine.total == 12
    assert equal(straight, resumed)
    initial = EDiTWeights.init(load_teacher(prepared(backbone)["model"], torch.float32, torch.device("cpu")))
    assert any(not torch.equal(t, initial.tensors[name]) for name, t in load_file(resumed).items()), (
        "nothing was learnt"
    )


@pytest.mark.parametrize(("kind", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_optimisers_of_other_packages_resume_exactly_where_installed(
    kind: str, package: str, prepared: Any, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    lr = 1.0 if kind == "prodigy" else 1e-3
    stages = ({**TRANSFER, "lr": lr}, {**DISTILL, "lr": lr})
    straight = Engine(training.config(prepared("pixart_sigma"), tmp_path / "straight", *stages, optimizer=kind)).run()
    config = training.config(prepared("pixart_sigma"), tmp_path / "resumed", *stages, optimizer=kind)
    engine = Engine(config)
    stop_after(engine, 3)
    engine.run()
    engine = Engine(config)
    assert engine.resume()
    assert equal(straight, engine.run())


@pytest.mark.parametrize("backbone", models.PIXART_FIRST)
def test_kills_at_random_moments_lose_nothing_but_steps_since_the_last_checkpoint(
    backbone: str, prepared: Any, tmp_path: Path, record_property: Any
) -> None:
    stages = ({**TRANSFER, "steps": 12}, {**DISTILL, "steps": 12})
    straight = Engine(training.config(prepared(backbone), tmp_path / "straight", *stages)).run()
    config = training.config(prepared(backbone), tmp_path / "killed", *stages, checkpoint_every=1)
    file = training.write_yaml(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "edit_core", "distill", "--config", str(file), "--resume", "latest", "--json"]
    rng, kills = random.Random(0), 0
    limit = int(os.environ.get("EDIT_TEST_KILLS", "2"))
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if kills < limit:
            watched = config.output / "metrics.jsonl"
            before = watched.stat().st_size if watched.exists() else 0
            while process.poll() is None and (watched.stat().st_size if watched.exists() else 0) == before:
                time.sleep(0.02)  # a step was taken
            time.sleep(rng.uniform(0, 0.15))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out)["steps"] == 24
        break
    assert kills == limit
    record_property(f"kills of a training at random, {backbone}", kills)
    assert equal(straight, config.output / "student.safetensors")


def test_sigterm_writes_a_checkpoint_and_exits_cleanly(prepared: Any, tmp_path: Path) -> None:
    config = training.config(
        prepared("pixart_sigma"), tmp_path / "run", {**TRANSFER, "steps": 5000}, checkpoint_every=5000
    )
    file = training.write_yaml(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "edit_core", "distill", "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (config.output / "metrics.jsonl").exists() or not training.metrics(config.output):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "goes on with --resume latest" in out
    assert latest_checkpoint(config.output / "checkpoints") is not None
    assert main(["distill", "--config", str(file)]) == 2, "an earlier run is not written over"


def test_a_signal_while_processes_ask_each_other_is_not_lost(prepared: Any, tmp_path: Path) -> None:
    engine = Engine(training.config(prepared("pixart_sigma"), tmp_path, {**TRANSFER, "steps": 6}))

    def signalled(flag: bool) -> bool:
        engine.stopping = True  # as the handler does, when the flag is on its way already
        return flag

    engine.processes.any = signalled  # type: ignore[method-assign]
    engine.run()
    assert engine.total == 2


def test_a_signal_that_the_others_have_not_heard_of_stops_after_the_next_step_alone(
    prepared: Any, tmp_path: Path
) -> None:
    engine = Engine(training.config(prepared("pixart_sigma"), tmp_path, {**TRANSFER, "steps": 2}, TRANSFER))
    run_stage = engine._run_stage

    def signalled(*args: Any) -> Any:
        stopped = run_stage(*args)
        engine.stopping = True  # after the stage's last step: the others are on their way to the next stage
        return stopped

    engine._run_stage = signalled  # type: ignore[method-assign]
    engine.run()
    assert (engine.stage_index, engine.step, engine.total) == (1, 1, 3)


def test_rates_and_decays_that_were_changed_hold_for_a_resumed_run(prepared: Any, tmp_path: Path) -> None:
    paths, fields = prepared("pixart_sigma"), {"trainable": "low_rank", "rank": 2}
    engine = Engine(training.config(paths, tmp_path, TRANSFER, **fields))
    stop_after(engine, 2)
    engine.run()
    changed = Engine(training.config(paths, tmp_path, TRANSFER, **fields, base_lr=0.5, weight_decay=0.01))
    assert changed.resume()
    assert [(group["share"], group["weight_decay"]) for group in changed.learner.optimizer.param_groups] == [
        (1.0, 0.01),
        (0.5, 0.01),
    ]


def test_a_batch_that_the_device_cannot_hold_is_said_to_be_so(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = training.config(prepared("pixart_sigma"), tmp_path / "run", TRANSFER)
    step = Engine._train_step

    def too_large(engine: Engine, *args: Any) -> Any:
        if engine.total == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return step(engine, *args)

    monkeypatch.setattr(Engine, "_train_step", too_large)
    assert main(["distill", "--config", str(training.write_yaml(config, tmp_path / "run.yaml"))]) == 2
    err = capsys.readouterr().err
    assert "after step 4 (CUDA out of memory. Tried to allocate 20.00 GiB.); raise the accumulation" in err
    assert latest_checkpoint(config.output / "checkpoints") is not None


def test_steps_that_are_not_finite_are_skipped_counted_and_limited(prepared: Any, tmp_path: Path) -> None:
    config = training.config(prepared("pixart_sigma"), tmp_path / "run", {**TRANSFER, "steps": 20}, max_skipped=2)
    engine = Engine(config)
    step = engine._train_step

    def broken(*args: Any) -> Any:
        losses = step(*args)
        if engine.step >= 4:
            next(iter(engine.parameters.values())).grad.fill_(float("nan"))
        return losses

    engine._train_step = broken  # type: ignore[method-assign]
    with pytest.raises(EDiTError, match="3 steps in a row had a loss or gradient that is not finite"):
        engine.run()
    assert [record["finite"] for record in training.metrics(config.output)] == [True] * 4 + [False] * 2
    again = Engine(config)
    assert again.resume()
    assert all(torch.isfinite(p).all() for p in again.parameters.values())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_nothing(accumulation: int, prepared: Any, tmp_path: Path) -> None:
    stage = {**DISTILL, "accumulation": accumulation, "guidance": [2.0, 5.0]}
    engines = []
    for changes in ({"accumulation": 1}, {}):
        engine = Engine(training.config(prepared("pixart_sigma"), tmp_path / f"{changes}", {**stage, **changes}))
        data = CachedLatents(engine.config.cache, training.RESOLUTION)
        losses = engine._train_step(engine.config.stages[0], data.collate(list(range(4))))
        engines.append((engine, losses))
    (whole, losses), (parts, same) = engines
    for name, loss in losses.items():
        assert torch.allclose(loss, same[name], rtol=1e-5), name
    gradients = [torch.cat([p.grad.flatten() for p in e.parameters.values()]) for e in (whole, parts)]
    assert models.relative_error(gradients[1], gradients[0]) < 1e-5


def test_gradient_checkpointing_changes_nothing(prepared: Any, tmp_path: Path) -> None:
    engines = []
    for on in (True, False):
        stage = {**DISTILL, "steps": 1, "gradient_checkpointing": on}
        engine = Engine(training.config(prepared("sd35_medium"), tmp_path / str(on), stage))
        data = CachedLatents(engine.config.cache, training.RESOLUTION)
        engine._train_step(engine.config.stages[0], data.collate(list(range(4))))
        engines.append(engine)
    for name, parameter in engines[0].parameters.items():
        assert torch.allclose(parameter.grad, engines[1].parameters[name].grad, atol=1e-6), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_float32_weights(precision: str, prepared: Any, tmp_path: Path) -> None:
    stages = {**TRANSFER, "steps": 30}, {**DISTILL, "steps": 2}
    config = training.config(prepared("pixart_sigma"), tmp_path / "run", *stages, precision=precision)
    weights = EDiTWeights.load(Engine(config).run())
    assert {t.dtype for t in weights.tensors.values()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in weights.tensors.values())
    losses = [record["loss"] for record in training.metrics(config.output) if record["kind"] == "transfer"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_teacher_in_a_tapped_transformer_is_the_teacher(prepared: Any) -> None:
    paths = prepared("pixart_sigma")
    transformer = load_teacher(paths["model"], torch.float32, torch.device("cpu"))
    with torch.no_grad():
        before = models.forward(transformer, 16, 16)
        with apply_edit(transformer, EDiTWeights.init(transformer)) as handle:
            handle.tap = dense_tap
            assert torch.equal(models.forward(transformer, 16, 16), before)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: Any) -> None:
    tensors = {"a": torch.ones(3)}
    first = save_checkpoint(tmp_path, 1, tensors, {"step": 1}, keep=2)

    def killed(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, tensors, {"step": 2}, keep=2)
    assert latest_checkpoint(tmp_path) == first
    monkeypatch.undo()
    (tmp_path / ".part-killed").mkdir()
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, tensors, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004"]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stages.0.steps=0", "stages.0.transfer.steps"),
        ("stages.0.stepz=3", "stages.0.transfer.stepz"),
        ("stages.0.kind=dream", "stages.0"),
        ("stages.9.steps=1", "no such place"),
        ("stages=[]", "stages"),
        ("student={compression: seven}", "compression"),
        ("student={compresion: 4}", "compresion"),
        ("precision=int4", "precision"),
        ("stages.1.accumulation=3", "batch_size=2 is not a multiple of accumulation=3"),
        ("seed", "field=value"),
        ("colour=red", "debug: colour: there is no such field"),
        ("colour.red=1", "colour"),
        ("student.colour=1", "debug: the student's config has fields unknown to this version: colour"),
        ("student={name: red, cls: 1}", "debug: the student's config has fields unknown to this version: cls, name"),
        ("student.preset=[]", f"debug: preset must be one of {', '.join(PRESETS)}, not []"),
    ],
)
def test_a_wrong_field_is_named_before_anything_is_loaded(override: str, part: str) -> None:
    with pytest.raises(EDiTConfigError) as caught:
        load_config("debug", [override])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_of_parts_that_a_configuration_leaves_out_can_be_overridden() -> None:
    config = load_config(
        "pixart_sigma_24gb", ["watch.preview_every=0", "student.preset=paper", "student.compression=2"]
    )
    assert config.watch.preview_every == 0
    assert config.watch.evaluate_every == load_config("pixart_sigma_24gb").watch.evaluate_every
    assert config.edit_config() == EDiTConfig.preset("paper", compression=2)


def test_prodigy_is_refused_two_learning_rates_before_its_first_step_is() -> None:
    changes = ["optimizer=prodigy", "trainable=low_rank", *(f"stages.{index}.lr=1" for index in range(3))]
    with pytest.raises(EDiTConfigError, match="prodigy takes one learning rate"):
        load_config("pixart_sigma_24gb", changes)
    assert load_config("pixart_sigma_24gb", [*changes, "base_lr=1"]).optimizer == "prodigy"
    assert load_config("pixart_sigma_24gb", [*changes, "trainable=side"]).trainable == "side"


def test_rates_for_another_optimiser_are_refused_and_prodigys_default_is_its_own() -> None:
    with pytest.raises(EDiTConfigError, match=r"stages.0.lr=0.001 is a rate for AdamW; .* set stages.0.lr=1$"):
        load_config("pixart_sigma_24gb", ["optimizer=prodigy"])
    with pytest.raises(EDiTConfigError, match=r"stages.2.lr=5e-05 is a rate for AdamW"):
        load_config("pixart_sigma_24gb", ["optimizer=prodigy", "stages.0.lr=1", "stages.1.lr=1"])
    stages = "stages=[{kind: transfer, steps: 8}, {kind: distill, steps: 8}, {kind: distill, steps: 8, lr: 0.5}]"
    assert [stage.lr for stage in load_config("debug", ["optimizer=prodigy", "base_lr=1", stages]).stages] == [
        1.0,
        1.0,
        0.5,
    ]
    assert [stage.lr for stage in load_config("debug", [stages, "stages.2.lr=1e-5"]).stages] == [1e-3, 1e-4, 1e-5]
    for optimizer in ("adamw", "adamw8bit"):  # back from prodigy, with its rate left behind
        with pytest.raises(EDiTConfigError, match=rf"stages.1.lr=1 is a factor for prodigy; {optimizer} takes"):
            load_config("debug", [f"optimizer={optimizer}", "stages.1.lr=1"])


def test_shipped_configurations_are_valid_and_missing_ones_are_said_to_be_so(tmp_path: Path) -> None:
    real = (f"{b}_{size}" for b in models.SHIPPED for size in ("24gb", "8gpu"))
    for name in ("debug", *real, *(f"world_{b}" for b in models.SHIPPED)):
        assert load_config(name).stages
    with pytest.raises(EDiTConfigError, match="no such file, nor a configuration"):
        load_config("unheard_of")
    bad = tmp_path / "bad.yaml"
    bad.write_text("stages: [")
    with pytest.raises(EDiTConfigError, match="is not YAML"):
        load_config(str(bad))


def test_mistakes_on_the_command_line_are_one_sentence(
    prepared: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # where it is installed
    paths = prepared("pixart_sigma")
    file = training.write_yaml(training.config(paths, tmp_path / "run", TRANSFER), tmp_path / "run.yaml")
    for overrides, part in (
        (["model=/nowhere"], "no transformer/config.json"),
        (["cache=/nowhere"], "/nowhere"),
        (["device=cuda"], "device cuda cannot be used here"),
        (["device=gpu"], "device gpu cannot be used here"),
        (["optimizer=prodigy", "stages.0.lr=1"], "needs prodigyopt"),
        (["layers=none"], "names no block"),
        (["layers=0-7"], "does not exist"),
        (["stages.0.resolution=99"], "99"),
        (["stages.0.batch_size=64"], "64"),
    ):
        assert main(["distill", "--config", str(file), f"output={tmp_path / 'out'}", *overrides]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edit_core: ")]
        assert len(lines) == 1, overrides
        assert part in lines[0], lines


def test_a_stage_that_cannot_run_is_known_before_the_first_begins(prepared: Any, tmp_path: Path) -> None:
    with pytest.raises(EDiTError, match="4096"):
        Engine(training.config(prepared("pixart_sigma"), tmp_path, TRANSFER, {**DISTILL, "resolution": 4096}))
    mixed = {"model": prepared("sd35_medium")["model"], "cache": prepared("pixart_sigma")["cache"]}
    with pytest.raises(EDiTError, match="was made for pixart_sigma, but the teacher is sd35_medium"):
        Engine(training.config(mixed, tmp_path, TRANSFER))


def test_feature_losses_of_a_recomputation_are_not_kept() -> None:
    tap, x = FeatureTap(), torch.ones(2, 3, requires_grad=True)
    tap.teacher("0.self", lambda: torch.ones(2, 3), lambda: x)
    tap.student("0.self", lambda: x, lambda: 3 * x)
    assert float(tap.total()) == pytest.approx(4.0)
    tap.student("0.self", lambda: x, lambda: 3 * x)  # as gradient checkpointing does in the backward pass
    assert tap._losses == []


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_a_run(prepared: Any, tmp_path: Path) -> None:
    stage = {**TRANSFER, "steps": 12}
    engine = Engine(training.config(prepared("pixart_sigma"), tmp_path / "run", stage, max_skipped=1))
    step = engine._train_step

    def broken(*args: Any) -> Any:
        losses = step(*args)
        if engine.step % 2:
            next(iter(engine.parameters.values())).grad.fill_(float("inf"))
        return losses

    engine._train_step = broken  # type: ignore[method-assign]
    engine.run()
    assert engine.skipped == 6


def test_a_checkpoint_of_another_student_or_teacher_is_refused(prepared: Any, tmp_path: Path) -> None:
    paths = prepared("pixart_sigma")
    Engine(training.config(paths, tmp_path / "run", TRANSFER)).run()
    other = Engine(training.config(paths, tmp_path / "run", TRANSFER, student={"compression": 2}))
    with pytest.raises(EDiTError, match="another student"):
        other.resume()
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    tensors = load_file(checkpoint / "tensors.safetensors")
    name = next(name for name in tensors if name.startswith("weights.") and len(tensors[name]) > 1)
    for of_another_model in ({**tensors, name: tensors[name][:-1]}, {n: t for n, t in tensors.items() if n != name}):
        save_file(of_another_model, checkpoint / "tensors.safetensors")
        with pytest.raises(EDiTError, match="another model"):
            Engine(training.config(paths, tmp_path / "run", TRANSFER)).resume()
    (checkpoint / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(EDiTError, match="is damaged"):
        Engine(training.config(paths, tmp_path / "run", TRANSFER)).resume()


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_calibrate_needs_only_prompts_and_lowers_the_error(
    backbone: str, prepared: Any, tmp_path: Path, capsys: Any
) -> None:
    paths = prepared(backbone)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "calibrated.safetensors"
    prompts.write_text("a red ship in the snow\n\na green ship in the snow\n")
    arguments = ["calibrate", "--model", str(paths["model"]), "--prompts", str(prompts), "--output", str(output)]
    arguments += ["--size", "128", "--steps", "60", "--sampler-steps", "8", "--json"]
    assert main(arguments) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert len(losses) == 60
    initial = EDiTWeights.init(load_teacher(paths["model"], torch.float32, torch.device("cpu")))
    before, after = (distance(paths, w).mean_attention for w in (initial, EDiTWeights.load(output)))
    assert after < 0.8 * before
    assert main(arguments) == 2, "an existing file is not written over"
    assert "exists already" in capsys.readouterr().err


def test_stopping_a_calibration_leaves_the_teacher_as_it_was(prepared: Any) -> None:
    transformer = load_teacher(prepared("pixart_sigma")["model"], torch.float32, torch.device("cpu"))
    weights = EDiTWeights.init(transformer)
    transformer.requires_grad_(True)
    before, kept = models.forward(transformer, 16, 16).detach(), {n: t.clone() for n, t in weights.tensors.items()}
    condition = {"prompt_embeds": torch.randn(1, 5, 64), "prompt_mask": torch.ones(1, 5, dtype=torch.bool)}

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(transformer, weights, [condition], condition, steps=5, height=16, width=16, on_step=stop)
    assert torch.equal(models.forward(transformer, 16, 16).detach(), before)
    assert all(torch.equal(t, kept[name]) for name, t in weights.tensors.items())
    assert all(p.requires_grad and p.grad is None for p in transformer.parameters()), "the teacher gathered gradients"
    with pytest.raises(EDiTError, match="at least one prompt"):
        calibrate(transformer, weights, [], condition)
    with pytest.raises(EDiTError, match=r"the error is not finite at step \d; try a lower lr"):
        calibrate(transformer, weights, [condition], condition, steps=9, lr=1e30, height=16, width=16)


def test_guided_predictions_are_compared_as_a_sampler_makes_them() -> None:
    student, teacher = torch.randn(2, 4, 3, 2, 2).unbind()
    for scale in (1.0, 4.5):
        guided = [empty + scale * (caption - empty) for caption, empty in (x.chunk(2) for x in (student, teacher))]
        expected = (guided[0] - guided[1]).square().mean() / (scale**2 + (1 - scale) ** 2)
        assert torch.allclose(weighted_mse(student, teacher, torch.ones(2), torch.full((2, 1, 1, 1), scale)), expected)


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_a_training_is_watched_on_pictures_that_it_does_not_see(backbone: str, prepared: Any, tmp_path: Path) -> None:
    watch = {"held_out": 3, "evaluate_every": 1, "preview_every": 2, "preview_pictures": 2, "preview_steps": 2}
    stages = ({**TRANSFER, "steps": 2}, {**DISTILL, "steps": 2, "guidance": [1.0, 4.0]})
    engine = Engine(training.config(prepared(backbone), tmp_path / "run", *stages, watch=watch))
    data = engine.data[0]
    held_out, trained = [data[i]["latent"] for i in data.held_out], []
    step = engine._train_step

    def noted(stage: Any, batch: dict[str, torch.Tensor]) -> Any:
        trained.extend(batch["latent"])
        return step(stage, batch)

    engine._train_step = noted  # type: ignore[method-assign]
    before = {n: p.detach().clone() for n, p in engine.parameters.items()}
    engine._look(engine.config.stages[0], data, None)  # step 0
    assert all(torch.equal(p, before[n]) for n, p in engine.parameters.items())
    engine.run()
    records = [r for r in training.metrics(tmp_path / "run") if r["kind"] == "evaluate"]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[1]["attention"] < records[0]["attention"]
    keys = {f"{block}.{site}" for block, sites in engine.weights.sites.items() for site in sites}
    assert {"prediction", *keys} <= records[0].keys()
    assert len(trained) == 4 * 4
    assert not any(torch.equal(one, other) for one in trained for other in held_out), "trained on what is held out"
    for name in ("00000002.png", "00000004.png"):
        with Image.open(tmp_path / "run" / "pictures" / name) as picture:
            assert picture.size[0] > picture.size[1] / 2 * 1.5  # two columns of two rows
            rows = np.asarray(picture.convert("RGB"), dtype=int)
        teacher, student = rows[: rows.shape[0] // 2 - 2], rows[rows.shape[0] // 2 + 2 :]
        assert (teacher != student).any(), "the student's row is the teacher's"
        assert teacher.std() > 5
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_watching_does_not_change_what_is_learnt(prepared: Any, tmp_path: Path) -> None:
    watch = {"held_out": 2, "evaluate_every": 1, "preview_every": 3, "preview_pictures": 1, "preview_steps": 1}
    blind = {"held_out": 2, "evaluate_every": 0, "preview_every": 0}
    files = [
        Engine(training.config(prepared("pixart_sigma"), tmp_path / str(i), TRANSFER, DISTILL, watch=w)).run()
        for i, w in enumerate((watch, blind))
    ]
    assert equal(*files)


def test_short_runs_are_averaged_over_their_last_steps(prepared: Any, tmp_path: Path) -> None:
    engine = Engine(training.config(prepared("pixart_sigma"), tmp_path, {**TRANSFER, "lr": 1e-2}, ema=0.9999))
    before = {n: p.detach().clone() for n, p in engine.parameters.items()}
    engine.run()
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in engine.parameters.items())
    behind = sum(float((p.detach() - engine.ema[n]).square().sum()) for n, p in engine.parameters.items())
    assert 0 < behind < moved / 2
