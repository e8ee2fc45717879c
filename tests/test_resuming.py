"""A run that goes on with something changed: it does so and says so, or it is refused in a sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import pipelines, training
from support.train_child import stop_after

from edit_core import EDiTError, EDiTWeights
from edit_core.cli import main
from edit_core.distill.cache import build_cache
from edit_core.distill.engine import Engine
from edit_core.distill.sources import FolderSource

TRANSFER: dict[str, Any] = {"kind": "transfer", "lr": 3e-3, "steps": 4}
DISTILL: dict[str, Any] = {"kind": "distill", "lr": 1e-3, "steps": 4}


@pytest.fixture(scope="module")
def paths(prepared: Any) -> dict[str, Path]:
    return prepared("pixart_sigma")


def run(
    paths: dict[str, Path], output: Path, *stages: dict[str, Any], stop: int | None = None, **fields: Any
) -> Engine:
    engine = Engine(training.config(paths, output, *stages, **fields))
    engine.resume()
    if stop:
        stop_after(engine, stop)
    engine.run()
    return engine


def notes(output: Path) -> list[dict[str, Any]]:
    return EDiTWeights.load(output / "student.safetensors").training.get("resumed", [])


def test_a_finished_run_goes_on_where_its_last_stage_is_made_longer(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = training.write_yaml(training.config(paths, tmp_path / "run", TRANSFER), tmp_path / "run.yaml")
    command = ["distill", "--config", str(file), "--resume", "latest"]
    assert main(command) == 0
    before = EDiTWeights.load(tmp_path / "run" / "student.safetensors")
    assert main(command) == 0  # nothing is left to do
    assert notes(tmp_path / "run") == []
    with caplog.at_level(logging.WARNING):
        assert main([*command, "stages.0.steps=8"]) == 0
    assert "a student after 8 steps" in capsys.readouterr().out
    assert "going on from step 4 with stages.0.steps 8 (it was 4)" in caplog.text
    after = EDiTWeights.load(tmp_path / "run" / "student.safetensors")
    assert after.training["steps"] == 8 == after.training["recipe"]["stages"][0]["steps"]
    assert after.training["resumed"] == [{"step": 4, "changed": {"stages.0.steps": [4, 8]}}]
    assert any(not torch.equal(t, before.tensors[name]) for name, t in after.tensors.items())
    assert [record["step"] for record in training.metrics(tmp_path / "run")] == [*range(1, 9)]


def test_a_stage_added_to_a_finished_run_is_trained_as_in_one_go(paths: dict[str, Path], tmp_path: Path) -> None:
    run(paths, tmp_path / "run", TRANSFER)
    assert run(paths, tmp_path / "run", TRANSFER, DISTILL).total == 8
    run(paths, tmp_path / "straight", TRANSFER, DISTILL)
    one, other = (EDiTWeights.load(tmp_path / name / "student.safetensors").tensors for name in ("run", "straight"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert notes(tmp_path / "run") == [{"step": 4, "changed": {"stages": [1, 2]}}]
    engine = run(paths, tmp_path / "run", TRANSFER, {**DISTILL, "steps": 5}, {**DISTILL, "steps": 2})
    assert (engine.total, engine.stage_index) == (11, 3)
    assert len(notes(tmp_path / "run")) == 2


def test_what_changes_on_the_way_is_noted_and_all_of_it_kept(
    paths: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(paths, tmp_path, TRANSFER, DISTILL, stop=2)
    with caplog.at_level(logging.WARNING):
        run(paths, tmp_path, {**TRANSFER, "batch_size": 2}, {**DISTILL, "guidance": [1.0, 2.0]}, stop=5)
    assert "going on from step 2 with stages.0.batch_size 2 (it was 4)" in caplog.text
    caplog.clear()
    free = {"checkpoint_every": 2, "keep_checkpoints": 1, "max_skipped": 3}
    stages = ({**TRANSFER, "batch_size": 2}, {**DISTILL, "guidance": [1.0, 2.0], "accumulation": 2})
    run(paths, tmp_path, *stages, stop=6, **free)  # what leaves the student as it is, is not worth a word
    assert not caplog.records
    run(paths, tmp_path, *stages, weight_decay=0.1, watch={"held_out": 2, "evaluate_every": 0, "preview_every": 0})
    assert notes(tmp_path) == [
        {"step": 2, "changed": {"stages.0.batch_size": [4, 2]}},
        {"step": 6, "changed": {"weight_decay": [0.0, 0.1], "watch.held_out": [0, 2]}},
    ]


@pytest.mark.parametrize(
    ("stages", "fields", "part"),
    [
        ((TRANSFER, DISTILL), {"seed": 1}, r"made with another seed \(0\)"),
        ((TRANSFER, {**DISTILL, "kind": "transfer"}), {}, "stages.1 was begun as distill, and is transfer now"),
        (({**DISTILL, "lr": 3e-3}, DISTILL), {}, "stages.0 was begun as transfer, and is distill now"),
        (({**TRANSFER, "steps": 6}, DISTILL), {}, "stages.0 is finished, so that its steps cannot become 6 any more"),
        (({**TRANSFER, "lr": 1e-3}, DISTILL), {}, "stages.0 is finished, so that its lr cannot become 0.001 any more"),
        ((TRANSFER, {**DISTILL, "steps": 1}), {}, "2 steps of stages.1 are done, and stages.1.steps=1 asks for fewer"),
        ((TRANSFER,), {}, "its run had 2 stages, and 1 are too few now"),
    ],
)
def test_changes_that_come_too_late_are_refused(
    stages: tuple[dict[str, Any], ...], fields: dict[str, Any], part: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    run(paths, tmp_path, TRANSFER, DISTILL, stop=6)
    kept = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(EDiTError, match=part):
        Engine(training.config(paths, tmp_path, *stages, **fields)).resume()
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize(
    ("stage", "fields", "part"),
    [
        ({"steps": 3}, {}, "stages.0 is finished, so that its steps cannot become 3"),
        ({"lr": 1e-3}, {}, "stages.0 is finished, so that its lr cannot become"),
        ({}, {"weight_decay": 0.1}, "the run is finished, so that weight_decay cannot become 0.1 any more"),
    ],
)
def test_a_finished_run_takes_no_change_that_would_do_nothing(
    stage: dict[str, Any], fields: dict[str, Any], part: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    run(paths, tmp_path, TRANSFER)
    with pytest.raises(EDiTError, match=part):
        Engine(training.config(paths, tmp_path, {**TRANSFER, **stage}, **fields)).resume()


def test_another_cache_is_refused_if_encoded_otherwise_and_else_noted(paths: dict[str, Path], tmp_path: Path) -> None:
    run(paths, tmp_path / "run", TRANSFER, stop=2)

    def cached(name: str, dtype: torch.dtype, pictures: int) -> dict[str, Path]:
        encoder = training.ShortPrompts(paths["model"], torch.device("cpu"), dtype)
        images = training.draw_images(tmp_path / f"{name} images", pictures)
        build_cache(FolderSource(images), encoder, tmp_path / name, [training.RESOLUTION], bucket_step=32)
        return {**paths, "cache": tmp_path / name}

    with pytest.raises(EDiTError, match="made with another cache, whose encoder is"):
        Engine(training.config(cached("half", torch.bfloat16, 16), tmp_path / "run", TRANSFER)).resume()
    run(cached("more", torch.float32, 20), tmp_path / "run", TRANSFER)
    ((note),) = notes(tmp_path / "run")
    assert note["step"] == 2
    assert note["changed"]["data.images"] == [{"128": 16}, {"128": 20}]
    assert set(note["changed"]) == {"data.images", "data.shards"}


def test_another_teacher_of_the_same_shapes_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    run(paths, tmp_path / "run", TRANSFER, stop=2)
    other = pipelines.build("pixart_sigma", tmp_path / "other", seed=5)
    with pytest.raises(EDiTError, match="made with another teacher"):
        Engine(training.config({**paths, "model": other}, tmp_path / "run", TRANSFER)).resume()


def test_what_was_noted_lasts_over_a_stop(paths: dict[str, Path], tmp_path: Path) -> None:
    run(paths, tmp_path, {**TRANSFER, "steps": 8}, stop=2)
    run(paths, tmp_path, {**TRANSFER, "steps": 9}, stop=4)
    state = json.loads((tmp_path / "checkpoints" / "00000004" / "state.json").read_text())
    assert state["resumed"] == [{"step": 2, "changed": {"stages.0.steps": [8, 9]}}]
    run(paths, tmp_path, {**TRANSFER, "steps": 9})
    assert notes(tmp_path) == state["resumed"]
