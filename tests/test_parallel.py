"""Trainings that several processes share: the same losses as one process's, and checkpoints that move between them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import models, training
from support.train_child import stop_after

from edit_core import EDiTError
from edit_core.distill.engine import Engine

CHILD = Path(__file__).parent / "support" / "train_child.py"
STAGES: tuple[dict[str, Any], ...] = (
    {"kind": "transfer", "lr": 3e-3, "steps": 4},
    {"kind": "distill", "lr": 1e-3, "steps": 4, "accumulation": 2, "guidance": [1.0, 5.0]},
)
COMMANDS = {
    "one process": [sys.executable],
    "data parallel": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "FSDP2": [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


def train(how: str, config: Path, stop_at: int = 100) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = ["--main_process_port", str(free.getsockname()[1])] if how == "FSDP2" else []
    done = subprocess.run(
        [*COMMANDS[how], *port, str(CHILD), str(config), str(stop_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def configured(paths: dict[str, Path], folder: Path, **fields: Any) -> Path:
    return training.write_yaml(training.config(paths, folder, *STAGES, **fields), folder.with_suffix(".yaml"))


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in training.metrics(folder) if r["kind"] != "evaluate"]


@pytest.mark.parametrize(
    ("backbone", "commands", "fields"),
    [
        pytest.param("pixart_sigma", [*COMMANDS], {"trainable": "low_rank", "rank": 2}, marks=pytest.mark.slow),
        pytest.param("sd35_medium", [*COMMANDS], {}, marks=pytest.mark.slow),
        ("sd35_medium", ["one process", "FSDP2"], {}),
    ],
)
def test_two_processes_train_as_one_and_checkpoints_move_between_them(
    backbone: str, commands: list[str], fields: dict[str, Any], prepared: Any, tmp_path: Path
) -> None:
    paths = prepared(backbone)
    looked = {"watch": {"held_out": 2, "evaluate_every": 4, "preview_every": 0}}
    for how in commands:
        said = train(how, configured(paths, tmp_path / how, **fields, **looked))
        sharded = [int(n) for n in re.findall(r"8 steps, (\d+) sharded", said)]
        assert len(sharded) == (1 if how == "one process" else 2)
        assert all(sharded) if how == "FSDP2" else not any(sharded)
    names = commands[1:]
    if backbone.startswith("pixart"):
        names.append("moving")
        moving = configured(paths, tmp_path / "moving", **fields, **looked)
        for how, stop_at in (("FSDP2", 2), ("one process", 5), ("data parallel", 100)):
            train(how, moving, stop_at)
    straight = losses(tmp_path / "one process")
    assert len(straight) == 8
    weights = load_file(tmp_path / "one process" / "student.safetensors")
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(straight, rel=1e-4), name
        for key, tensor in load_file(tmp_path / name / "student.safetensors").items():
            # Adam divides by a gradient's size, so that one near zero may step either way for rounding.
            assert models.relative_error(tensor, weights[key]) < 1e-2 or tensor.abs().max() < 1e-2, (name, key)


def test_no_process_writes_a_checkpoint_before_all_have_read_the_one_they_resume_from(
    prepared: Any, tmp_path: Path
) -> None:
    stage = {"kind": "transfer", "steps": 2}
    config = training.config(prepared("pixart_sigma"), tmp_path, stage, stage)
    engine = Engine(config)
    stop_after(engine, 2)  # at the stage's end, so that going on begins with a checkpoint of the same name
    engine.run()
    engine = Engine(config)
    waited: list[tuple[int, int]] = []
    engine.processes.wait = lambda: waited.append((engine.stage_index, engine.total))  # type: ignore[method-assign]
    assert engine.resume()
    assert waited == [(0, 2)]


def test_a_batch_that_processes_cannot_share_is_said_to_be_so(prepared: Any, tmp_path: Path) -> None:
    engine = Engine(training.config(prepared("pixart_sigma"), tmp_path, STAGES[0]))
    engine.processes.world = 3
    with pytest.raises(EDiTError, match=r"batch_size=4 is not a multiple of accumulation=1 times 3 processes"):
        engine.run()
