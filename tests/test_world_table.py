"""The small world's caches, its classifier, what judges a student, and the table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, world

from edit_core import EDiTWeights, apply_edit
from edit_core.config import DEFAULT
from edit_core.distill.config import load_config
from edit_core.distill.dataset import CachedLatents
from edit_core.errors import EDiTError
from edit_core.world import data, files
from edit_core.world.codec import CHANNELS, encode
from edit_core.world.draw import held_out, pictures, real
from edit_core.world.scenes import Scene
from edit_core.world.text import WorldText
from world import classifier, judge, table
from world.classifier import Classifier

BACKBONES = tuple(CHANNELS)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_cache_holds_the_scenes_as_they_are_drawn(backbone: str, tmp_path: Path) -> None:
    data.main(["--backbone", backbone, "--output", str(tmp_path), "--count", "3", "--size", "128"])
    cached = CachedLatents(str(tmp_path), 128, held_out=0)
    assert cached.backbone == backbone
    batch = cached.collate([0, 1, 2])
    scenes = [Scene.random(data.FIRST + i) for i in range(3)]
    drawn = torch.stack([torch.from_numpy(scene.draw(128, 128)) for scene in scenes]).permute(0, 3, 1, 2)
    expected = encode(backbone, drawn)
    embeds = WorldText().encode_prompts([scene.caption for scene in scenes])["prompt_embeds"]
    for i in range(3):  # in whatever order
        (place,) = [j for j in range(3) if (batch["latent"][j].float() - expected[i]).abs().max() < 0.02]
        assert (batch["prompt_embeds"][place].float() - embeds[i]).abs().max() < 0.02


@pytest.mark.slow
def test_a_classifier_learns_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    torch.manual_seed(0)
    scenes = held_out(64)
    before = classifier.right(Classifier(), scenes, 128, None)
    trained = classifier.train(path, steps=120, batch=32)
    after = classifier.right(trained, scenes, 128, None)
    assert after["ground"] > before["ground"] + 0.2
    shown = real("sd35_medium", scenes[:4], 128)
    again = classifier.load(path).images(shown)
    assert models.relative_error(again, trained.images(shown)) < 0.01
    with pytest.raises(EDiTError, match="is no classifier"):
        classifier.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_real_scenes_are_worth_more_than_other_ones_and_than_noise(backbone: str) -> None:
    eyes, asked = classifier.load(), held_out(48)
    drawn = real(backbone, asked, 256)
    noise = torch.randint(0, 256, drawn.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    best, mixed, worst = (judge.worth(p, asked, backbone, eyes) for p in (drawn, drawn.roll(1, 0), noise))
    assert best["all"] > 0.99 > 0.6 > mixed["all"] > worst["all"]
    assert best["frechet"] == pytest.approx(mixed["frechet"], rel=1e-3)
    assert best["frechet"] < worst["frechet"] / 5


@pytest.mark.parametrize("backbone", models.PIXART_FIRST)
def test_shipped_teachers_and_students_draw_what_captions_say(backbone: str) -> None:
    transformer = files.load_teacher(backbone)
    weights = EDiTWeights.load(files.shipped("edit", backbone))
    asked = held_out(6)
    eyes = classifier.load()
    teacher = judge.worth(pictures(backbone, transformer, asked, 256, steps=12), asked, backbone, eyes)
    with apply_edit(transformer, weights) as handle:
        student = judge.worth(pictures(backbone, transformer, asked, 256, steps=12), asked, backbone, eyes)
        found = judge.cost(backbone, transformer, handle, 512, repeats=1)
        near = judge.distance(backbone, transformer, handle, 256, count=4)
    print(backbone, teacher["all"], student["all"], near)
    assert teacher["all"] > 0.7
    assert student["all"] > 0.35
    assert 0 < near["prediction"] < 0.2
    assert found["flops"] < found["teacher_flops"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_committed_configurations_train_the_tables_students(backbone: str) -> None:
    for method, name in ((DEFAULT, f"world_{backbone}"), ("piecewise_trained", f"world_{backbone}_piecewise")):
        assert table.configured(backbone, method, 0, Path("out/world") / backbone) == load_config(name)


def test_rows_are_missing_until_they_are_there() -> None:
    rows = [{"backbone": "pixart_sigma", "method": "teacher", "seed": 0}]
    todo = table.missing(rows, "pixart_sigma")
    assert todo[0] == ("piecewise_fast", 0)
    assert ("exact", 0) not in todo
    assert {seed for method, seed in todo if method == "sana"} == {0, 1, 2}
    assert {seed for method, seed in todo if method == "no_transfer"} == {0}
    assert ("exact", 0) in table.missing(rows, "sd35_medium")
    assert ("local_mixed", 0) in todo and ("local_mixed", 0) not in table.missing(rows, "sd35_medium")


def test_a_row_is_trained_judged_and_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write_files(tmp_path / "shipped")
    for kind in files.FOLDERS:
        monkeypatch.setitem(files.FOLDERS, kind, tmp_path / "shipped" / kind)
    monkeypatch.setattr(table, "SIZES", (128, 144))
    monkeypatch.setattr(table, "COST_SIZES", (128,))
    monkeypatch.setattr(table, "load_config", quick(table.load_config))
    monkeypatch.setattr(table, "pictures", partial(table.pictures, steps=4))
    monkeypatch.setattr(judge, "distance", partial(judge.distance, count=8))
    results = tmp_path / "world.json"
    results.write_text(json.dumps([{"backbone": "sd35_medium", "method": "edit", "seed": 0}]))
    runs = ["--results", str(results), "--runs", str(tmp_path / "runs"), "--scenes", "40", "--pictures", "8"]
    table.main(["--backbone", "pixart_sigma", "--method", "piecewise_fast", *runs])
    assert not (tmp_path / "runs" / "pixart_sigma" / "cache").exists(), "nothing is trained"
    for method in ("teacher", "sana", "sana"):
        table.main(["--backbone", "pixart_sigma", "--method", method, *runs])
    other, bare, teacher, student = json.loads(results.read_text())
    assert (bare["method"], bare["side"], bare["trained"]) == ("piecewise_fast", 0, 0)
    assert bare["distance 144"]["prediction"] > 0 and bare["cost 128"]["speed"] > 0
    assert other["backbone"] == "sd35_medium"
    assert (teacher["method"], student["method"]) == ("teacher", "sana")
    assert teacher["128"]["frechet"] > 0 and "side" not in teacher
    assert student["side"] == 0 and student["trained"] > 0
    assert student["cost 128"]["flops"] < 2 * student["cost 128"]["teacher_flops"]
    assert (tmp_path / "runs" / "pixart_sigma" / "sana-0" / "128.png").is_file()
    results.write_text(json.dumps([other, teacher, bare | {"cost 128": {}}, student | {"cost 128": {}}]))
    table.main(["--backbone", "pixart_sigma", "--costs", *runs])
    *rest, bare_again, again = json.loads(results.read_text())
    assert rest == [other, teacher]
    assert bare_again["cost 128"]["seconds"] > 0
    assert again["cost 128"]["flops"] == student["cost 128"]["flops"] and again["cost 128"]["seconds"] > 0
    assert {**again, "cost 128": {}} == {**student, "cost 128": {}}


def quick(load: Any) -> Any:
    """One step per stage."""

    def loaded(name: str) -> Any:
        config = load(name)
        changes = {"steps": 1, "batch_size": 2}
        stages = [stage.model_copy(update=changes) for stage in config.stages]
        return config.model_copy(update={"stages": stages, "watch": config.watch.model_copy(update={"held_out": 2})})

    return loaded
