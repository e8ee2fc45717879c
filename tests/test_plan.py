"""`edit plan`: which blocks to make linear for an error or a speed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, training
from torch import Tensor

from edit_core import EDiTConfig, EDiTError, EDiTWeights, apply_edit
from edit_core.backbones import BACKBONES
from edit_core.cli import main
from edit_core.distill import plan as planning
from edit_core.distill.distance import teacher_distance
from edit_core.distill.plan import Plan, Times, make_plan, measure_times
from edit_core.layers import parse_layers

BLOCKS = 4


def model(backbone: str = "pixart_sigma") -> Any:
    return models.make(backbone, blocks=BLOCKS)


def batches(backbone: str = "pixart_sigma", count: int = 2) -> list[dict[str, Tensor]]:
    extra: dict[str, Tensor] = {"prompt_mask": torch.ones(2, 5, dtype=torch.bool)}
    channels = 4
    if backbone == "sd35_medium":
        extra, channels = {"pooled": torch.randn(2, 32)}, 16
    return [
        {"latent": torch.randn(2, channels, 16, 16), "prompt_embeds": torch.randn(2, 5, 64), **extra}
        for _ in range(count)
    ]


def timed(monkeypatch: pytest.MonkeyPatch, *savings: float) -> None:
    """Every block's attentions take 3 seconds, less so many when linear; a call takes 20."""
    dense = dict.fromkeys(range(BLOCKS), 3.0)
    linear = {block: 3.0 - saving for block, saving in enumerate(savings)}
    times = Times(dense, linear, 20.0, 20.0 - sum(savings))
    monkeypatch.setattr(planning, "measure_times", lambda *_: times)
    monkeypatch.setattr(planning, "step_speed", lambda *_: 1.1)


def layers_of(plan: Plan) -> tuple[int, ...]:
    return parse_layers(plan.chosen.layers, BLOCKS)


# --- within an error ---


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_a_spoiled_block_is_left_dense_and_the_rest_is_measured(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer, pictures = model(backbone), batches(backbone)
    before = models.forward(transformer, 16, 16)
    weights = EDiTWeights.init(transformer)
    for name, tensor in weights.tensors.items():
        if name.startswith("1."):
            tensor += 3 * torch.randn(tensor.shape)
    plan = make_plan(transformer, weights, pictures, 64, budget=1e9)
    assert plan.chosen.layers == "0-3"
    assert max(plan.blocks, key=lambda cost: cost.error).block == 1
    assert [point.layers for point in plan.curve][-2:] == ["0, 2-3", "0-3"]
    budget = (plan.curve[-2].error + plan.curve[-1].error) / 2
    plan = make_plan(transformer, weights, pictures, 64, budget=budget)
    assert layers_of(plan) == (0, 2, 3)
    assert plan.chosen.speed == pytest.approx(20 / 17)
    with apply_edit(transformer, weights, plan.chosen.layers) as handle:
        assert handle.blocks == (0, 2, 3)
        found = teacher_distance(transformer, handle, BACKBONES[backbone], pictures, seed=0)
    assert found.prediction == pytest.approx(plan.chosen.error, rel=1e-5)
    assert found.prediction <= budget
    assert {key.split(".")[0] for key in found.attentions} == {"0", "2", "3"}
    assert torch.equal(models.forward(transformer, 16, 16), before)


def test_no_error_allows_no_block_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer = model()
    plan = make_plan(transformer, EDiTWeights.init(transformer), batches(), 64, budget=0.0)
    assert (plan.chosen.layers, plan.chosen.error, plan.chosen.speed) == ("none", 0.0, 1.0)
    assert str(plan).endswith("budget 0: no block can be made linear\nlayers: none")
    assert len(plan.curve) == BLOCKS


def test_one_block_that_fits_is_found_behind_others_that_save_more_per_error(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, pictures = model(), batches()
    weights = EDiTWeights.init(transformer)
    timed(monkeypatch, 1, 1, 1, 1)
    errors = {cost.block: cost.error for cost in make_plan(transformer, weights, pictures, 64, budget=0).blocks}
    least = min(errors, key=errors.__getitem__)
    timed(monkeypatch, *(1e-6 if block == least else 2 for block in range(BLOCKS)))
    budget = (errors[least] + sorted(errors.values())[1]) / 2
    assert layers_of(make_plan(transformer, weights, pictures, 64, budget=budget)) == (least,)


def test_blocks_come_by_error_per_second_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer, pictures = model(), batches()
    weights = models.trained_like(transformer)
    costs = make_plan(transformer, weights, pictures, 64, budget=1e9).blocks
    most = max(cost.error for cost in costs)
    timed(monkeypatch, *((cost.error / most) ** 2 for cost in costs))
    curve = make_plan(transformer, weights, pictures, 64, budget=1e9).curve
    by_error = sorted(costs, key=lambda cost: -cost.error)
    for count, point in enumerate(curve, start=1):
        assert parse_layers(point.layers, BLOCKS) == tuple(sorted(cost.block for cost in by_error[:count]))


def test_what_counts_is_the_prediction_and_not_how_well_an_attention_is_imitated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer = model()
    for parameter in transformer.transformer_blocks[2].attn1.to_out[0].parameters():
        parameter.data *= 1e-3  # so that next to nothing depends on this attention
    plan = make_plan(transformer, models.trained_like(transformer), batches(), 64, budget=0)
    others = [cost for cost in plan.blocks if cost.block != 2]
    assert plan.blocks[2].attention > 0.3 * min(cost.attention for cost in others)
    assert plan.blocks[2].error < 0.01 * min(cost.error for cost in others)
    assert plan.curve[0].layers == "2"


def test_blocks_that_are_not_faster_and_blocks_without_weights_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, -0.5, 0, 1)
    transformer = model()
    plan = make_plan(transformer, EDiTWeights.init(transformer), batches(), 64, budget=1e9)
    assert layers_of(plan) == (0, 3)
    assert "blocks 1-2 stay dense: linear attention is not faster there" in str(plan)
    plan = make_plan(transformer, EDiTWeights.init(transformer, layers="0-1"), batches(), 64, budget=1e9)
    assert layers_of(plan) == (0,)
    assert [cost.block for cost in plan.blocks] == [0, 1]
    timed(monkeypatch, -1, -1, -1, -1)
    plan = make_plan(transformer, EDiTWeights.init(transformer), batches(), 64)
    assert plan.chosen.layers == "none"
    assert "budget 0.02 (the default): no block can be made linear" in str(plan)


# --- up to a speed ---


def test_a_speed_is_reached_with_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer, pictures = model(), batches()
    weights = models.trained_like(transformer)
    whole = make_plan(transformer, weights, pictures, 64, budget=1e9)
    for count in range(1, BLOCKS + 1):
        speed = 20 / (20 - count) - 1e-6
        plan = make_plan(transformer, weights, pictures, 64, speed=speed)
        assert plan.chosen.speed >= speed
        assert plan.chosen.error == min(point.error for point in whole.curve if point.speed >= speed)
    with pytest.raises(EDiTError, match=r"1.5× cannot be reached at 64² pixels here: blocks 0-3, all .* 1.25×"):
        make_plan(transformer, weights, pictures, 64, speed=1.5)


def test_blocks_that_a_speed_can_do_without_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1, 1, 1, 1)
    transformer, pictures = model(), batches()
    weights = models.trained_like(transformer, config=EDiTConfig())
    first, second = [parse_layers(point.layers, BLOCKS) for point in
                     make_plan(transformer, weights, pictures, 64, budget=0).curve[:2]]  # fmt: skip
    (cheap,), (dear,) = first, set(second) - set(first)
    timed(monkeypatch, *({cheap: 0.9, dear: 1.0}.get(block, 0.01) for block in range(BLOCKS)))
    order = make_plan(transformer, weights, pictures, 64, budget=0).curve
    assert order[0].layers == str(cheap)
    plan = make_plan(transformer, weights, pictures, 64, speed=20 / 19 - 1e-6)
    assert layers_of(plan) == (dear,)
    assert plan.chosen.error < order[1].error


# --- times ---


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_every_block_is_timed_in_its_place(backbone: str) -> None:
    transformer = model(backbone)
    before = models.forward(transformer, 16, 16)
    weights = EDiTWeights.init(transformer, layers="0, 2-3")
    slow = transformer.transformer_blocks[2].attn1 if backbone == "pixart_sigma" else (
        transformer.transformer_blocks[2].attn
    )  # fmt: skip
    softmax = slow.processor

    class Slow:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return softmax(*args, **kwargs)

    slow.processor = Slow()
    times = measure_times(transformer, weights, 128, repeats=3)
    assert list(times.dense) == list(times.linear) == [0, 2, 3]
    assert times.dense[2] > 0.05 > max(times.dense[0], times.dense[3], *times.linear.values())
    assert times.teacher > 0.05
    assert 0 < times.student < times.teacher
    speeds = {layers: planning.step_speed(transformer, weights, 128, 3, layers) for layers in ("0", "2")}
    assert speeds["2"] > speeds["0"]
    slow.processor = softmax
    assert torch.equal(models.forward(transformer, 16, 16), before)


def test_the_stopwatch_alternates_and_passes_on_the_teachers_output() -> None:
    watch, called = planning._Stopwatch(torch.device("cpu")), []
    for linear_first in (False, True):
        watch.linear_first = linear_first
        assert (
            watch("0.self", lambda: called.append("dense") or "teacher", lambda: called.append("linear")) == "teacher"
        )
    assert called == ["dense", "linear", "linear", "dense"]
    assert {key: len(values) for key, values in watch.seconds.items()} == {
        ("dense", "0.self"): 2, ("linear", "0.self"): 2
    }  # fmt: skip


# --- what cannot be ---


def test_numbers_that_cannot_be_are_one_sentence() -> None:
    transformer = model("sd35_medium")
    weights = EDiTWeights.init(transformer)
    for size, settings, part in (
        (64, {"budget": -0.1}, "a budget of -0.1 cannot be"),
        (64, {"budget": float("nan")}, "a budget of nan cannot be"),
        (64, {"speed": 1.0}, "a speed of 1× needs no plan"),
        (64, {"repeats": 0}, "at least one repeat"),
        (100, {}, "multiples of 16"),
        (1024, {}, "draws at most 768 pixels per side, and cannot draw 1024x1024"),
    ):
        with pytest.raises(EDiTError, match=part):
            make_plan(transformer, weights, batches("sd35_medium", 1), size, **settings)  # type: ignore[arg-type]
    next(tensor for name, tensor in weights.tensors.items() if name.startswith("2.")).fill_(torch.nan)
    with pytest.raises(EDiTError, match="linear the prediction is not finite in"):
        make_plan(transformer, weights, batches("sd35_medium", 1), 64, repeats=1)


def test_a_form_without_weights_is_planned_for_all_blocks() -> None:
    transformer, student = model("sd35_medium"), EDiTConfig.preset("piecewise", quality="fast")
    plan = make_plan(transformer, student, batches("sd35_medium", 1), 64, budget=0, repeats=1)
    assert [cost.block for cost in plan.blocks] == [*range(BLOCKS)]
    assert all(cost.error > 0 and cost.linear > 0 for cost in plan.blocks)
    assert (plan.form, plan.chosen.layers) == ("piecewise", "none")
    assert "piecewise ms" in str(plan) and "no block can be made piecewise" in str(plan)
    assert "linear" not in str(plan)
    with pytest.raises(EDiTError, match="needs weights"):
        make_plan(transformer, EDiTConfig(), batches("sd35_medium", 1), 64)


# --- the command ---


def test_the_command(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edit_core.distill.teacher import load_teacher

    paths = prepared("pixart_sigma")
    transformer = load_teacher(paths["model"], torch.float32, torch.device("cpu"))
    file, output = tmp_path / "student.safetensors", tmp_path / "plan.json"
    EDiTWeights.init(transformer).save(file)
    common = ["plan", "--model", paths["model"], "--weights", file, "--cache", paths["cache"], "--device", "cpu"]
    common += ["--resolution", training.RESOLUTION, "--size", 512, "--batches", 1, "--repeats", 2]

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = main([str(a) for a in (*common, *arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    status, text, err = run("--budget", 0.05, "--output", output)
    assert status == 0, err
    (layers,) = re.findall(r"^layers: (.*)$", text, re.MULTILINE)
    with apply_edit(transformer, EDiTWeights.load(file), layers):
        pass
    data = json.loads(output.read_text())
    assert data["layers"] == data["chosen"]["layers"] == layers
    assert data["chosen"]["error"] <= 0.05
    assert data["pictures"] == 4
    assert [block["block"] for block in data["blocks"]] == [0, 1]
    assert f"{data['blocks'][1]['error']:.3g}" in text
    status, text, _ = run("--json")
    assert status == 0
    assert json.loads(text)["goal"] == "budget 0.02 (the default)"

    common[3:5] = []
    status, text, err = run("--preset", "piecewise", "--quality", "fast", "--json")
    assert (status, json.loads(text)["form"]) == (0, "piecewise"), err
    assert "give either --weights FILE or --preset piecewise" in run()[2]
    common[3:3] = ["--weights", file]
    assert "give either --weights FILE or --preset piecewise" in run("--preset", "piecewise")[2]
    assert "--quality is of --preset piecewise" in run("--quality", "fast")[2]
    EDiTWeights.init(models.make("sd35_medium")).save(tmp_path / "other.safetensors")
    for arguments, part in (
        (("--weights", tmp_path / "none"), "there is no such file"),
        (("--weights", tmp_path / "other.safetensors"), "was made for pixart_sigma, but"),
        (("--cache", tmp_path), "not a cache"),
        (("--model", tmp_path), "no transformer/config.json"),
        (("--resolution", 99), "no resolution 99"),
        (("--batches", 0), "at least 1"),
        (("--speed", 99), "cannot be reached"),
        (("--output", tmp_path / "none" / "plan.json"), "cannot be written"),
        (("--device", "gpu"), "cannot be used here"),
    ):
        status, text, err = run(*arguments)
        assert (status, text) == (2, ""), arguments
        assert part in err.splitlines()[-1]
    with pytest.raises(SystemExit):
        run("--budget", 1, "--speed", 2)
