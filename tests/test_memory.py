"""What a training is estimated to take, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import training

from edit_core import EDiTWeights
from edit_core.cli import main
from edit_core.distill.memory import estimate
from edit_core.distill.teacher import load_teacher


def test_the_estimate_of_memory_needs_no_loading(prepared: Any, tmp_path: Path, capsys: Any) -> None:
    stages = ({"kind": "transfer"}, {"kind": "distill"})
    config = training.config(prepared("sd35_medium"), tmp_path, *stages, trainable="full", ema=0.0)
    file = training.write_yaml(config, tmp_path / "a.yaml")
    assert main(["distill", "--config", str(file), "--estimate", "--json"]) == 0
    transfer, distill = json.loads(capsys.readouterr().out)
    transformer = load_teacher(config.model, torch.float32, torch.device("cpu"))
    assert transfer["base"] == sum(4 * t.numel() for t in transformer.state_dict().values())
    trained = EDiTWeights.init(transformer, trainable="full").tensors.values()
    assert transfer["trained"] == sum(16 * t.numel() for t in trained)
    assert transfer["activations"] < distill["activations"]
    assert not config.output.joinpath("checkpoints").exists()


def test_the_estimate_of_memory_is_for_as_many_processes_as_were_started(
    prepared: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training.config(prepared("sd35_medium"), tmp_path, {"kind": "distill", "batch_size": 8})
    command = ["distill", "--config", str(training.write_yaml(config, tmp_path / "a.yaml")), "--estimate", "--json"]
    found = []
    for process in ({}, {"WORLD_SIZE": "4"}, {"ACCELERATE_USE_FSDP": "true"}, {"RANK": "1"}):
        for name, value in process.items():
            monkeypatch.setenv(name, value)
        assert main(command) == 0
        found.append(capsys.readouterr().out)
    alone, four, split = (json.loads(text)[0] for text in found[:3])
    assert found[3] == "", "one of the processes says it"
    assert four["base"] == alone["base"] == 4 * split["base"]
    assert alone["activations"] == 4 * four["activations"]
    assert "2 pictures at a time" in four["stage"]


def test_the_estimate_of_memory_counts_previews_which_may_take_more_than_a_step(prepared: Any, tmp_path: Path) -> None:
    stages = ({"kind": "distill", "resolution": 2048, "batch_size": 1},)
    drawn = {"watch": {"held_out": 2, "preview_every": 5}}
    blind, seeing = (
        estimate(training.config(prepared("sd35_medium"), tmp_path, *stages, **fields))[0] for fields in ({}, drawn)
    )
    assert blind.previews == 0
    assert seeing.base - blind.base > 3e8, "the VAE"
    assert seeing.previews > 3 * 4 * 256 * 2048**2, "what a decoder's last block holds of its 256 channels"
    assert seeing.total == seeing.base + seeing.trained + max(seeing.activations, seeing.previews)
