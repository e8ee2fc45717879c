"""Differences on the base's own linears: what they compute, train and leave alone, and their place in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from test_weights import metadata_of

from edit_core import EDiTError, EDiTWeights, EDiTWeightsError, apply_edit
from edit_core.backbones import identify_module
from edit_core.cli import main
from edit_core.weights.differences import in_full

KINDS = ("low_rank", "full")
Q = "base.transformer_blocks.0.attn1.to_q"


def trained(model: Any, kind: str, layers: str = "all") -> EDiTWeights:
    """Weights all of whose parts and differences matter."""
    return models.trained_like(model, trainable=kind, rank=3, layers=layers)


@torch.no_grad()
def merged_by_hand(model: Any, weights: EDiTWeights) -> EDiTWeights:
    """Writes the differences into the model's weights; returns the weights without them."""
    for path, parts in weights.differences().items():
        linear = model.get_submodule(path)
        linear.weight += in_full(parts, "weight")
        linear.bias += parts.get("bias", 0)
    sides = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("base.")}
    return EDiTWeights(weights.backbone, weights.config, sides, weights.base_hash)


# --- what they compute ---


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_they_do_what_changed_linears_would(backbone: str, kind: str, fused: bool) -> None:
    model, other = models.make(backbone), models.make(backbone)
    weights = trained(model, kind)
    sides = merged_by_hand(other, weights)
    for module in model.modules() if fused else ():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    with apply_edit(other, sides):
        expected = models.forward(other)
    with apply_edit(model, sides):
        assert models.relative_error(models.forward(model), expected) > 1e-3, "the differences change nothing"
    with apply_edit(model, weights):
        assert models.relative_error(models.forward(model), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_new_ones_have_no_effect_and_change_no_side_weight(backbone: str, kind: str) -> None:
    model = models.make(backbone)
    plain, weights = EDiTWeights.init(model), EDiTWeights.init(model, trainable=kind, rank=5)
    assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in plain.tensors.items())
    assert not plain.differences()
    assert (weights.sites, weights.dim, weights.base_hash) == (plain.sites, plain.dim, plain.base_hash)
    with apply_edit(model, plain):
        expected = models.forward(model)
    with apply_edit(model, weights):
        assert torch.equal(models.forward(model), expected)
    if kind == "low_rank":  # PEFT's initialisation
        downs = [tensor for name, tensor in weights.tensors.items() if name.endswith("lora_A.weight")]
        assert all(tensor.shape == (5, weights.dim) for tensor in downs)
        assert 0.9 * weights.dim**-0.5 < max(float(t.abs().max()) for t in downs) <= weights.dim**-0.5
        assert not torch.equal(downs[0], downs[1])


def test_every_linear_of_a_replaced_attention_has_one_and_no_other() -> None:
    paths = set(EDiTWeights.init(models.pixart(), trainable="full", layers="1").differences())
    assert paths == {f"transformer_blocks.1.attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")}
    sd35 = models.sd35()
    paths = set(EDiTWeights.init(sd35, trainable="full").differences())
    image = ("to_q", "to_k", "to_v", "to_out.0")
    prompt = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"transformer_blocks.{b}.attn.{x}" for b in (0, 1) for x in image + prompt}
    expected |= {f"transformer_blocks.{b}.attn2.{x}" for b in (0, 1) for x in image}
    # The last block emits no prompt tokens: its prompt queries are there and lead nowhere.
    expected |= {f"transformer_blocks.2.attn.{x}" for x in (*image, "add_k_proj", "add_v_proj")}
    assert paths == expected
    assert all(isinstance(sd35.get_submodule(path), torch.nn.Linear) for path in paths)
    assert sd35.transformer_blocks[2].attn.to_add_out is None


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_base_that_holds_them_already_is_told_of(backbone: str, caplog: pytest.LogCaptureFixture) -> None:
    """What ComfyUI's ModelSave writes of a student, and what `convert --merge` writes, has them in its weights."""
    model, saved = models.make(backbone), models.make(backbone)
    weights = trained(model, "full")
    sides = merged_by_hand(saved, weights)
    for dtype in (torch.float32, torch.bfloat16):
        apply_edit(model.to(dtype), weights).remove()
        apply_edit(saved.to(dtype), sides).remove()
        assert "EDiT" not in caplog.text
        apply_edit(saved, weights).remove()
        assert "added once more" in caplog.text
        caplog.clear()


@torch.no_grad()
def test_layers_choose_the_blocks_that_are_changed() -> None:
    model = models.sd35()
    weights = trained(model, "low_rank")
    with apply_edit(model, weights, layers="1") as handle:
        assert {name.split(".")[2] for name in handle.trainable() if name.startswith("base.")} == {"1"}
        got = models.forward(model)
    other = models.sd35()
    only = {n: t for n, t in weights.tensors.items() if n.startswith(("1.", "base.transformer_blocks.1."))}
    with apply_edit(other, EDiTWeights(weights.backbone, weights.config, only, weights.base_hash)):
        assert torch.equal(models.forward(other), got)


# --- training ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_gradients_are_those_of_changed_linears_and_the_teacher_stays_bit_equal(backbone: str, kind: str) -> None:
    model, other = (models.make(backbone).requires_grad_(False) for _ in range(2))
    weights = trained(model, kind)
    sides = merged_by_hand(other, weights)
    with torch.no_grad():
        before = models.forward(model)
    teacher: list[Any] = []

    def tap(key: str, dense: Any, edit: Any) -> Any:
        """Both in one pass, as a training does; the student's output goes on."""
        with torch.no_grad():
            teacher.append(dense())
        return edit()

    with apply_edit(model, weights) as handle:
        for module in (handle.sides, handle.differences):
            module.float().requires_grad_(True)
        parameters = handle.trainable()
        assert list(parameters) == list(weights.tensors), "the names of a weights file, in its order"
        assert all(torch.equal(p, weights.tensors[name]) for name, p in parameters.items())
        handle.tap = tap
        models.forward(model).square().mean().backward()
        handle.tap = lambda key, dense, edit: dense()
        with torch.no_grad():
            assert torch.equal(models.forward(model), before), "the teacher under the handle"
    assert len(teacher) == sum(map(len, identify_module(model).sites))
    with torch.no_grad():
        assert torch.equal(models.forward(model), before), "removed"
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in parameters.values())
    assert all(p.grad is None for p in model.parameters())

    for path in weights.differences():
        other.get_submodule(path).requires_grad_(True)
    with apply_edit(other, sides):
        models.forward(other).square().mean().backward()
    for path in weights.differences():
        linear = other.get_submodule(path)
        grads = {name: p.grad for name, p in parameters.items() if name.startswith(f"base.{path}.")}
        if kind == "full":
            wanted = {f"base.{path}.weight": linear.weight.grad, f"base.{path}.bias": linear.bias.grad}
        else:
            up, down = (weights.tensors[f"base.{path}.lora_{x}.weight"] for x in "BA")
            wanted = {
                f"base.{path}.lora_B.weight": linear.weight.grad @ down.T,
                f"base.{path}.lora_A.weight": up.T @ linear.weight.grad,
            }
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            # Of keys that a softmax norms among themselves a bias changes nothing, and its gradient is rounding.
            least = 1e-6 * max(float(each.norm()) for each in wanted.values())
            assert float((grad - wanted[name]).norm()) < max(1e-3 * float(wanted[name].norm()), least), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_they_follow_the_transformers_dtype_and_leave_its_names_alone(kind: str) -> None:
    model = models.sd35()
    weights, keys = trained(model, kind), list(model.state_dict())
    with apply_edit(model, weights):
        expected = models.forward(model)
    with apply_edit(model, weights) as handle:
        late = models.forward(model.to(torch.bfloat16))
        assert {p.dtype for p in handle.trainable().values()} == {torch.bfloat16}
    assert models.relative_error(late, expected) < 0.06
    assert list(model.state_dict()) == keys


def test_without_any_nothing_is_registered() -> None:
    model = models.pixart()
    with apply_edit(model, EDiTWeights.init(model)) as handle:
        assert not list(handle.differences.modules())[1:]
        assert all(not len(b.attn1.edit.differences) for b in model.transformer_blocks)
        assert handle.trainable().keys() == dict(handle.sides.named_parameters()).keys()


# --- files ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_saved_file_loads_equal(backbone: str, kind: str, tmp_path: Path) -> None:
    weights = trained(models.make(backbone), kind)
    weights.save(tmp_path / "w.safetensors")
    loaded, report = EDiTWeights.load_with_report(tmp_path / "w.safetensors")
    assert not report.unexpected
    assert loaded.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in weights.tensors.items())
    assert loaded.differences().keys() == weights.differences().keys()


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    trained(models.pixart(), request.param, layers="0").save(path)
    return path


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata_of(path))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lora_A.weight": (3, 72)}, "to_q.lora_A.weight is not a whole difference"),
        ({"lora_B.weight": (72, 3)}, "there is lora_B.weight$"),
        ({"weight": (72, 72)}, "weight is not a whole difference: it takes weight and bias"),
        ({"weight": (72, 72), "bias": (72,), "lora_A.weight": (3, 72)}, "there is bias and lora_A.weight and weight"),
        ({"lora_A.weight": (3, 71), "lora_B.weight": (72, 3)}, "lora_A.weight is 3x71, but a .* 72 channels is 3x72"),
        ({"lora_A.weight": (3, 72), "lora_B.weight": (72, 4)}, "lora_B.weight is 72x4, but a .* is 72x3"),
        ({"lora_A.weight": (0, 72), "lora_B.weight": (72, 0)}, "lora_A.weight is 0x72, but a .* is 1x72"),
        ({"lora_A.weight": (73, 72), "lora_B.weight": (72, 73)}, "lora_A.weight is 73x72, but a .* is 72x72"),
        ({"lora_A.weight": (), "lora_B.weight": ()}, "lora_A.weight is a scalar, but"),
        ({"weight": (72, 71), "bias": (72,)}, "to_q.weight is 72x71"),
        ({"weight": (72, 72), "bias": (1,)}, "to_q.bias is 1, but"),
        ({"weight": (72, 72), "bias": "int"}, "to_q.bias is I64"),
    ],
)
def test_hostile_ones_are_named_with_their_numbers(saved: Path, changes: dict[str, Any], part: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(Q)]:
            del tensors[name]
        for name, shape in changes.items():
            wrong = torch.zeros(72, dtype=torch.int64) if shape == "int" else torch.zeros(shape)
            tensors[f"{Q}.{name}"] = wrong

    rewrite(saved, change)
    with pytest.raises(EDiTWeightsError, match=part) as caught:
        EDiTWeights.load(saved)
    assert Q in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_those_of_linears_that_stay_are_reported_and_ignored(saved: Path) -> None:
    strange = [
        "base.transformer_blocks.0.attn2.to_q.weight",  # cross-attention
        "base.transformer_blocks.1.attn1.to_q.weight",  # a block without side weights
        "base.transformer_blocks.0.attn1.to_q.weight.weight",
        "base.blocks.0.attn.qkv.weight",
    ]
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(2) for name in strange}))
    weights, report = EDiTWeights.load_with_report(saved)
    assert set(report.unexpected) == set(strange)
    assert not set(strange) & set(weights.tensors)
    assert len(weights.differences()) == 4
    apply_edit(models.pixart(), weights).remove()


def test_a_file_may_change_some_linears_alone_and_each_by_its_own_rank(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("base.")]:
            del tensors[name]
        tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"] = torch.ones(72, 72), torch.ones(72, 72)
        key = Q.replace("to_q", "to_k")
        tensors[f"{key}.weight"], tensors[f"{key}.bias"] = torch.ones(72, 72), torch.ones(72)

    rewrite(saved, change)
    weights = EDiTWeights.load(saved)
    assert {path[-4:]: set(parts) for path, parts in weights.differences().items()} == {
        "to_q": {"lora_A.weight", "lora_B.weight"}, "to_k": {"bias", "weight"},
    }  # fmt: skip
    model = models.pixart()
    with torch.no_grad(), apply_edit(model, weights):
        assert torch.isfinite(models.forward(model)).all()


def test_a_base_without_a_changed_linear_is_refused() -> None:
    longer = EDiTWeights.init(models.sd35(blocks=4), trainable="full", layers="2")
    assert "transformer_blocks.2.attn.to_add_out" in longer.differences()
    with pytest.raises(EDiTWeightsError, match="add_q_proj, which the model does not have or use"):
        apply_edit(models.sd35(), longer)


@pytest.mark.parametrize("rank", [0, 73, -1])
def test_a_rank_that_cannot_be_is_one_sentence(rank: int) -> None:
    with pytest.raises(EDiTError, match=f"rank must be from 1 to the model's 72 channels, not {rank}"):
        EDiTWeights.init(models.pixart(), trainable="low_rank", rank=rank)


def test_init_makes_and_info_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = tmp_path / "base.safetensors", tmp_path / "w.safetensors"
    save_file(models.pixart().state_dict(), base)
    assert main(["init", str(base), str(output), "--trainable", "low_rank", "--rank", "2"]) == 0
    assert main(["info", str(output), "--base", str(base)]) == 0
    assert "changes 8 of the base's linears: 8 by rank 2" in capsys.readouterr().out
    assert main(["info", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == {"rank 2": 8}
