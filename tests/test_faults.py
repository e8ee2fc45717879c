"""Trainings that meet a fault: kills at every file operation, full disks, and data that is damaged or missing."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import faults, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edit_core import EDiTError
from edit_core.cli import main
from edit_core.distill.cache import build_cache
from edit_core.distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.engine import Engine
from edit_core.distill.sources import FolderSource

STAGES: tuple[dict[str, Any], ...] = (
    {"kind": "transfer", "lr": 3e-3, "steps": 5},
    {"kind": "distill", "lr": 1e-3, "steps": 5, "accumulation": 2},
)
LOOKING = {"held_out": 2, "evaluate_every": 2, "preview_every": 0}
DRAWING = {**LOOKING, "preview_every": 8, "preview_pictures": 2, "preview_steps": 2}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Forks]:
    with faults.Forks(tmp_path_factory.mktemp("forks")) as running:
        yield running


def command(paths: dict[str, Path], output: Path, file: Path, **fields: Any) -> list[str]:
    """A training that writes a checkpoint after every step, unless `fields` say otherwise."""
    common = {"checkpoint_every": 1, "keep_checkpoints": 2, "watch": LOOKING}
    config = training.config(paths, output, *STAGES, **{**common, **fields})
    return ["distill", "--config", str(training.write_yaml(config, file))]


@pytest.fixture(scope="module")
def straight(prepared: Any, forks: faults.Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Per backbone, the folder of a run that met no fault; made on first use."""
    made: dict[str, Path] = {}

    def get(backbone: str) -> Path:
        if backbone not in made:
            folder = tmp_path_factory.mktemp(f"straight_{backbone}")
            outcome = forks.run(faults.command, command(prepared(backbone), folder / "run", folder / "run.yaml"))
            assert outcome.status == 0, outcome.said
            made[backbone] = folder / "run"
        return made[backbone]

    return get


def assert_same_student(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "student.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- kills ------------------------------------------------------------------------------------------------------------

START, CHECKPOINT = 4, 14
"""File operations with which a resumed run takes later records out of its metrics, and of one checkpoint."""


@pytest.mark.slow
def test_killed_before_every_file_operation_it_goes_on_as_if_never_stopped(
    prepared: Any, straight: Callable[[str], Path], forks: faults.Forks, tmp_path: Path, record_property: Any
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    words = [*command(prepared("pixart_sigma"), output, tmp_path / "run.yaml"), "--resume", "latest"]
    kills, call = 0, 1
    died: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    while (outcome := forks.run(faults.killed, words, call, str(log))).status == -signal.SIGKILL:
        kills, call = kills + 1, call % (START + CHECKPOINT) + 1
        newest = latest_checkpoint(output / "checkpoints")
        stage = load_checkpoint(newest)[1]["stage"] if newest else 0
        died[stage].add(log.read_text().splitlines()[-1].split()[0])
        assert kills < 100
    assert outcome.status == 0, outcome.said
    assert kills >= 2 * (START + CHECKPOINT)
    record_property("kills at file operations of a training", kills)
    assert died[0] == died[1] == set(faults.OPERATIONS), "not every operation of both stages was met"
    assert "replace" in died[2], "the student was never about to be renamed"
    assert_same_student(output, straight("pixart_sigma"))
    for path in (output / "checkpoints").glob("[!.]*"):
        load_checkpoint(path)
    check_curves(output, straight("pixart_sigma"))


def check_curves(output: Path, straight: Path) -> None:
    """Every step once, with the losses of a run that was never stopped; in TensorBoard's file too."""

    def losses(folder: Path) -> list[tuple[str, int, float]]:
        names = {"evaluate": "attention"}
        return [(r["kind"], r["step"], r[names.get(r["kind"], "loss")]) for r in training.metrics(folder)]

    written = losses(output)
    assert written == losses(straight)
    assert [step for kind, step, _ in written if kind != "evaluate"] == list(range(1, 11))
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    drawn = [
        (kind, event.step, pytest.approx(event.value))
        for kind, name in (("transfer", "loss"), ("distill", "loss"), ("evaluate", "attention"))
        for event in board.Scalars(f"{kind}/{name}")
    ]
    assert sorted(drawn, key=lambda one: one[:2]) == sorted(written)


def test_what_kills_leave_of_checkpoints_is_cleared_up_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    class Dead(BaseException):
        pass

    tensors, step = {"a": torch.ones(3)}, 1
    save_checkpoint(tmp_path, step, tensors, {}, keep=1)
    for after in range(100):
        left, died = [after], False

        def dying(original: Any, left: list[int] = left) -> Any:
            def operation(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:  # from then on nothing happens any more
                    raise Dead
                return original(*arguments, **options)

            return operation

        with monkeypatch.context() as patch:
            for name in faults.OPERATIONS:
                patch.setattr(faults.os, name, dying(getattr(faults.os, name)))
            try:
                save_checkpoint(tmp_path, step + 1, tensors, {}, keep=1)
            except Dead:
                died = True
        newest = latest_checkpoint(tmp_path)
        assert newest is not None and int(newest.name) in (step, step + 1)
        load_checkpoint(newest)
        step += 2
        save_checkpoint(tmp_path, step, tensors, {}, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == [f"{step:08d}"], after
        if not died:
            break
    assert after >= CHECKPOINT
    record_property("deaths at file operations of a checkpoint", after)


def test_a_record_that_was_cut_off_is_written_anew(
    prepared: Any, straight: Callable[[str], Path], forks: faults.Forks, tmp_path: Path
) -> None:
    words = command(prepared("pixart_sigma"), tmp_path / "run", tmp_path / "run.yaml")
    assert forks.run(faults.killed, words, 3 * CHECKPOINT + 1, str(tmp_path / "log")).status == -signal.SIGKILL
    metrics = tmp_path / "run" / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[:-20])
    assert forks.run(faults.command, [*words, "--resume", "latest"]).status == 0
    check_curves(tmp_path / "run", straight("pixart_sigma"))


@pytest.mark.parametrize("at", [3, 10], ids=["in a run that stops", "in a run that is through"])
def test_a_signal_while_a_checkpoint_is_written_loses_nothing(
    at: int, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(prepared("pixart_sigma"), tmp_path / "run", tmp_path / "run.yaml", checkpoint_every=1000)
    update = Engine._update

    def stopping(engine: Engine, *arguments: Any) -> bool:
        if engine.total + 1 == at == 3:
            signal.raise_signal(signal.SIGINT)
        return update(engine, *arguments)

    def impatient(folder: Path, step: int, *arguments: Any) -> Path:
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return save_checkpoint(folder, step, *arguments)

    monkeypatch.setattr(Engine, "_update", stopping)
    monkeypatch.setattr("edit_core.distill.engine.save_checkpoint", impatient)
    assert main(words) == 0
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and int(newest.name) == at
    assert (tmp_path / "run" / "student.safetensors").exists() is (at == 10)


@pytest.mark.parametrize("days", [-400, 400], ids=["back", "forth"])
def test_a_clock_that_jumps_changes_neither_curves_nor_weights(
    days: int, prepared: Any, straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(prepared("pixart_sigma"), tmp_path / "run", tmp_path / "run.yaml")
    update, seconds, calls = Engine._update, time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return seconds() + days * 86400 * (calls[0] % 3)

    def stopping(engine: Engine, *arguments: Any) -> bool:
        engine.stopping = engine.total == 4
        return update(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_update", stopping)
        assert main(words) == 0
    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    assert main([*words, "--resume", "latest"]) == 0
    assert calls[0] > 10
    assert_same_student(tmp_path / "run", straight("pixart_sigma"))
    check_curves(tmp_path / "run", straight("pixart_sigma"))


# --- full disks -------------------------------------------------------------------------------------------------------


def assert_one_sentence(outcome: faults.Outcome, part: str) -> None:
    said = outcome.said.splitlines()
    assert outcome.status == 2, outcome.said
    assert len(said) == 1, outcome.said
    assert said[0].startswith("edit_core: ") and part in said[0]
    assert said[0].endswith("make room and go on with --resume latest")


@pytest.mark.parametrize(
    ("full", "size", "saves", "fields", "kept"),
    [
        ("a checkpoint", 100_000, 3, {}, [2, 3]),
        ("a checkpoint of the second stage", 100_000, 6, {}, [5, 6]),
        ("the metrics", 1_000, 1, {"checkpoint_every": 1000}, [5]),
        ("a picture", 20_000, 1, {"checkpoint_every": 1000, "watch": DRAWING}, [5]),
        ("the student", 1_000, 10, {}, [9, 10]),
    ],
)
def test_no_room_is_one_sentence_and_with_room_the_run_goes_on_to_the_same_weights(
    full: str, size: int, saves: int, fields: dict[str, Any], kept: list[int], prepared: Any,
    straight: Callable[[str], Path], forks: faults.Forks, tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "run"
    words = command(prepared("pixart_sigma"), output, tmp_path / "run.yaml", **fields)
    assert_one_sentence(forks.run(faults.limited, words, size, saves), "File too large")
    assert sorted(int(path.name) for path in (output / "checkpoints").iterdir()) == kept
    assert not list(output.rglob("*.part"))
    outcome = forks.run(faults.command, [*words, "--resume", "latest"])
    assert outcome.status == 0, outcome.said
    assert_same_student(output, straight("pixart_sigma"))
    check_curves(output, straight("pixart_sigma"))


@pytest.mark.parametrize(
    ("backbone", "room"),
    [
        ("pixart_sigma", "none"),
        ("pixart_sigma", "for a few records"),
        ("pixart_sigma", "for two checkpoints"),
        pytest.param("sd35_medium", "for two checkpoints", marks=pytest.mark.slow),
    ],
)
def test_on_a_disk_that_is_really_full_the_checkpoints_so_far_are_whole(
    backbone: str, room: str, prepared: Any, straight: Callable[[str], Path], forks: faults.Forks, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = (straight(backbone) / "checkpoints" / "00000009" / "tensors.safetensors").stat().st_size
    free = {"none": 0, "for a few records": 12288, "for two checkpoints": int(2.5 * checkpoint)}[room]
    words = command(prepared(backbone), disk / "run", tmp_path / "run.yaml")
    outcome = forks.run(faults.on_a_full_disk, words, str(disk), free, str(tmp_path))
    if outcome.status == faults.NOT_ALLOWED:
        pytest.skip(f"no small disk can be made here ({outcome.said.strip()})")
    first, *rest = outcome.said.splitlines()
    assert len(rest) == 1, outcome.said
    assert_one_sentence(faults.Outcome(outcome.status, first), "No space left on device")
    full, mended = (tmp_path / name / "run" for name in ("full", "mended"))
    checkpoints = list((full / "checkpoints").iterdir()) if (full / "checkpoints").exists() else []
    assert len(checkpoints) == (2 if room == "for two checkpoints" else 0)
    for path in checkpoints:
        load_checkpoint(path)
    assert_same_student(mended, straight(backbone))
    check_curves(mended, straight(backbone))


def test_an_output_that_cannot_be_written_is_known_before_the_teacher_is_loaded(
    prepared: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    words = command(prepared("pixart_sigma"), tmp_path / "file" / "run", tmp_path / "run.yaml")
    monkeypatch.setattr("edit_core.distill.engine.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "file" / "run") in said and "Not a directory" in said


# --- data -------------------------------------------------------------------------------------------------------------


def swap(shards: list[Path]) -> None:
    """Gives each shard another one's content of the same size."""
    for one, other in zip(shards[::2], shards[1::2], strict=True):
        content = one.read_bytes()
        assert len(content) == other.stat().st_size
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "cut off": (lambda shards: [path.write_bytes(path.read_bytes()[:100]) for path in shards], r"but the file at byte"),
    "gone": (lambda shards: [path.unlink() for path in shards], r"cannot be read \(No such file or directory\)"),
    "swapped": (swap, r"this file is another shard's, or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_damaged_under_a_running_training_are_named_and_once_mended_it_goes_on(
    damage: str, prepared: Any, tmp_path: Path
) -> None:
    paths = prepared("pixart_sigma")
    encoder = PipelineEncoder(paths["model"], torch.device("cpu"), torch.float32)
    images = FolderSource(paths["model"].parent / "images")
    build_cache(images, encoder, tmp_path / "cache", [training.RESOLUTION], bucket_step=32, shard_size=2)
    paths = {"model": paths["model"], "cache": tmp_path / "cache"}
    Engine(training.config(paths, tmp_path / "straight", *STAGES)).run()
    shards = sorted((tmp_path / "cache").rglob("*.tar"))
    contents = {path: path.read_bytes() for path in shards}
    break_, part = DAMAGES[damage]
    config = training.config(paths, tmp_path / "run", *STAGES, checkpoint_every=2)
    engine = Engine(config)
    update = engine._update

    def damaging(*arguments: Any) -> bool:
        if engine.total == 5:
            break_(shards)
        return update(*arguments)

    engine._update = damaging  # type: ignore[method-assign]
    with pytest.raises(EDiTError, match=part) as caught:
        engine.run()
    assert any(str(path) in str(caught.value) for path in shards)
    for path, content in contents.items():
        path.write_bytes(content)
    engine = Engine(config)
    assert engine.resume() and 5 <= engine.total < 10
    engine.run()
    assert_same_student(tmp_path / "run", tmp_path / "straight")


def without(part: str, model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns(part))


@pytest.mark.parametrize(
    ("backbone", "part"), [("pixart_sigma", "text_encoder"), ("sd35_medium", "text_encoder_2"), ("sd35_medium", "vae")]
)
def test_what_a_pipeline_lacks_is_named_by_the_commands_that_need_it_before_they_write(
    backbone: str, part: str, prepared: Any, tmp_path: Path, capsys: Any
) -> None:
    paths = prepared(backbone)
    model, output, prompts = without(part, paths["model"], tmp_path / "model"), tmp_path / "out", tmp_path / "p.txt"
    prompts.write_text("a red ship\n")
    student = tmp_path / "student.safetensors"
    assert main(["init", str(paths["model"]), str(student)]) == 0
    capsys.readouterr()
    for words in (
        ["cache", "--images", str(paths["model"].parent / "images"), "--resolutions", "128"],
        ["calibrate", "--prompts", str(prompts), "--size", "128"],
        ["eval", "--weights", str(student), "--prompts", str(prompts), "--size", "64"],
    ):
        assert main([*words, "--model", str(model), "--output", str(output)]) == 2, words[0]
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"but {part} is missing" in said, said
        assert not output.exists()


def test_a_training_on_a_cache_needs_no_text_encoder(prepared: Any, tmp_path: Path) -> None:
    paths = prepared("sd35_medium")
    model = without("text_encoder*", paths["model"], tmp_path / "model")
    watch = {**DRAWING, "preview_every": 2}
    words = command({**paths, "model": model}, tmp_path / "run", tmp_path / "run.yaml", watch=watch)
    assert main([*words, "stages.0.steps=1", "stages.1.steps=1"]) == 0
    assert (tmp_path / "run" / "pictures" / "00000002.png").is_file()


def test_a_vae_that_previews_need_is_missed_before_the_first_step(prepared: Any, tmp_path: Path, capsys: Any) -> None:
    paths = prepared("pixart_sigma")
    model = without("vae", paths["model"], tmp_path / "model")
    words = command({**paths, "model": model}, tmp_path / "run", tmp_path / "run.yaml", watch=DRAWING)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "vae/config.json: there is no such file" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not training.metrics(tmp_path / "run")
    without_previews = [*words, "watch.preview_every=0"]
    assert main(without_previews) == 0


def test_a_bucket_with_too_few_images_is_named_and_too_few_in_all_before_anything_is_loaded(
    prepared: Any, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(prepared("pixart_sigma"), tmp_path / "run", tmp_path / "run.yaml", watch={**LOOKING, "held_out": 6})
    with caplog.at_level(logging.WARNING):
        assert main(words) == 0
    (warning,) = {record.getMessage() for record in caplog.records}
    assert "these buckets of latent cells have fewer images than a batch of 4, and are not used: 12x20 (2)" in warning
    capsys.readouterr()
    monkeypatch.setattr("edit_core.distill.engine.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    for override, part in (
        ("watch.held_out=8", "8 images cannot be held out"),
        ("stages.1.batch_size=10", "no bucket has the 10 images of a batch"),
    ):
        assert main([*words, f"output={tmp_path / 'other'}", override]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and part in said
