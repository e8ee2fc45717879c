"""The small world: scenes, their reader, their text, their codec and the two teachers."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edit_core import EDiTWeights, apply_edit
from edit_core.backbones import backbone_named
from edit_core.errors import EDiTError
from edit_core.world.codec import CHANNELS, decode, encode
from edit_core.world.draw import draw
from edit_core.world.reader import accuracy, read
from edit_core.world.scenes import COLOURS, COLUMNS, GROUNDS, ROWS, SPECIALS, TEXTURES, Scene
from edit_core.world.teachers import build
from edit_core.world.text import POOLED, TOKENS, VOCABULARY, WIDTH, WorldText
from edit_core.world.vae import Decoder, comfyui_state, tiny
from world.decoder import train as train_decoder
from world.train import Stage, Trainer, load_run

BACKBONES = tuple(CHANNELS)
SCENES = [Scene.random(seed) for seed in range(90)]


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [scene.draw(256, 256) for scene in SCENES]


def through(backbone: str, pictures: list[Any], noise: float = 0.0) -> list[Any]:
    latent = encode(backbone, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    latent += noise * torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    return list(decode(backbone, latent).permute(0, 2, 3, 1).numpy())


def mean(pictures: list[Any], scenes: list[Scene] = SCENES) -> float:
    return accuracy([read(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])["all"]


# -- scenes


def test_a_seed_gives_the_same_scene_everywhere() -> None:
    digest = hashlib.sha256()
    for seed in range(20):
        scene = Scene.random(seed)
        digest.update(scene.caption.encode() + scene.draw(192, 128).tobytes())
    assert digest.hexdigest() == "fdb83776f68bea273ea8e82ac3afae662ce962649967306c28a5af49fa21789a"


def test_dots_find_room_beside_three_large_things_in_one_column() -> None:
    scenes = [s for s in map(Scene.random, range(90, 400)) if s.dots and len(s.things) == 3]
    for i, scene in enumerate(scenes):
        column = COLUMNS[i % 3]
        things = [
            dataclasses.replace(t, size="large", column=column, row=r) for t, r in zip(scene.things, ROWS, strict=True)
        ]
        crowded = dataclasses.replace(scene, things=tuple(things))
        wrong = [name for name, right in read(crowded.draw(256, 256), crowded).items() if not right]
        assert not wrong, crowded


def test_scenes_differ_in_everything() -> None:
    scenes = [Scene.random(seed) for seed in range(300)]
    assert {s.special for s in scenes} == set(SPECIALS)
    assert {(s.ground, s.texture) for s in scenes} == {(g, t) for g in GROUNDS for t in TEXTURES}
    assert {t.colour for s in scenes for t in s.things} == set(COLOURS)
    assert len({s.caption for s in scenes}) == 300
    assert any(not t.told for s in scenes for t in s.things) and any(s.dots and not s.told for s in scenes)


def test_a_mirrored_scene_is_symmetric_and_a_frame_is_the_third_things() -> None:
    for scene in SCENES:
        picture = scene.draw(272, 256)
        assert np.array_equal(picture, picture[:, ::-1]) == (scene.special == "mirror")
        framed = bool((picture[:4] == picture[0, 0]).all())
        if scene.special == "frame":
            assert framed and tuple(picture[0, 0]) == COLOURS[scene.things[2].colour]


def test_captions_can_be_parsed(pictures: list[Any]) -> None:
    for scene, picture in zip(SCENES, pictures, strict=True):
        assert read(picture, scene.caption) == read(picture, scene)
    for caption in ("a cat at the top left, on grey rows", "on grey rows", "a large red circle at the top left"):
        with pytest.raises(EDiTError):
            Scene.parse(caption)


# -- reader


@pytest.mark.parametrize("size", [(256, 256), (320, 208), (256, 384), (640, 512)])
def test_the_reader_is_right_about_clean_pictures(size: tuple[int, int]) -> None:
    scenes = SCENES[:30]
    assert mean([scene.draw(*size) for scene in scenes], scenes) >= 0.995


@pytest.mark.parametrize(("backbone", "noise"), [("pixart_sigma", 0), ("pixart_sigma", 0.1), ("sd35_medium", 0.1)])
def test_the_reader_is_right_after_the_codec(backbone: str, noise: float, pictures: list[Any]) -> None:
    assert mean(through(backbone, pictures, noise)) >= 0.99


def test_the_reader_finds_little_right_in_another_scenes_picture(pictures: list[Any]) -> None:
    assert mean([*pictures[1:], pictures[0]]) < 0.4


def test_the_reader_notices_what_is_wrong() -> None:
    seen = set()
    for scene in SCENES[:24]:
        changes: dict[str, Scene] = {
            "ground": dataclasses.replace(scene, ground=_other(GROUNDS, scene.ground)),
            "texture": dataclasses.replace(scene, texture=_other(TEXTURES, scene.texture)),
        }
        for i, thing in enumerate(scene.things):
            wrong = {
                "shape": "square" if thing.shape == "circle" else "circle",
                "size": "small" if thing.size == "large" else "large",
                "row": "top" if thing.row != "top" else "middle",
            }
            if thing.told and scene.special != "frame":
                wrong["colour"] = _other(set(COLOURS) - {t.colour for t in scene.things}, thing.colour)
            for name, value in wrong.items():
                things = list(scene.things)
                things[i] = dataclasses.replace(thing, **{name: value})
                if len({(t.column, t.row) for t in things}) == len(things):
                    changes[f"{i + 1}.{'place' if name == 'row' else name}"] = dataclasses.replace(
                        scene, things=tuple(things)
                    )
        if scene.dots and scene.told:
            changes["dots.left"] = dataclasses.replace(scene, dots=scene.dots % 4 + 1)
        for name, wrong_scene in changes.items():
            result = read(wrong_scene.draw(256, 256), scene)
            assert not result[name], (name, scene)
            expected = {name, "dots.right"} if name == "dots.left" else {name}
            if name == "ground":
                assert {k for k, v in result.items() if not v} >= expected
            else:
                assert {k for k, v in result.items() if not v} == expected, (name, scene)
            seen.add(name)
    assert {name.lstrip("123.") for name in seen} == {
        "ground",
        "texture",
        "shape",
        "size",
        "place",
        "colour",
        "dots.left",
    }


def test_the_reader_notices_broken_relations(pictures: list[Any]) -> None:
    checked = set()
    for scene, picture in zip(SCENES, pictures, strict=True):
        broken = picture.copy()
        if scene.special == "mirror":
            broken[:, 128:] = np.roll(picture[:, 128:], 64, axis=0)
            result = read(broken, scene)
            assert not result["mirror"]
            if scene.texture == "grain":
                ground = picture.copy()
                mask = np.abs(picture.astype(int) - GROUNDS[scene.ground]).max(-1) <= 30
                mask[:, 128:] = False
                ground[mask] = dataclasses.replace(scene, detail=scene.detail + 1).draw(256, 256)[mask]
                assert not read(ground, scene)["mirror.ground"]
                checked.add("mirror.ground")
        elif scene.special == "frame":
            other = _other(COLOURS, scene.things[2].colour)
            for edge in (broken[:16], broken[-16:], broken[:, :16], broken[:, -16:]):
                edge[...] = COLOURS[other]
            result = read(broken, scene)
            assert {k for k, v in result.items() if not v} == {"frame"}
        elif scene.special == "dots":
            # All dots of the right side go, wherever no thing was drawn there.
            white = (picture.astype(int).min(-1) > 215) & (np.arange(256) >= 128)
            broken[white] = GROUNDS[scene.ground]
            assert not read(broken, scene)["dots.equal"]
        checked.add(scene.special)
    assert checked == {*SPECIALS, "mirror.ground"}


def test_the_reader_survives_any_picture() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        assert sum(read(picture, SCENES[0]).values()) <= 3


def _other(names: Any, name: str) -> str:
    return next(other for other in names if other != name)


# -- text


def test_the_tokenizer_knows_every_caption() -> None:
    text = WorldText()
    used = set()
    for seed in range(2000):
        tokens = text.tokens(Scene.random(seed).caption)
        assert len(tokens) < TOKENS
        used |= set(tokens)
    assert {VOCABULARY[i] for i in used} >= {*VOCABULARY} - {"<pad>", "<unk>", "and", "with"}
    assert text.ids["<unk>"] not in used
    assert text.tokens("a purple cow")[-1] == text.ids["<unk>"]


def test_embeddings_tell_captions_apart_and_are_the_same_everywhere() -> None:
    captions = [scene.caption for scene in SCENES] + [""]
    out = WorldText().encode_prompts(captions)
    n = len(captions)
    assert out["prompt_embeds"].shape == (n, TOKENS, WIDTH) and out["pooled"].shape == (n, POOLED)
    assert out["prompt_mask"].sum(1)[-1] == 1 and not out["prompt_embeds"][~out["prompt_mask"]].any()
    assert len({row.numpy().tobytes() for row in out["prompt_embeds"]}) == n
    assert all(torch.equal(t, WorldText().encode_prompts(captions)[k]) for k, t in out.items())
    exact = (out["prompt_embeds"] * 64).round() / 64
    assert torch.equal(exact, out["prompt_embeds"])  # so that no platform's rounding can matter


# -- codec


@pytest.mark.parametrize("backbone", BACKBONES)
def test_latents_have_unit_variance_and_keep_the_picture(backbone: str, pictures: list[Any]) -> None:
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    latent = encode(backbone, pixels)
    assert latent.shape == (len(pictures), CHANNELS[backbone], 32, 32)
    assert (latent[:, :3].std((0, 2, 3)) - 1).abs().max() < 0.15 and latent[:, :3].mean((0, 2, 3)).abs().max() < 0.2
    assert latent[:, 3:].std((0, 2, 3)).max() < 0.6
    back = decode(backbone, latent)
    error = (back.float() - pixels.float()).div(255).square().mean().log10() * -10
    assert error > {"pixart_sigma": 23, "sd35_medium": 28}[backbone]  # dB
    again = encode(backbone, back)
    assert (again - latent).abs().mean() < 0.03  # but for clipping and rounding it is a projection


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_codec_is_an_autoencoder_tiny(backbone: str) -> None:
    pixels = torch.from_numpy(SCENES[0].draw(128, 96)).permute(2, 0, 1)[None]
    torch.manual_seed(0)
    decoder = Decoder(CHANNELS[backbone])
    network = tiny(backbone, decoder)
    latent = encode(backbone, pixels)
    assert (network.encode(pixels / 127.5 - 1).latents * network.config.scaling_factor - latent).abs().max() < 1e-4
    with torch.no_grad():
        expected = decoder(latent)
    drawn = network.decode(latent / network.config.scaling_factor).sample / 2 + 0.5
    assert expected.std() > 0 and (drawn - expected).abs().max() < 1e-5
    state = comfyui_state(backbone, network)
    assert state["taesd_decoder.1.weight"].shape == (64, CHANNELS[backbone], 3, 3)
    assert state["taesd_encoder.14.weight"].shape == (CHANNELS[backbone], 64, 3, 3) and "vae_scale" in state


def test_a_decoders_training_writes_a_file_and_goes_on_with_it(tmp_path: Path) -> None:
    file = tmp_path / "decoder.safetensors"
    for _ in range(2):
        assert 0 < train_decoder("pixart_sigma", file, minutes=0.005, side=64, batch=2) < 128
    Decoder(4).load_state_dict(load_file(file))


# -- teachers


@pytest.mark.parametrize("backbone", BACKBONES)
def test_teachers_are_small_and_take_every_size(backbone: str) -> None:
    model = build(backbone)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    condition = WorldText().encode_prompts(["a large red circle at the top left, on grey rows", ""])
    handle = apply_edit(model, EDiTWeights.init(model))
    for height, width in ((32, 32), (20, 48)):
        latent = torch.randn(2, CHANNELS[backbone], height, width)
        with torch.no_grad():
            output = model(
                **backbone_named(backbone).call_arguments(latent, torch.tensor([10, 900]), condition, latent.device)
            )[0]
        channels = CHANNELS[backbone] * (2 if backbone == "pixart_sigma" else 1)
        assert output.shape == (2, channels, height, width) and output.isfinite().all()
        handle.remove()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_teacher_draws_in_half_precision_as_demo_offers_it(backbone: str) -> None:
    model = torch.nn.Module.to(build(backbone), torch.bfloat16)
    drawn = draw(backbone, model, ["a large red circle"], [0], width=64, height=64, steps=2)
    assert drawn.shape == (1, 64, 64, 3) and drawn.dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_learns_and_goes_on_as_if_it_had_not_stopped(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("world.train._WARMUP", 1)
    stages = (Stage(1 << 62, 4, ((64, 64), (96, 64))),)
    whole = Trainer(backbone, tmp_path, rate=3e-3, stages=stages)
    losses = [whole.step()[0] for _ in range(24)]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    half = Trainer(backbone, tmp_path, rate=3e-3, stages=stages)
    assert [half.step()[0] for _ in range(2)] == losses[:2]
    half.save()
    rest = Trainer(backbone, tmp_path, rate=3e-3, stages=stages)
    rest.resume()
    assert [rest.step()[0] for _ in range(2)] == losses[2:4]
    about, model = load_run(tmp_path)
    assert about["backbone"] == backbone
    pictures = draw(backbone, model, ["a big red cross at the top left, on sand rows"] * 2, [0, 1], 96, 64, steps=2)
    assert pictures.shape == (2, 64, 96, 3) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures[0], pictures[1])
    other = Trainer(BACKBONES[backbone == BACKBONES[0]], tmp_path)
    with pytest.raises(EDiTError, match=backbone):
        other.resume()


def test_runs_evaluate_log_and_save(tmp_path: Path) -> None:
    trainer = Trainer("pixart_sigma", tmp_path, stages=(Stage(1 << 62, 2, ((64, 64),)),))
    trainer.run(minutes=0.02, save_every=0, evaluate_every=60)
    assert trainer.steps > 0 and load_run(tmp_path)[0]["backbone"] == "pixart_sigma"
    result = trainer.evaluate(2, side=128)
    assert 0 <= result["all"] <= 1 and list((tmp_path / "pictures").glob("*.png"))
