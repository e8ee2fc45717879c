"""Weights files: round trips, and one clear sentence for everything that can be wrong with one."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models

from edit_core import EDiTConfig, EDiTError, EDiTWeights, EDiTWeightsError
from edit_core.attention import naive
from edit_core.backbones import identify_module
from edit_core.weights import build_sides, fingerprint, fingerprint_distance


def metadata_of(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    models.trained_like(models.pixart()).save(path)
    return path


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_saved_file_loads_equal(backbone: str, tmp_path: Path) -> None:
    weights = models.trained_like(models.make(backbone), config=EDiTConfig(compression=2, normaliser="exact"))
    weights.training = {"steps": 3, "data": "none"}
    path = tmp_path / "w.safetensors"
    weights.save(path)
    loaded, report = EDiTWeights.load_with_report(path)
    assert (loaded.backbone, loaded.config, loaded.base_hash, loaded.training) == (
        weights.backbone, weights.config, weights.base_hash, weights.training,
    )  # fmt: skip
    assert loaded.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(t, loaded.tensors[name]) for name, t in weights.tensors.items())
    assert report.unexpected == ()
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"], "a partial file was left"
    assert set(metadata_of(path)) == {"format", "format_version", "backbone", "config", "base_hash", "training"}


def test_names_are_those_of_the_contract() -> None:
    names = set(EDiTWeights.init(models.sd35(), EDiTConfig()).tensors)
    assert {"0.self.conv_fusion.down.weight", "0.joint.compress_k.conv.weight", "2.joint.conv_fusion.up.bias"} <= names
    assert not any(name.startswith("2.self") for name in names), "block 2 has no attn2"


def test_real_sizes_have_the_papers_parameter_counts() -> None:
    for dim, millions in ((1152, 3.3), (1536, 5.9)):
        sides = build_sides(dim, {0: ("self",)}, EDiTConfig(), device=torch.device("meta"))
        assert sum(p.numel() for p in sides.parameters()) / 1e6 == pytest.approx(millions, abs=0.07)


def test_a_new_student_starts_at_the_teachers_query_and_smoothed_keys() -> None:
    weights = EDiTWeights.init(models.pixart(), EDiTConfig())
    state = {name.removeprefix("0.self."): t for name, t in weights.tensors.items() if name.startswith("0.self.")}
    x, q = torch.randn(2, 30, 72), torch.randn(2, 30, 72)
    assert torch.equal(naive.conv_fusion(x, q, state, (5, 6), weights.config), q)
    kernel = state["compress_k.conv.weight"][5, 0]
    assert torch.equal(kernel, torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)
    stride1 = EDiTWeights.init(models.pixart(), EDiTConfig(kv_stride=1)).tensors["0.self.compress_v.conv.weight"][0, 0]
    assert torch.equal(stride1, torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))


def test_init_is_reproducible_and_seeded() -> None:
    model = models.pixart()
    a, b, c = EDiTWeights.init(model), EDiTWeights.init(model), EDiTWeights.init(model, seed=1)
    assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    assert not torch.equal(a.tensors["0.self.conv_fusion.down.weight"], c.tensors["0.self.conv_fusion.down.weight"])


def test_init_of_some_layers_holds_only_those() -> None:
    weights = EDiTWeights.init(models.sd35(), layers="0, 2")
    assert weights.sites == {0: ("joint", "self"), 2: ("joint",)}
    base = identify_module(models.sd35())
    assert weights.choose("all", base) == (0, 2)
    with pytest.raises(EDiTWeightsError, match="hold no block 1; they hold 0, 2"):
        weights.choose("0-2", base)


def rewrite(path: Path, tensors: dict[str, Any] | None = None, **metadata: str | None) -> None:
    fields = {k: v for k, v in {**metadata_of(path), **metadata}.items() if v is not None}
    save_file({**load_file(path), **(tensors or {})}, path, fields)


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"format": "pt"}, "not an EDiT weights file"),
        ({"format": None}, "not an EDiT weights file"),
        ({"format_version": "2"}, "format_version '2'"),
        ({"backbone": "flux"}, "'flux'"),
        ({"config": "{"}, "damaged"),
        ({"config": '{"compression": 8}'}, "compression=8 asks for 72x9"),
        ({"config": '{"compression": "four"}'}, "compression"),
        ({"training": "["}, "damaged"),
        ({"training": "[]"}, "training is not a JSON object"),
    ],
)
def test_wrong_metadata_is_one_clear_sentence(saved: Path, metadata: dict[str, str | None], part: str) -> None:
    rewrite(saved, **metadata)
    with pytest.raises(EDiTWeightsError) as caught:
        EDiTWeights.load(saved)
    assert part in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"1.self.local.weight": torch.zeros(72, 1, 5, 5)}, "72x1x5x5, but the config asks for 72x1x3x3"),
        ({"1.self.local.weight": torch.zeros(72, 1, 3, 3, dtype=torch.int64)}, "I64"),
        ({"1.self.conv_fusion.up.weight": torch.zeros(72, 9)}, "1.self.conv_fusion.up.weight is 72x9"),
        ({"7.self.conv_fusion.up.weight": torch.zeros(72, 18)}, "9 tensors are missing, 7.self"),
    ],
)
def test_wrong_tensors_are_named_with_their_numbers(saved: Path, tensors: dict[str, Any], part: str) -> None:
    rewrite(saved, tensors)
    with pytest.raises(EDiTWeightsError, match=part):
        EDiTWeights.load(saved)


def test_unexpected_tensors_are_reported_and_ignored(saved: Path) -> None:
    rewrite(saved, {"0.self.new_thing": torch.zeros(3), "whatever": torch.zeros(2)})
    weights, report = EDiTWeights.load_with_report(saved)
    assert "2 unexpected tensors ignored: 0.self.new_thing, whatever" in str(report)
    assert "whatever" not in weights.tensors


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_files_are_said_to_be_so(saved: Path, keep: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(EDiTWeightsError, match="not a complete safetensors file"):
        EDiTWeights.load(saved)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"0.self.x": Bomb()}, path)
    with pytest.raises(EDiTWeightsError):
        EDiTWeights.load(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_files_and_folders_are_said_to_be_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(EDiTWeightsError, match="no such file"):
            EDiTWeights.load(path)


def test_a_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    weights = EDiTWeights.load(saved)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        weights.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_disk_that_cannot_synchronise_folders_is_saved_to(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network disks cannot: the file lay there whole, and saving it was said to have failed."""
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    weights = EDiTWeights.load(saved)
    monkeypatch.setattr(os, "fsync", of_files)
    other = saved.with_name("other.safetensors")
    weights.save(other, replace=False)
    assert set(EDiTWeights.load(other).tensors) == set(weights.tensors)
    assert sorted(saved.parent.iterdir()) == [other, saved]


def test_weights_of_another_backbone_width_or_depth_are_refused() -> None:
    pixart = EDiTWeights.init(models.pixart())
    for model, part in (
        (models.sd35(), "for PixArt-Σ, but the model is Stable Diffusion 3.5-Medium"),
        (models.pixart(heads=2), "72 channels, but this one has 36"),
        (models.pixart(blocks=1), "the model has no such block there"),
    ):
        with pytest.raises(EDiTWeightsError, match=part):
            pixart.check_base(identify_module(model))
    fewer_attn2 = models.sd35(dual=(0,))
    with pytest.raises(EDiTWeightsError, match=r"block 1 \(joint and self\), but the model has joint there"):
        EDiTWeights.init(models.sd35()).check_base(identify_module(fewer_attn2))


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_the_fingerprint_tells_bases_apart_and_survives_casts(backbone: str) -> None:
    model, other = models.make(backbone), models.make(backbone, seed=7)
    base = identify_module(model)
    own = fingerprint(base, model.state_dict().__getitem__)
    assert fingerprint_distance(own, fingerprint(base, other.state_dict().__getitem__)) > 1
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        cast = models.make(backbone).to(dtype)
        assert fingerprint_distance(own, fingerprint(base, cast.state_dict().__getitem__)) < 0.2, dtype
    weights = EDiTWeights.init(model)
    assert weights.warning(base, model.state_dict().__getitem__) is None
    assert "made for another base" in str(weights.warning(base, other.state_dict().__getitem__))


@pytest.mark.parametrize("text", ["", "!!", "AAAA", "AAAAA"])
def test_a_damaged_fingerprint_only_warns(text: str) -> None:
    weights = EDiTWeights.init(models.pixart())
    weights.base_hash = text
    model = models.pixart()
    assert weights.warning(identify_module(model), model.state_dict().__getitem__) is not None


def test_errors_are_value_errors_that_share_one_class() -> None:
    assert issubclass(EDiTWeightsError, EDiTError)
    assert issubclass(EDiTError, ValueError)
