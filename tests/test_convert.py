"""`edit convert`: checkpoints to weights, differences into a base, and out of one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import models

from edit_core import EDiTWeights, apply_edit
from edit_core.backbones import identify_module
from edit_core.basefile import BaseFile
from edit_core.cli import main
from edit_core.distill.checkpoint import save_checkpoint

KINDS = ("low_rank", "full")


def trained(model: Any, kind: str) -> EDiTWeights:
    return models.trained_like(model, trainable=kind, rank=3)


def convert(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    """What the command says; its error line for a status of 2."""
    assert main(["convert", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    assert not status or (err.count("\n") == 1 and not out), err
    return out + err


def in_comfys_names(model: Any) -> dict[str, torch.Tensor]:
    """As far as conversions care: the linears as ComfyUI keeps them, what identifies the file, and something else."""
    base, state = identify_module(model), model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    linears = [x for b in range(base.depth) for site in base.sites[b] for x in base.backbone.linears(b, site)]
    for part in ("weight", "bias"):
        for linear in linears:
            if (key := f"{linear.diffusers}.{part}") in state:
                name = f"model.diffusion_model.{linear.comfy}.{part}"
                tensors[name] = torch.cat([tensors[name], state[key]]) if name in tensors else state[key]
    for name in base.backbone.ends["comfy"]:
        tensors[f"model.diffusion_model.{name}"] = torch.randn(5)
    if base.backbone.name.startswith("pixart"):
        for name in ("t_block.1.bias", "blocks.0.cross_attn.kv_linear.bias"):
            tensors[f"model.diffusion_model.{name}"] = torch.randn(5)
    if base.backbone.name == "pixart_alpha":
        tensors["model.diffusion_model.csize_embedder.mlp.0.weight"] = torch.randn(5, 5)
    return {**tensors, "vae.something": torch.arange(7).to(torch.float8_e4m3fn), "step": torch.tensor(3)}


# --- from a checkpoint ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, EDiTWeights]:
    weights = trained(models.pixart(), "low_rank")
    weights.training = {"steps": 5}
    tensors = {f"weights.{name}": tensor for name, tensor in weights.tensors.items()}
    tensors.update({f"ema.{name}": 2 * tensor for name, tensor in weights.tensors.items()})
    tensors.update({f"optimizer.{name}.exp_avg": 0 * tensor for name, tensor in weights.tensors.items()})
    return save_checkpoint(tmp_path / "checkpoints", 5, tensors, {"weights": weights.metadata()}, keep=1), weights


@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_becomes_weights_without_its_teacher(
    raw: bool, checkpoint: tuple[Path, EDiTWeights], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, weights = checkpoint
    output = tmp_path / "student.safetensors"
    said = convert(capsys, folder, "--output", output, *(["--raw"] if raw else []))
    assert "blocks 0-1, which change 8 of the base's linears" in said
    loaded, report = EDiTWeights.load_with_report(output)
    assert loaded.metadata() == weights.metadata()
    assert loaded.tensors.keys() == weights.tensors.keys()
    assert not report.unexpected
    for name, tensor in weights.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor if raw else 2 * tensor), name


def test_a_checkpoint_without_an_average_gives_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = EDiTWeights.init(models.pixart())
    tensors = {f"weights.{name}": tensor for name, tensor in weights.tensors.items()}
    folder = save_checkpoint(tmp_path / "checkpoints", 1, tensors, {"weights": weights.metadata()}, keep=1)
    convert(capsys, folder, "--output", tmp_path / "w.safetensors")
    loaded = EDiTWeights.load(tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in weights.tensors.items())


# --- into a base ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_merged_base_and_side_weights_do_what_base_and_full_weights_do(
    backbone: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.make(backbone)
    weights = trained(model, kind)
    weights.save(tmp_path / "w.safetensors")
    with apply_edit(model, weights):
        expected = models.forward(model)
    model.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="200KB")
    said = convert(
        capsys, tmp_path / "w.safetensors", "--merge", tmp_path / "pipe", "--output", tmp_path / "merged", "--json"
    )
    data = json.loads(said)
    assert data["linears"] == len(weights.differences())
    assert data["warning"] is None
    source = tmp_path / "pipe" / "transformer"
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in source.iterdir()}
    assert len(list(source.glob("*.safetensors"))) > 1
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    sides = EDiTWeights.load(data["weights"])
    assert Path(data["weights"]) == tmp_path / "merged.edit.safetensors"
    assert not sides.differences()
    state = merged.state_dict()
    assert sides.warning(identify_module(merged), state.__getitem__) is None
    assert kind == "low_rank" or sides.base_hash != weights.base_hash, "the fingerprint is of the merged base"
    with apply_edit(merged, sides):
        assert models.relative_error(models.forward(merged), expected) < 1e-5
    changed = {f"{path}.{part}" for path in weights.differences() for part in ("weight", "bias")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name not in changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_file_in_comfys_names_keeps_all_else_byte_for_byte(
    backbone: str, kind: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.make(backbone)
    weights = trained(model, kind)
    weights.save(tmp_path / "w.safetensors")
    tensors = {k: t.to(dtype) if t.dtype == torch.float32 else t for k, t in in_comfys_names(model).items()}
    save_file(tensors, tmp_path / "base.safetensors", {"modelspec.title": "mine"})
    save_file(dict(model.state_dict()), tmp_path / "diffusers.safetensors")
    for base in ("base", "diffusers"):
        convert(
            capsys, tmp_path / "w.safetensors", "--merge", tmp_path / f"{base}.safetensors",
            "--output", tmp_path / f"{base}-merged.safetensors",
        )  # fmt: skip
    with safe_open(tmp_path / "base-merged.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.title": "mine"}
    merged, wanted = (
        load_file(tmp_path / "base-merged.safetensors"),
        load_file(tmp_path / "diffusers-merged.safetensors"),
    )
    assert merged.keys() == tensors.keys()
    changed = set()
    base, tolerance = BaseFile(tmp_path / "base-merged.safetensors").identify(), torch.finfo(dtype).eps
    for linear in (linear for block in range(base.depth) for linear in base.linears(block)):
        module, rows = base.place(linear)
        for part in ("weight", "bias"):
            got, want = merged[f"{module}.{part}"], wanted[f"{linear.diffusers}.{part}"]
            assert got.dtype == dtype
            assert torch.allclose(got[rows].float(), want, rtol=2 * tolerance, atol=2 * tolerance), linear
            changed.add(f"{module}.{part}")
    for name, tensor in tensors.items():
        same = torch.equal(merged[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert same != (name in changed and (kind == "full" or name.endswith("weight"))), name


# --- and out again ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_split_undoes_merge(backbone: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.make(backbone)
    weights = trained(model, kind)
    weights.save(tmp_path / "w.safetensors")
    save_file(in_comfys_names(model), tmp_path / "base.safetensors")
    model.save_pretrained(tmp_path / "transformer")
    convert(
        capsys, tmp_path / "w.safetensors", "--merge", tmp_path / "base.safetensors",
        "--output", tmp_path / "merged.safetensors",
    )  # fmt: skip
    with apply_edit(model, weights):
        expected = models.forward(model)
    for before in ("base.safetensors", "transformer"):  # of another format than the merged one
        output = tmp_path / f"again-{before}.safetensors"
        data = json.loads(
            convert(
                capsys, tmp_path / "merged.edit.safetensors", "--split", tmp_path / before,
                tmp_path / "merged.safetensors", "--output", output, "--json",
            )
        )  # fmt: skip
        assert data["lost"] == 0
        again = EDiTWeights.load(output)
        assert data["linears"] == len(again.differences()) == len(weights.differences())
        assert again.base_hash == weights.base_hash
        with apply_edit(model, again):
            assert models.relative_error(models.forward(model), expected) < 1e-5


def test_split_keeps_what_changed_and_says_what_it_cannot_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.pixart().half()
    EDiTWeights.init(model).save(tmp_path / "w.safetensors")
    save_file(dict(model.state_dict()), tmp_path / "a.safetensors")
    model.transformer_blocks[1].attn1.to_k.weight.data += 0.5
    model.proj_out.bias.data += 1
    save_file(dict(model.state_dict()), tmp_path / "b.safetensors")
    said = convert(
        capsys, tmp_path / "w.safetensors", "--split", tmp_path / "a.safetensors", tmp_path / "b.safetensors",
        "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert "1 linears; 1 other tensors of the two bases differ too" in said
    weights = EDiTWeights.load(tmp_path / "out.safetensors")
    assert list(weights.differences()) == ["transformer_blocks.1.attn1.to_k"]
    assert weights.differences()["transformer_blocks.1.attn1.to_k"]["weight"].dtype == torch.float16


# --- mistakes ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    model, other = models.pixart(), models.sd35()
    trained(model, "full").save(folder / "full.safetensors")
    EDiTWeights.init(model).save(folder / "sides.safetensors")
    state = dict(model.state_dict())
    save_file(state, folder / "pixart.safetensors")
    save_file(dict(other.state_dict()), folder / "sd35.safetensors")
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in state.items()}, folder / "fp8.safetensors")
    key = "transformer_blocks.1.attn1.to_v.weight"
    save_file({k: t for k, t in state.items() if k != key}, folder / "holed.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "pixart.safetensors").read_bytes()[:5000])
    (folder / "taken").write_text("mine")
    (folder / "stem.edit.safetensors").write_text("mine")
    for name, text in (("damaged", "{"), ("old", "{}"), ("list", "[]"), ("numbers", '{"weights": {"a": 1}}')):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text(text)
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("full.safetensors",), "is not a checkpoint's folder; for EDiT weights give --merge or --split too"),
        (("empty",), "state.json: there is no such file"),
        (("damaged",), "cannot be read"),
        (("old",), "does not say what its weights are for"),
        (("list",), "does not say what its weights are for"),
        (("numbers",), "does not say what its weights are for"),
        (("none.safetensors", "--merge", "pixart.safetensors"), "no such file"),
        (("full.safetensors", "--merge", "none"), "no such file"),
        (("full.safetensors", "--merge", "cut.safetensors"), "not a complete safetensors file"),
        (("full.safetensors", "--merge", "sd35.safetensors"), "for PixArt-Σ, but the model is Stable"),
        (("full.safetensors", "--merge", "fp8.safetensors"), "is F8_E4M3; this takes a base in F32, F16, BF16"),
        (("full.safetensors", "--merge", "holed.safetensors"), "attn1.to_v.weight is missing"),
        (("sides.safetensors", "--merge", "pixart.safetensors"), "change nothing in the base"),
        (("full.safetensors", "--split", "pixart.safetensors", "pixart.safetensors"), "hold differences already"),
        (("sides.safetensors", "--split", "pixart.safetensors", "pixart.safetensors"), "nothing to split"),
        (("sides.safetensors", "--split", "pixart.safetensors", "sd35.safetensors"), "sd35.safetensors is Stable"),
        (("sides.safetensors", "--split", "pixart.safetensors", "holed.safetensors"), "to_v.weight is missing"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    arguments: tuple[str, ...], part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(place.iterdir())
    paths = [a if a.startswith("--") else place / a for a in arguments]
    assert part in convert(capsys, *paths, "--output", place / "out.safetensors", status=2)
    assert set(place.iterdir()) == before


def test_nothing_is_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = (place / "full.safetensors", "--merge", place / "pixart.safetensors", "--output")
    assert "taken exists already" in convert(capsys, *merge, place / "taken", status=2)
    assert "stem.edit.safetensors exists already" in convert(capsys, *merge, place / "stem.safetensors", status=2)
    assert not (place / "stem.safetensors").exists()
    assert "is not a folder" in convert(capsys, *merge, place / "nowhere" / "x.safetensors", status=2)
    assert (place / "taken").read_text() == (place / "stem.edit.safetensors").read_text() == "mine"


def test_merging_into_another_base_warns(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(dict(models.pixart(seed=9).state_dict()), tmp_path / "other.safetensors")
    said = convert(
        capsys, place / "full.safetensors", "--merge", tmp_path / "other.safetensors", "--output", tmp_path / "m",
    )  # fmt: skip
    assert "made for another base model" in said
