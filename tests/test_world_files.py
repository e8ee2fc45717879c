"""The small world's shipped files, and the pipelines that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models, world

from edit_core.backbones import identify_module
from edit_core.basefile import BaseFile
from edit_core.distill.teacher import load_teacher as load_of_pipeline
from edit_core.errors import EDiTModelError
from edit_core.world import files
from edit_core.world.codec import CHANNELS
from edit_core.world.teachers import build, position_table
from edit_core.world.vae import tiny

BACKBONES = tuple(CHANNELS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    world.write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _random_files(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random files in place of the shipped ones."""
    for kind in files.FOLDERS:
        monkeypatch.setitem(files.FOLDERS, kind, written / kind)


def rounded(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors as float16 keeps them; the table of positions is not kept, but made anew."""
    return {k: v if k == "pos_embed.pos_embed" else v.half().float() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_teachers_and_vaes_come_back_as_they_were(backbone: str) -> None:
    model = build(backbone)
    models.randomise(model, seed=1)
    again = files.load_teacher(backbone)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in rounded(model).items())
    assert files.about(backbone) == {"steps": 0}
    vae = tiny(backbone, world.decoder(backbone))
    again = files.load_vae(backbone)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in rounded(vae).items())
    assert dict(again.config) == dict(vae.config)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_shipped_files_are_small_and_known_as_what_they_are(backbone: str) -> None:
    for kind in files.FOLDERS:
        assert files.shipped(kind, backbone).stat().st_size < 10_000_000
    base = BaseFile(files.shipped("diffusion_models", backbone)).identify()
    assert (base.backbone.name, base.host) == (backbone, "diffusers")
    assert base.sites == identify_module(build(backbone)).sites


def test_the_table_of_positions_is_diffusers_own() -> None:
    assert torch.equal(position_table(), build("sd35_medium").pos_embed.pos_embed)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_exported_pipeline_holds_the_teacher(backbone: str, tmp_path: Path) -> None:
    files.export_pipeline(backbone, tmp_path)
    transformer = load_of_pipeline(tmp_path, torch.float32, torch.device("cpu"))
    state = files.load_teacher(backbone).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in transformer.state_dict().items())
    assert len(transformer.state_dict()) == len(state)
    classes = {p.parent.name: json.loads(p.read_text())["_class_name"] for p in tmp_path.glob("*/*.json")}
    assert classes.keys() == {"transformer", "vae", "scheduler"} and classes["vae"] == "AutoencoderTiny"


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    save_file(load_file(files.shipped("edit", "pixart_sigma")), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, part in (("other", "not a file of the small world"), ("broken", "cannot be read"), ("absent", "cannot")):
        with pytest.raises(EDiTModelError, match=part) as caught:
            files.load_teacher(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)
