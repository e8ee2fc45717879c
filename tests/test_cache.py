"""Images and captions -> shards of latents and embeddings."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support import caching, pipelines
from support.caching import STEP, PoolEncoder, assert_same, contents, draw
from support.models import BACKBONES
from torch import Tensor

from edit_core.cli import main
from edit_core.commands import COMMANDS
from edit_core.commands import cache as command
from edit_core.distill import cache
from edit_core.distill.buckets import buckets
from edit_core.distill.cache import CacheReport, build_cache
from edit_core.distill.dataset import CachedLatents
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.sources import FolderSource
from edit_core.errors import EDiTError

folders = caching.folders
encoders = caching.encoders
images = caching.images


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_cache_holds_what_the_pipeline_itself_encodes(
    backbone: str, folders: dict[str, Path], encoders: dict[str, PipelineEncoder], images: Path, tmp_path: Path
) -> None:
    report = build_cache(FolderSource(images), encoders[backbone], tmp_path, [64, 128], shard_size=4, **STEP)
    assert report == CacheReport(24, {"64": 21, "128": 18}, {"64": 3, "128": 6}, complete=True)
    pipeline = DiffusionPipeline.from_pretrained(folders[backbone], local_files_only=True)
    channels, config = pipeline.vae.config.latent_channels, pipeline.vae.config

    def prompt(text: str) -> dict[str, Tensor]:
        if backbone.startswith("pixart"):
            embeds, mask, _, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
            return {"prompt_embeds": embeds[0], "prompt_mask": mask[0].bool()}
        embeds, _, pooled, _ = pipeline.encode_prompt(text, text, text, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds[0], "pooled": pooled[0]}

    seen = 0
    for resolution in (64, 128):
        data = CachedLatents(tmp_path, resolution, verify=True)
        assert data.backbone == backbone
        for index in range(0, len(data), 3):
            info, sample = data.info(index), data[index]
            image = Image.open(images / info["source"])
            assert [*image.size] == info["size"]
            height, width = (8 * side for side in sample["latent"].shape[1:])
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=info["crop"])
            with torch.no_grad():
                mode = pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist.mode()[0]
                expected = prompt(info["caption"])
            expected["latent"] = (mode - (config.shift_factor or 0)) * config.scaling_factor
            assert expected["latent"].shape == (channels, height // 8, width // 8)
            assert_same({0: sample}, {0: expected})
            seen += 1
        length = {"pixart_sigma": 300, "pixart_alpha": 120}.get(backbone, 333)
        assert sample["prompt_embeds"].shape == (length, pipelines.T5_WIDTH)
    assert seen == 13
    with torch.no_grad():
        assert_same({0: CachedLatents.empty_prompt(tmp_path)}, {0: prompt("")})
    if backbone.startswith("sd3"):
        assert config.shift_factor != 0
    else:
        assert 2 < int(sample["prompt_mask"].sum()) < 300


# --- buckets and pictures ---


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (2048, 64), (1024, 32), (64, 16)])
def test_buckets_have_the_area_the_step_and_the_aspects(resolution: int, step: int) -> None:
    for aspect in (1.0, 1.5, 2.0, 4.0):
        sizes = buckets(resolution, step, aspect)
        assert (resolution, resolution) in sizes
        for height, width in sizes:
            assert (width, height) in sizes
            assert height % step == width % step == 0
            assert max(height, width) <= aspect * min(height, width)
            assert abs(height * width / resolution**2 - 1) <= step / 2 / min(height, width)
    assert {(384, 704), (512, 512)} < set(buckets(512, 64, 2.0))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [((512, 24, 2.0), "multiple of 16"), ((512, 0, 2.0), "multiple of 16"), ((512, 64, 0.5), "a square's is 1"),
     ((32, 64, 2.0), "no bucket of 32²")],
)  # fmt: skip
def test_impossible_buckets_are_refused(arguments: Any, part: str) -> None:
    with pytest.raises(EDiTError, match=part):
        buckets(*arguments)


def test_no_picture_is_enlarged_and_crops_are_central(tmp_path: Path) -> None:
    generator = random.Random(0)
    sizes = [(generator.randint(40, 260), generator.randint(40, 260)) for _ in range(40)]
    report = build_cache(
        FolderSource(draw(tmp_path / "i", sizes)), PoolEncoder(), tmp_path / "c", [64, 128], bucket_step=16
    )
    for resolution in (64, 128):
        data = CachedLatents(tmp_path / "c", resolution)
        assert report.cached[str(resolution)] == len(data) == 40 - report.too_small[str(resolution)]
        for index in range(len(data)):
            info, cells = data.info(index), data[index]["latent"].shape[1:]
            (width, height), (left, top, right, bottom) = info["size"], info["crop"]
            assert 0 <= left == pytest.approx(width - right)
            assert 0 <= top == pytest.approx(height - bottom)
            assert min(left, top) == 0
            assert right - left >= 8 * cells[1]
            assert bottom - top >= 8 * cells[0]
            assert (right - left) / (bottom - top) == pytest.approx(cells[1] / cells[0])
    assert report.too_small["64"] > 0


def test_pixels_are_those_of_the_picture_upright_and_on_white(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    left_red = np.zeros((64, 64, 3), np.uint8)
    left_red[:, :32] = (255, 0, 0)
    plain = Image.fromarray(left_red)
    plain.save(folder / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: to be shown with its left side on top
    plain.save(folder / "turned.jpg", exif=exif, quality=95, subsampling=0)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray(left_red[..., 0]))
    clear.save(folder / "clear.png")
    Image.fromarray(left_red[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(folder / "deep.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("c")
    report = build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], bucket_step=16)
    assert (report.broken, report.examples) == (1, ["deep.png: its colours are I;16, not of 8 bits"])
    found = {source: sample["latent"] for (_, source), sample in contents(tmp_path / "c", [64]).items()}
    expected = torch.zeros(3, 8, 8)
    expected[0, :, :4] = 1
    assert torch.equal(found["plain.png"], expected)
    torch.testing.assert_close(found["turned.jpg"], expected.mT, atol=0.02, rtol=0)
    assert torch.equal(found["clear.png"][:, :, :4], expected[:, :, :4])
    assert (found["clear.png"][:, :, 4:] == 1).all()
    assert torch.equal(found["grey.png"], expected[:1].expand(3, 8, 8))


# --- what a build does with trouble ---


def test_what_is_broken_or_lacks_a_caption_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(80, 80)] * 6)
    (folder / "00.txt").unlink()
    (folder / "01.txt").write_text(" \n")
    (folder / "03.png").write_bytes(b"this is no picture")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:-200])
    report = build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], **STEP)
    assert (report.images, report.cached, report.no_caption, report.broken) == (6, {"64": 2}, 2, 2)
    assert report.examples[:3] == [
        "00.png: no caption", "01.png: no caption", "03.png: not an image that Pillow can read"
    ]  # fmt: skip
    assert "truncated" in report.examples[3]
    assert "left out: 2 without a caption, 2 broken" in str(report)


def test_too_little_memory_is_one_sentence(images: Path, tmp_path: Path) -> None:
    class Greedy(PoolEncoder):
        def encode_images(self, pixels: Tensor) -> Tensor:
            raise torch.OutOfMemoryError

    with pytest.raises(EDiTError, match="memory does not suffice to encode 4 images of 80x48 pixels"):
        build_cache(FolderSource(images), Greedy(), tmp_path, [64], **STEP)


def test_shards_are_closed_in_time(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SHARD_SECONDS", 0.0)
    build_cache(FolderSource(images), PoolEncoder(), tmp_path, [64], **STEP)
    assert len(CachedLatents(tmp_path, 64).manifest["shards"]) > 4


def test_another_cache_is_not_continued(
    encoders: dict[str, PipelineEncoder], folders: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    source, out = FolderSource(images), tmp_path / "c"
    build_cache(source, encoders["pixart_sigma"], out, [64], **STEP)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = PipelineEncoder(
        pipelines.build("pixart_sigma", tmp_path / "other", seed=1), torch.device("cpu"), torch.float32
    )
    same = PipelineEncoder(shutil.copytree(folders["pixart_sigma"], tmp_path / "copy"), other.device, other.dtype)
    half = PipelineEncoder(folders["pixart_sigma"], other.device, torch.bfloat16)
    for encoder, changed, settings, part in (
        (same, source, {"resolutions": [64, 128]}, r"resolutions \[64\], and now it is \[64, 128\]"),
        (same, source, {"bucket_step": 32}, "bucket_step 16, and now it is 32"),
        (same, source, {"max_aspect": 1.5}, "max_aspect 2.0, and now it is 1.5"),
        (same, FolderSource(draw(tmp_path / "i", [(80, 80)])), {}, "begun with source 'the folder"),
        (other, source, {}, "begun with encoder"),
        (half, source, {}, "dtype 'float32', and now it is 'bfloat16'"),
        (encoders["sd35_medium"], source, {}, "backbone 'pixart_sigma', and now it is 'sd35_medium'"),
    ):
        with pytest.raises(EDiTError, match=part):
            build_cache(changed, encoder, out, **{"resolutions": [64], **STEP, **settings})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert build_cache(source, same, out, [64], **STEP).complete  # the same weights in another folder


def test_bad_numbers_are_refused(images: Path, tmp_path: Path) -> None:
    for settings, part in (
        ({"rank": 2, "world": 2}, "process 2 of 2"),
        ({"rank": -1}, "process -1 of 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"shard_size": 0}, "at least 1"),
    ):
        with pytest.raises(EDiTError, match=part):
            build_cache(FolderSource(images), PoolEncoder(), tmp_path / "c", [64], **settings)
    assert not (tmp_path / "c").exists()


def test_the_webdataset_library_reads_the_shards(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    build_cache(FolderSource(images), PoolEncoder(), tmp_path, [64], shard_size=4, **STEP)
    data = CachedLatents(tmp_path, 64)
    expected = {data.key(index): data.info(index) for index in range(len(data))}
    shards = sorted(str(path) for path in tmp_path.glob("64/*/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {sample["__key__"]: json.loads(sample["json"]) for sample in samples} == expected
    assert all(len(sample["safetensors"]) > 100 for sample in samples)


# --- the command ---


def test_the_command(
    folders: dict[str, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(COMMANDS, "cache", command)
    out = tmp_path / "c"
    common = ["cache", "--model", folders["sd35_medium"], "--resolutions", 64, "--bucket-step", 16, "--device", "cpu"]

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = main([str(a) for a in (*common, *arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    status, text, err = run("--images", images, "--output", out, "--rank", 1, "--world", 2)
    assert (status, err) == (0, "")
    assert "process 1 of 2 is through; the others are not yet" in text
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    status, text, err = run("--images", images, "--output", out, "--json")
    assert (status, err) == (0, "")
    data = json.loads(text)
    assert (data["backbone"], data["images"], data["cached"], data["complete"]) == ("sd35_medium", 24, {"64": 21}, True)
    assert CachedLatents(out, 64)[0]["prompt_embeds"].dtype == torch.bfloat16
    status, text, _ = run("--images", images, "--output", out)
    assert text.startswith(f"{out}: 24 images; cached 21 at 64\nleft out: 3 too small for 64")

    (tmp_path / "file").write_text("")
    for arguments, part in (
        (("--images", tmp_path / "none", "--output", out), "no such folder"),
        (("--images", images, "--output", out, "--max-aspect", 3), "begun with max_aspect"),
        (("--images", images, "--output", tmp_path / "file" / "c"), "cannot be written"),
        (("--tars", tmp_path / "none.tar", "--output", out), "no such tar"),
        (("--images", images, "--output", out, "--world", 1, "--rank", 1), "process 1 of 1"),
        (("--images", images, "--output", out, "--model", tmp_path), "not a diffusers pipeline's folder"),
        (("--images", images, "--output", out, "--device", "cuda:77"), "cannot be used here"),
    ):
        status, text, err = run(*arguments)
        assert (status, text) == (2, ""), err
        assert err.startswith("edit_core: ")
        assert part in err
        assert err.count("\n") == 1
    for wrong in ([], ["--images", "a", "--tars", "b"]):
        with pytest.raises(SystemExit):
            run("--output", out, *wrong)
    capsys.readouterr()
