"""A cache that was stopped, killed, cut off or shared among processes comes out the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import caching, pipelines
from support.caching import SIZES, STEP, PoolEncoder, assert_same, contents, draw, encoded, write_tar

from edit_core.distill.cache import CacheReport, build_cache
from edit_core.distill.dataset import BatchPlan, CachedLatents
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.sources import FolderSource, TarSource
from edit_core.errors import EDiTError

folders = caching.folders
encoders = caching.encoders
images = caching.images


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
    children: Any,
    folders: dict[str, Path],
    encoders: dict[str, PipelineEncoder],
    images: Path,
    tmp_path: Path,
    record_property: Any,
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
    record_property("kills of a cache at random", len(shards))
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


def test_dead_at_every_single_rename_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
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
    record_property("deaths at renames of a cache", after)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(draw(tmp_path / "i", SIZES))
    build_cache(source, PoolEncoder(), tmp_path / "whole", [64], shard_size=2, **STEP)
    seconds, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return seconds() + (-1) ** calls[0] * 4e7

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    build_cache(source, PoolEncoder(), tmp_path / "jumped", [64], shard_size=2, **STEP)
    build_cache(source, PoolEncoder(), tmp_path / "jumped", [64], shard_size=2, **STEP)
    assert_same(contents(tmp_path / "jumped", [64]), contents(tmp_path / "whole", [64]))


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


def edited(folder: Path) -> None:
    """One caption edited; pictures deleted, replaced, made too small, left without a caption, damaged and added."""
    (folder / "00.txt").write_text("another caption")
    (folder / "01.png").unlink()
    (folder / "03.png").write_bytes(encoded((80, 80), 9))
    (folder / "04.png").write_bytes(encoded((20, 20)))
    (folder / "06.txt").unlink()
    (folder / "07.png").write_bytes(b"broken")
    (folder / "new.png").write_bytes(encoded((80, 80), 8))
    (folder / "new.txt").write_text("a new one")


def build(folder: Path, output: Path, **settings: Any) -> CacheReport:
    return build_cache(FolderSource(folder), PoolEncoder(), output, [64, 128], **{"shard_size": 3, **STEP, **settings})


@pytest.mark.parametrize("shard_size", [1, 3, 100])
def test_a_rerun_takes_out_what_is_stale_and_encodes_what_has_changed(shard_size: int, tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(160, 160)] * 9)
    build(folder, tmp_path / "c", shard_size=shard_size)
    kept = {path: path.read_bytes() for path in tmp_path.glob("c/*/*/*.tar")}
    assert build(folder, tmp_path / "c", shard_size=shard_size).changed == 0
    assert {path: path.read_bytes() for path in kept} == kept
    edited(folder)
    report = build(folder, tmp_path / "c", shard_size=shard_size)
    assert report.images == 9
    assert (report.cached, report.too_small) == ({"64": 6, "128": 4}, {"64": 1, "128": 3})
    assert (report.no_caption, report.broken, report.changed, report.removed) == (1, 1, 2, 1)
    assert "since the run before: 2 encoded anew, 1 gone and taken out" in str(report)
    build(folder, tmp_path / "fresh")
    assert_same(contents(tmp_path / "c", [64, 128]), contents(tmp_path / "fresh", [64, 128]))
    data = CachedLatents(tmp_path / "c", 64, verify=True)
    captions = {(info := data.info(index))["source"]: info["caption"] for index in range(len(data))}
    assert captions["00.png"] == "another caption"
    # nor does anything that reads the shards by itself see what is stale
    members: Counter[str] = Counter()
    for path in tmp_path.glob("c/64/*/*.tar"):
        with tarfile.open(path) as tar:
            members.update(tar.getnames())
    assert len(members) == 2 * len(data)
    assert set(members.values()) == {1}
    again = build(folder, tmp_path / "c", shard_size=shard_size)
    assert (again.changed, again.removed, again.cached) == (0, 0, report.cached)


def test_a_caption_that_changes_back_is_what_it_was(tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(160, 160)] * 3)
    build(folder, tmp_path / "c")
    before = contents(tmp_path / "c", [64, 128])
    text = (folder / "00.txt").read_text()
    for caption in ("other", text):
        (folder / "00.txt").write_text(caption)
        assert build(folder, tmp_path / "c").changed == 1
    assert_same(contents(tmp_path / "c", [64, 128]), before)


def test_tars_are_compared_with_what_was_cached_of_them_too(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", encoded((64, 64), i) if end == "png" else f"text {i}".encode())
               for i in range(4) for end in ("png", "txt")]  # fmt: skip
    tar = write_tar(tmp_path / "t.tar", members)
    build_cache(TarSource([tar]), PoolEncoder(), tmp_path / "c", [64], **STEP)
    members[1], members[2] = ("0.txt", b"edited"), ("1.png", encoded((64, 64), 9))
    write_tar(tar, members[:6])
    report = build_cache(TarSource([tar]), PoolEncoder(), tmp_path / "c", [64], **STEP)
    assert (report.images, report.cached, report.changed, report.removed) == (3, {"64": 3}, 2, 1)
    build_cache(TarSource([tar]), PoolEncoder(), tmp_path / "fresh", [64], **STEP)
    assert_same(contents(tmp_path / "c", [64]), contents(tmp_path / "fresh", [64]))


def test_a_rerun_that_dies_at_any_rename_leaves_nothing_stale_once_it_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(BaseException):
        pass

    replace, unlink = os.replace, Path.unlink
    first, second = draw(tmp_path / "first", [(160, 160)] * 9), draw(tmp_path / "second", [(160, 160)] * 9)
    edited(second)
    build(second, tmp_path / "fresh")
    expected = contents(tmp_path / "fresh", [64, 128])
    for after in range(100):
        left = [after]
        folder = tmp_path / f"i{after}"
        shutil.copytree(first, folder)
        build(folder, tmp_path / f"c{after}", shard_size=2)
        shutil.rmtree(folder)
        shutil.copytree(second, folder)

        def dying(source: Any, target: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Dead
            replace(source, target)

        def leaving(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if left[0] >= 0:
                unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            patch.setattr(Path, "unlink", leaving)
            try:
                build(folder, tmp_path / f"c{after}", shard_size=2)
                break
            except Dead:
                pass
        report = build(folder, tmp_path / f"c{after}", shard_size=2)
        assert (report.images, report.cached) == (9, {"64": 6, "128": 4})
        assert_same(contents(tmp_path / f"c{after}", [64, 128]), expected)
        assert not list((tmp_path / f"c{after}").glob("*/*/*.part"))
        shutil.rmtree(tmp_path / f"c{after}")
    assert after > 5


def test_processes_that_share_the_work_take_out_what_is_stale_together(tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(160, 160)] * 9)
    for rank in range(2):
        build(folder, tmp_path / "c", rank=rank, world=2)
    edited(folder)
    reports = [build(folder, tmp_path / "c", rank=rank, world=3) for rank in (2, 0, 1)]  # of another number
    assert [report.complete for report in reports] == [False, False, True]
    last = reports[-1]
    assert (last.images, last.changed, last.removed, last.no_caption, last.broken) == (9, 2, 1, 1, 1)
    build(folder, tmp_path / "fresh")
    assert_same(contents(tmp_path / "c", [64, 128]), contents(tmp_path / "fresh", [64, 128]))


def test_what_was_cached_without_a_digest_is_encoded_anew_and_counted(tmp_path: Path) -> None:
    folder = draw(tmp_path / "i", [(160, 160)] * 4)
    build(folder, tmp_path / "c")
    for path in tmp_path.glob("c/*/*/*.json"):
        record = json.loads(path.read_text())
        del record["digests"]
        path.write_text(json.dumps(record))
    assert len(CachedLatents(tmp_path / "c", 64)) == 4  # it can be trained on as it is
    report = build(folder, tmp_path / "c")
    assert (report.changed, report.undigested, report.cached) == (4, 4, {"64": 4, "128": 4})
    assert "4 were cached by a version that did not note what they were made of" in str(report)
    assert len(CachedLatents(tmp_path / "c", 64, verify=True)) == 4
    assert build(folder, tmp_path / "c").changed == 0


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
