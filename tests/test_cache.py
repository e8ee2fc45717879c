"""Images and captions -> shards of latents and embeddings -> batches."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support import pipelines
from support.models import BACKBONES
from torch import Tensor

from edit_core.cli import main
from edit_core.commands import COMMANDS
from edit_core.commands import cache as command
from edit_core.distill import cache
from edit_core.distill import encoders as encoders_module
from edit_core.distill.cache import CacheReport, buckets, build_cache
from edit_core.distill.dataset import BatchPlan, CachedLatents, collate
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.sources import DatasetSource, FolderSource, TarSource
from edit_core.errors import EDiTError

SIZES = [(200, 100), (100, 200), (128, 128), (70, 72), (60, 60), (300, 220), (150, 140), (129, 300)]  # width, height
STEP = {"bucket_step": 16, "batch_size": 4}


class PoolEncoder:
    """Stands in for a pipeline where only the files matter: a latent cell is the mean colour of its pixels."""

    backbone = "pixart_sigma"
    dtype = torch.float32
    fingerprint = "pool"

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 8) / 255

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = [torch.frombuffer(bytearray(hashlib.sha256(p.encode()).digest()), dtype=torch.uint8) for p in prompts]
        embeds = torch.stack(rows).float().view(-1, 4, 8)
        return {"prompt_embeds": embeds, "prompt_mask": torch.ones(len(rows), 4, dtype=torch.bool)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For models so small, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {backbone: pipelines.build(backbone, root / backbone) for backbone in BACKBONES}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, PipelineEncoder]:
    return {name: PipelineEncoder(folder, torch.device("cpu"), torch.float32) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("images"), SIZES * 3)


def draw(folder: Path, sizes: Iterable[tuple[int, int]]) -> Path:
    """Smooth random pictures with captions, every third one in a subfolder."""
    generator = np.random.default_rng(0)
    for index, (width, height) in enumerate(sizes):
        path = folder / ("sub.dir" if index % 3 == 2 else "") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"an old painting of ships, number {index}\n")
    return folder


def contents(folder: Path, resolutions: Sequence[int]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """All samples, by resolution and source."""
    found = {}
    for resolution in resolutions:
        data = CachedLatents(folder, resolution, verify=True)
        for index in range(len(data)):
            found[resolution, data.info(index)["source"]] = data[index]
    return found


def assert_same(actual: dict[Any, dict[str, Tensor]], expected: dict[Any, dict[str, Tensor]]) -> None:
    assert sorted(actual) == sorted(expected)
    for key, sample in expected.items():
        assert actual[key].keys() == sample.keys()
        for name, tensor in sample.items():  # other batches are other sums in the VAE and the text encoders
            torch.testing.assert_close(actual[key][name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_tiny_pipelines_are_whole(backbone: str, folders: dict[str, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[backbone], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    if backbone == "pixart_sigma":
        size.update(use_resolution_binning=False, clean_caption=False)
    first, second = (np.array(pipeline(text, generator=torch.Generator().manual_seed(0), **size).images[0])
                     for text in ("a red fox in the snow", "two ships at sea"))  # fmt: skip
    assert first.shape == (64, 64, 3)
    assert (first != second).any()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_cache_holds_what_the_pipeline_itself_encodes(
    backbone: str, folders: dict[str, Path], encoders: dict[str, PipelineEncoder], images: Path, tmp_path: Path
) -> None:
    report = build_cache(FolderSource(images), encoders[backbone], tmp_path, [64, 128], shard_size=4, **STEP)
    assert report == CacheReport(24, {"64": 21, "128": 18}, {"64": 3, "128": 6}, complete=True)
    pipeline = DiffusionPipeline.from_pretrained(folders[backbone], local_files_only=True)
    channels, config = pipeline.vae.config.latent_channels, pipeline.vae.config

    def prompt(text: str) -> dict[str, Tensor]:
        if backbone == "pixart_sigma":
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
        length = {"pixart_sigma": 300, "sd35_medium": 333}[backbone]
        assert sample["prompt_embeds"].shape == (length, pipelines.T5_WIDTH)
    assert seen == 13
    with torch.no_grad():
        assert_same({0: CachedLatents.empty_prompt(tmp_path)}, {0: prompt("")})
    if backbone == "sd35_medium":
        assert config.shift_factor != 0
    else:
        assert 2 < int(sample["prompt_mask"].sum()) < 300


def test_the_vae_stays_in_float32_and_text_takes_the_dtype(folders: dict[str, Path]) -> None:
    full = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.float32)
    half = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.bfloat16)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(half.encode_images(pixels), full.encode_images(pixels))
    assert half.encode_prompts(["a fox"])["prompt_embeds"].dtype == torch.bfloat16
    assert half.fingerprint != full.fingerprint


def test_long_captions_are_cut_as_the_pipeline_cuts_them(
    encoders: dict[str, PipelineEncoder], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for encoder in encoders.values():
        long, short = encoder.encode_prompts(["ships at sea " * 500, "ships"])["prompt_embeds"]
        assert long.shape == short.shape
    assert capfd.readouterr().err == ""
    assert not caplog.records


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


# --- sources ---


def encoded(size: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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


def test_sources_without_anything_usable_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EDiTError, match="there is no such folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(EDiTError, match="holds no image"):
        FolderSource(tmp_path / "empty")
    with pytest.raises(EDiTError, match="there is no such tar"):
        TarSource([tmp_path / "none.tar"])
    folder = draw(tmp_path / "i", [(80, 80)] * 2)
    with pytest.raises(EDiTError, match="no image could be cached: left out: 2 too small for 512"):
        build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "small", [512])
    for path in folder.rglob("*.txt"):
        path.unlink()
    with pytest.raises(EDiTError, match="none of its 2 images has a caption"):
        build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], **STEP)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars(tmp_path: Path) -> None:
    one = write_tar(
        tmp_path / "one.tar",
        [("a.png", encoded((80, 70))), ("a.txt", b"first"), ("a.cls", b"7"), ("d.e/b.txt", b"second"),
         ("d.e/b.jpg", encoded((64, 64), 1)), ("c.png", encoded((64, 64)))],
    )  # fmt: skip
    two = write_tar(tmp_path / "two.tar", [("a.png", b"broken"), ("a.txt", b"third"), ("z.txt", b"alone")])
    found = [(item.name, item.caption) for item in TarSource([one, two])]
    names = ["one.tar/a.png", "one.tar/d.e/b.jpg", "one.tar/c.png", "two.tar/a.png"]
    assert found == list(zip(names, ["first", "second", None, "third"], strict=True))
    report = build_cache(TarSource([one, two]), PoolEncoder(), tmp_path / "c", [64], **STEP)
    assert (report.images, report.cached, report.no_caption, report.broken) == (4, {"64": 2}, 1, 1)
    latent = contents(tmp_path / "c", [64])[64, "one.tar/d.e/b.jpg"]["latent"]
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded((64, 64), 1))))).permute(2, 0, 1)
    assert torch.equal(latent, PoolEncoder().encode_images(pixels[None])[0])

    (tmp_path / "cut.tar").write_bytes(one.read_bytes()[:9000])
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    for name in ("cut.tar", "packed.tar"):
        with pytest.raises(EDiTError, match=rf"{name}: not a whole, uncompressed tar"):
            list(TarSource([tmp_path / name]))
    with pytest.raises(EDiTError, match="no image is in there"):
        list(TarSource([write_tar(tmp_path / "text.tar", [("a.txt", b"x")])]))


def test_hugging_face_datasets_on_disk_and_streamed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [encoded((64, 64), 1), encoded((80, 70), 2), b"broken", None, encoded((40, 40), 3)]
    table = datasets.Dataset.from_dict(
        {"picture": [{"bytes": row, "path": None} if row else None for row in rows],
         "words": ["one", "two", "three", "four", None], "other": range(5)},
        features=datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string"),
                                    "other": datasets.Value("int64")}),
    )  # fmt: skip
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "split")
    (tmp_path / "stream").mkdir()
    table.to_parquet(tmp_path / "stream" / "train-00000.parquet")
    found = []
    for name in ("plain", "split", "stream"):
        source = DatasetSource(str(tmp_path / name), "picture", "words")
        assert source.count == (0 if name == "stream" else 5)
        report = build_cache(source, PoolEncoder(), tmp_path / f"c_{name}", [64], **STEP)
        assert (report.images, report.cached, report.broken, report.no_caption) == (5, {"64": 2}, 2, 1), report
        found.append(contents(tmp_path / f"c_{name}", [64]))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    with pytest.raises(EDiTError, match="no column 'image'; it has picture, words, other"):
        DatasetSource(str(tmp_path / "plain"))
    with pytest.raises(EDiTError, match="no split 'test', but train"):
        DatasetSource(str(tmp_path / "split"), "picture", "words", "test")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(EDiTError, match="cannot be opened as a dataset"):
        DatasetSource(str(tmp_path / "nothing"))


def test_the_webdataset_library_reads_the_shards(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    build_cache(FolderSource(images), PoolEncoder(), tmp_path, [64], shard_size=4, **STEP)
    data = CachedLatents(tmp_path, 64)
    expected = {data.key(index): data.info(index) for index in range(len(data))}
    shards = sorted(str(path) for path in tmp_path.glob("64/*/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {sample["__key__"]: json.loads(sample["json"]) for sample in samples} == expected
    assert all(len(sample["safetensors"]) > 100 for sample in samples)


# --- stopping and going on ---


@pytest.fixture(scope="module")
def children() -> Any:
    """Processes that need not import anything: a server that has done so forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.pipelines"])
    return context


def wait_for(condition: Any, process: Any, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_at_any_moment_it_goes_on_to_the_same_samples(
    children: Any, folders: dict[str, Path], encoders: dict[str, PipelineEncoder], images: Path, tmp_path: Path
) -> None:
    settings = {"resolutions": [64, 128], "shard_size": 2, **STEP}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_cache(FolderSource(images), encoders["pixart_sigma"], whole, **settings)
    generator = random.Random(1)
    shards: list[int] = []
    for _ in range(6):
        before = len(list(killed.glob("*/*/*.json")))
        child = children.Process(
            target=pipelines.build_cache_in_child, args=(folders["pixart_sigma"], images, killed), kwargs=settings
        )
        child.start()
        wait_for(lambda: len(list(killed.glob("*/*/*.json"))) > before or list(killed.glob("*/*/*.part")), child)  # noqa: B023
        time.sleep(generator.uniform(0, 0.15))
        child.kill()
        child.join()
        shards.append(len(list(killed.glob("*/*/*.json"))))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert not (killed / "manifest.json").exists()
        with pytest.raises(EDiTError, match="not finished; run the same"):
            CachedLatents(killed, 64)
    assert len(shards) >= 3
    assert shards == sorted(shards)
    report = build_cache(FolderSource(images), encoders["pixart_sigma"], killed, **settings)
    assert report == CacheReport(24, {"64": 21, "128": 18}, {"64": 3, "128": 6}, complete=True)
    assert_same(contents(killed, [64, 128]), contents(whole, [64, 128]))
    names = [str(path.relative_to(killed)) for path in killed.rglob("*") if path.is_file()]
    assert not [name for name in names if "part" in name]
    # a plan depends on the samples alone, not on how they came to be spread over shards
    plans = [BatchPlan(CachedLatents(folder, 64), 2, seed=0) for folder in (killed, whole)]
    keys = [CachedLatents(folder, 64).key for folder in (killed, whole)]
    assert [keys[0](i) for i in plans[0].batch(3)] == [keys[1](i) for i in plans[1].batch(3)]


def test_dead_at_every_single_rename_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(BaseException):
        pass

    source = FolderSource(draw(tmp_path / "i", SIZES))
    build_cache(source, PoolEncoder(), tmp_path / "whole", [64], shard_size=1, **STEP)
    expected = contents(tmp_path / "whole", [64])
    replace, unlink = os.replace, Path.unlink
    for after in range(100):
        left = [after]

        def dying(source: Any, target: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Dead
            replace(source, target)

        def leaving(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if left[0] >= 0:
                unlink(path, missing_ok)

        folder = tmp_path / str(after)
        with monkeypatch.context() as patch:  # from the moment on, nothing is renamed or removed any more
            patch.setattr(os, "replace", dying)
            patch.setattr(Path, "unlink", leaving)
            try:
                build_cache(source, PoolEncoder(), folder, [64], shard_size=1, **STEP)
                break
            except Dead:
                pass
        build_cache(source, PoolEncoder(), folder, [64], shard_size=1, **STEP)
        assert_same(contents(folder, [64]), expected)
        assert not list(folder.glob("*/*/*.part"))
    assert after > 15


def test_ctrl_c_keeps_what_is_encoded(
    children: Any, folders: dict[str, Path], encoders: dict[str, PipelineEncoder], images: Path, tmp_path: Path
) -> None:
    settings = {"resolutions": [128], "shard_size": 100, **STEP}
    child = children.Process(
        target=pipelines.build_cache_in_child, args=(folders["sd35_medium"], images, tmp_path), kwargs=settings
    )
    child.start()
    wait_for(lambda: list(tmp_path.glob("128/*/*.part")), child)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 130
    assert not list(tmp_path.rglob("*.part"))
    records = [json.loads(path.read_text()) for path in tmp_path.glob("128/*/*.json")]
    assert 0 < sum(record["samples"] for record in records) < 18
    report = build_cache(FolderSource(images), encoders["sd35_medium"], tmp_path, **settings)
    assert report.cached == {"128": 18}
    kept = {shard["sha256"] for shard in CachedLatents(tmp_path, 128).manifest["shards"]}
    assert {record["sha256"] for record in records} <= kept


def test_processes_share_the_work_and_their_number_may_change(
    children: Any, folders: dict[str, Path], encoders: dict[str, PipelineEncoder], images: Path, tmp_path: Path
) -> None:
    settings = {"resolutions": [64, 128], "shard_size": 3, **STEP}
    arguments = (folders["pixart_sigma"], images, tmp_path / "shared")
    both = [
        children.Process(
            target=pipelines.build_cache_in_child, args=arguments, kwargs={**settings, "rank": rank, "world": 2}
        )
        for rank in range(2)
    ]
    for child in both:
        child.start()
    for child in both:
        child.join()
        assert child.exitcode == 0
    build_cache(FolderSource(images), encoders["pixart_sigma"], tmp_path / "alone", **settings)
    assert_same(contents(tmp_path / "shared", [64, 128]), contents(tmp_path / "alone", [64, 128]))
    manifest = CachedLatents(tmp_path / "shared", 64).manifest
    ranks = Counter(Path(shard["file"]).name[6:9] for shard in manifest["shards"])
    assert set(ranks) == {"000", "001"}
    assert manifest["report"]["images"] == 24
    assert manifest["report"]["cached"] == {"64": 21, "128": 18}

    parts = [
        build_cache(FolderSource(images), PoolEncoder(), tmp_path / "three", rank=rank, world=3, **settings)
        for rank in (2, 0)
    ]
    assert not any(part.complete for part in parts)
    last = build_cache(FolderSource(images), PoolEncoder(), tmp_path / "three", **settings)
    assert last.complete
    assert last.images == 24
    build_cache(FolderSource(images), PoolEncoder(), tmp_path / "one", **settings)
    assert_same(contents(tmp_path / "three", [64, 128]), contents(tmp_path / "one", [64, 128]))


def test_images_added_later_join_and_a_lost_shard_comes_again(tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(80, 80)] * 6)
    build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], shard_size=2, **STEP)
    kept = sorted((tmp_path / "c").glob("64/*/*.tar"))
    kept.pop(1).write_bytes(b"cut off")
    before = {path: path.read_bytes() for path in kept}
    draw(folder, [(80, 80)] * 8)
    report = build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], shard_size=2, **STEP)
    assert report.cached == {"64": 8}
    assert len(contents(tmp_path / "c", [64])) == 8
    assert {path: path.read_bytes() for path in kept} == before


def test_a_full_disk_is_one_sentence_and_loses_nothing_finished(images: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 16:
                resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # writes fail from here on
            yield item

    arguments = (FolderSource(images), PoolEncoder(), tmp_path, [64, 128])
    try:
        with pytest.raises(EDiTError, match=r"cannot be written \(File too large\); finished shards are kept"):
            build_cache(*arguments, shard_size=1, progress=filling, **STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.part"))
    finished = {path: path.read_bytes() for path in tmp_path.glob("*/*/*.tar")}
    assert finished
    assert build_cache(*arguments, shard_size=1, **STEP).complete
    assert {path: path.read_bytes() for path in finished} == finished
    assert len(contents(tmp_path, [64, 128])) == 39


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


# --- the folder of the pipeline ---


def test_an_incomplete_pipeline_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    def load(folder: Path) -> PipelineEncoder:
        return PipelineEncoder(folder, torch.device("cpu"), torch.float32)

    def copy(backbone: str, name: str) -> Path:
        return shutil.copytree(folders[backbone], tmp_path / name)

    for backbone, part in (("pixart_sigma", "vae"), ("pixart_sigma", "text_encoder"), ("sd35_medium", "vae"),
                           ("sd35_medium", "text_encoder_2"), ("sd35_medium", "text_encoder_3")):  # fmt: skip
        folder = copy(backbone, f"{backbone}-{part}")
        shutil.rmtree(folder / part)
        with pytest.raises(EDiTError, match=rf"but {part} is missing; found model_index.json, scheduler") as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    folder = copy("sd35_medium", "null")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EDiTError, match="but text_encoder_3 is missing"):
        load(folder)
    index["_class_name"] = "FluxPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EDiTError, match="is a FluxPipeline, and a cache needs PixArtSigmaPipeline or"):
        load(folder)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(EDiTError, match=r"model_index.json: cannot be read"):
        load(folder)
    with pytest.raises(EDiTError, match=r"not a diffusers pipeline's folder, which has a model_index.json; found no"):
        load(tmp_path / "none")

    folder = copy("pixart_sigma", "mute")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(EDiTError, match=r"holds no vocabulary; found tokenizer_config.json"):
        load(folder)

    folder = copy("pixart_sigma", "cut")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EDiTError, match="its VAE or text encoders cannot be loaded"):
        load(folder)


def test_a_tokenizer_as_the_published_pixart_has_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`spiece.model` alone, which transformers can convert only with two more libraries."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = shutil.copytree(folders["pixart_sigma"], tmp_path / "p")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([pipelines.WORDS] * 20), model_writer=model, vocab_size=32, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = PipelineEncoder(folder, torch.device("cpu"), torch.float32)
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("a red fox", add_eos=True)
    assert encoder.pipeline.tokenizer("a red fox").input_ids == expected
    assert int(encoder.encode_prompts(["a red fox"])["prompt_mask"].sum()) == len(expected)
    monkeypatch.setattr(encoders_module, "_installed", lambda module: module != "google.protobuf")
    with pytest.raises(EDiTError, match=r"spiece.model needs protobuf: install it"):
        PipelineEncoder(folder, torch.device("cpu"), torch.float32)


def test_numbers_that_are_not_finite_are_refused(folders: dict[str, Path]) -> None:
    encoder = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.float32)
    next(encoder.vae.parameters()).data.fill_(torch.nan)
    with pytest.raises(EDiTError, match="its VAE give numbers that are not finite"):
        encoder.encode_images(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    next(encoder.pipeline.text_encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(EDiTError, match=r"its text encoders give numbers that are not finite in torch.float32"):
        encoder.encode_prompts(["x"])


# --- reading ---


@pytest.fixture
def small(images: Path, tmp_path: Path) -> Path:
    build_cache(FolderSource(images), PoolEncoder(), tmp_path / "small", [64], shard_size=3, **STEP)
    return tmp_path / "small"


def read_all(folder: Path, verify: bool = False) -> None:
    data = CachedLatents(folder, 64, verify)
    for index in range(len(data)):
        data[index]
        data.info(index)


def test_damaged_shards_are_named_with_their_numbers(small: Path, tmp_path: Path) -> None:
    shards = sorted(small.glob("64/8x8/*.tar"))
    assert len(shards) >= 2
    assert shards[0].stat().st_size == shards[1].stat().st_size  # so that only their contents tell them apart
    first, second = (path.read_bytes() for path in shards[:2])
    record = shards[0].with_suffix(".json").read_bytes()
    bits = bytearray(first)
    bits[700] ^= 1

    def broken(data: bytes | None, part: str, verify: bool = False) -> None:
        if data is None:
            shards[0].unlink()
        else:
            shards[0].write_bytes(data)
        with pytest.raises(EDiTError, match=part) as caught:
            read_all(small, verify)
        assert str(shards[0]) in str(caught.value)
        shards[0].write_bytes(first)

    size = len(first)
    broken(None, "this shard of 3 samples is missing")
    broken(first[:-512], rf"has {size - 512} bytes, but it was written with {size}")
    broken(second, r"of \d+ bytes should be at byte 0, but there is .* another shard's, or damaged")
    broken(second, "its sha256 is [0-9a-f]{64}, but it was written with [0-9a-f]{64}", verify=True)
    broken(bytes(bits), "its sha256 is", verify=True)
    broken(bytes(size), "but there is no sample")
    broken(first[:512] + bytes(2000) + first[2512:], "is damaged")

    data = CachedLatents(small, 64)
    index = next(i for i in range(len(data)) if data.key(i) == json.loads(record)["keys"][2])
    shards[0].write_bytes(first[:6200])  # cut off after it was opened
    with pytest.raises(EDiTError, match=r"ends at byte \d+, but the file at byte 6200"):
        data[index]
    with pytest.raises(EDiTError, match=r"the json of sample .* cannot be read"):
        data.info(index)
    shards[0].unlink()
    with pytest.raises(EDiTError, match="cannot be read"):
        data[index]
    shards[0].write_bytes(first)

    shards[0].with_suffix(".json").write_bytes(shards[1].with_suffix(".json").read_bytes())
    with pytest.raises(EDiTError, match="this record of 3 samples is another shard's"):
        read_all(small)
    shards[0].with_suffix(".json").unlink()
    with pytest.raises(EDiTError, match=r"shard-000-000000.json: there is no such file"):
        read_all(small)
    shards[0].with_suffix(".json").write_bytes(record)
    read_all(small, verify=True)

    (small / "empty_prompt.safetensors").write_bytes(b"x")
    with pytest.raises(EDiTError, match=r"empty_prompt.safetensors: its 1 bytes are not the \d+ bytes"):
        read_all(small)


def test_what_is_no_cache_is_one_sentence(small: Path, tmp_path: Path) -> None:
    with pytest.raises(EDiTError, match="has no resolution 512, but 64"):
        CachedLatents(small, 512)
    with pytest.raises(EDiTError, match=r"not a cache, which has a manifest.json"):
        CachedLatents(tmp_path, 64)
    manifest = json.loads((small / "manifest.json").read_text())
    for change, part in (
        ({"format": "other"}, "not a cache's manifest"),
        ({"format_version": 2}, "format_version 2 is unknown; this version reads 1"),
        ({"shards": []}, "has no image at 64 pixels"),
    ):
        (small / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(EDiTError, match=part):
            CachedLatents(small, 64)
    (small / "manifest.json").write_text("{")
    with pytest.raises(EDiTError, match=r"manifest.json: cannot be read"):
        CachedLatents(small, 64)


def test_batches_are_of_one_bucket_and_the_same_for_any_number_of_processes(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = CachedLatents(small, 64)
    assert sorted(index for span in data.buckets.values() for index in span) == list(range(len(data)))
    with caplog.at_level(logging.WARNING):
        plan = BatchPlan(data, 2, seed=3)
    assert not caplog.records
    steps = plan.steps_per_epoch
    assert steps == sum(len(span) // 2 for span in data.buckets.values())
    epochs = [[plan.batch(epoch * steps + step) for step in range(steps)] for epoch in range(3)]
    for epoch in epochs:
        seen = [index for batch in epoch for index in batch]
        assert len(seen) == len(set(seen)) == 2 * steps
        for batch in epoch:
            assert sum(set(batch) <= set(span) for span in data.buckets.values()) == 1
            assert data.collate(batch)["latent"].shape[0] == 2
    assert epochs[0] != epochs[1]

    fresh = BatchPlan(CachedLatents(small, 64), 2, seed=3)
    assert fresh.batch(2 * steps + 1) == epochs[2][1]  # without having been through the steps before
    assert fresh.batch(0) == epochs[0][0]
    other = BatchPlan(data, 2, seed=4)
    assert [other.batch(step) for step in range(steps)] != epochs[0]
    for step in (0, 5, steps + 2):
        halves = [BatchPlan(data, 2, 3, world=2, rank=rank) for rank in range(2)]
        assert [index for half in halves for index in half.batch(step)] == plan.batch(step)
        assert halves[1].global_batch(step) == plan.batch(step)


def test_buckets_that_are_too_small_for_a_batch_are_named(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = CachedLatents(small, 64)
    counts = {bucket: len(span) for bucket, span in data.buckets.items()}
    assert counts == {(6, 10): 6, (8, 8): 9, (10, 6): 6}
    with caplog.at_level(logging.WARNING):
        plan = BatchPlan(data, 8, seed=0)
    assert "fewer images than a batch of 8, and are not used: 6x10 (6), 10x6 (6)" in caplog.text
    assert list(plan.buckets) == [(8, 8)]
    assert plan.steps_per_epoch == 1
    assert len({index for step in range(20) for index in plan.batch(step)}) == 9  # the one left over changes
    with pytest.raises(EDiTError, match="no bucket has the 10 images of a batch: 6x10"):
        BatchPlan(data, 10, seed=0)
    for arguments, part in (((3, 0, 2, 0), "batch of 3 cannot be split among 2"), ((0, 0), "batch of 0"),
                            ((2, 0, 2, 2), "process 2 of 2")):  # fmt: skip
        with pytest.raises(EDiTError, match=part):
            BatchPlan(data, *arguments)


def test_collate_takes_one_bucket(small: Path) -> None:
    data = CachedLatents(small, 64)
    batch = data.collate([0, 1])
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "latent": (2, 3, 6, 10), "prompt_embeds": (2, 4, 8), "prompt_mask": (2, 4)
    }  # fmt: skip
    assert torch.equal(batch["latent"][1], data[1]["latent"])
    with pytest.raises(EDiTError, match="samples of one bucket, not of 2"):
        collate([data[0], data[len(data) - 1]])
    with pytest.raises(EDiTError, match="at least one"):
        collate([])


def test_worker_processes_read_at_once(small: Path) -> None:
    data = CachedLatents(small, 64)
    plan = BatchPlan(data, 2, seed=0)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=[plan.batch(step) for step in range(8)], num_workers=2, collate_fn=collate
    )
    for step, batch in enumerate(loader):
        assert torch.equal(batch["latent"], data.collate(plan.batch(step))["latent"])


def test_a_cache_is_described_without_paths(small: Path, images: Path) -> None:
    described = CachedLatents.describe(small)
    assert described["images"] == {"64": 21}
    assert described["backbone"] == "pixart_sigma"
    assert str(images) not in json.dumps(described)
    assert len(described["shards"]) == 64


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
