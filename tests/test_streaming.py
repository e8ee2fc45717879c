"""Shards and tars behind URLs: read in part, or from their start on, and never kept."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support import caching
from support.caching import STEP, PoolEncoder, assert_same, contents, encoded, write_tar
from support.web import Web, serve

from edit_core.cli import main
from edit_core.commands import cache as command
from edit_core.distill import remote, sources
from edit_core.distill.cache import build_cache
from edit_core.distill.dataset import BatchPlan, CachedLatents, collate
from edit_core.distill.sources import FolderSource, TarSource
from edit_core.errors import EDiTError

images = caching.images


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    build_cache(FolderSource(images), PoolEncoder(), folder, [64], shard_size=3, **STEP)
    return folder


@pytest.fixture
def cached(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in made.rglob("*"):
        if path.is_file():
            target = tmp_path / "cache" / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serve(tmp_path) as server:
        yield server


def in_memory(folder: Path, name: str) -> str:
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{name}"


# --- a cache behind a URL ---


@pytest.mark.parametrize("protocol", ["http", "memory"])
def test_a_remote_cache_is_read_as_a_local_one(protocol: str, cached: Path, web: Web) -> None:
    url = f"{web.url}/cache/" if protocol == "http" else in_memory(cached, "equal")
    here, there = CachedLatents(cached, 64, held_out=2), CachedLatents(url, 64, verify=True, held_out=2)
    assert len(there) == len(here) == 21
    assert (there.buckets, there.held_out, there.backbone) == (here.buckets, here.held_out, here.backbone)
    for index in range(len(here)):
        sample, expected = there[index], here[index]
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[name], tensor) for name, tensor in expected.items())
        assert (there.key(index), there.info(index)) == (here.key(index), here.info(index))
    assert [BatchPlan(there, 2, 5).batch(step) for step in range(9)] == [
        BatchPlan(here, 2, 5).batch(step) for step in range(9)
    ]
    assert CachedLatents.describe(url) == CachedLatents.describe(cached)
    assert all(
        torch.equal(CachedLatents.empty_prompt(url)[name], tensor)
        for name, tensor in CachedLatents.empty_prompt(cached).items()
    )


def test_a_sample_costs_its_own_bytes_and_an_opening_none_of_the_shards(cached: Path, web: Web) -> None:
    data = CachedLatents(f"{web.url}/cache", 64)
    sent = {r.path: r.sent for r in web.requests if r.path.endswith(".tar")}
    assert len(sent) == len(data.manifest["shards"])
    assert set(sent.values()) == {1}
    for index in (0, 7, 20):
        web.requests.clear()
        data[index]
        (request,) = web.requests
        assert (request.start, request.sent) == (data._places[index].offset, 512 + data._places[index].size)


def test_damaged_remote_shards_are_named_with_the_reason(cached: Path, web: Web) -> None:
    url = f"{web.url}/cache"
    first, second = sorted(cached.glob("64/8x8/*.tar"))[:2]
    name = f"{url}/64/8x8/{first.name}"
    data, other = first.read_bytes(), second.read_bytes()
    assert len(data) == len(other)

    def read_all(verify: bool = False) -> None:
        opened = CachedLatents(url, 64, verify)
        for index in range(len(opened)):
            opened[index]
            opened.info(index)

    for damaged, verify, part in (
        (None, False, "this shard of 3 samples is missing"),
        (data[:-1], False, f"fewer than the {len(data)} bytes"),
        (data[:600], False, f"fewer than the {len(data)} bytes"),
        (data + b"\0", False, f"more than the {len(data)} bytes"),
        (other, False, "another shard's, or damaged"),
        (other, True, "its sha256 is"),
        (data[:512] + bytes(2000) + data[2512:], False, "is damaged"),
    ):
        first.unlink()
        if damaged is not None:
            first.write_bytes(damaged)
        with pytest.raises(EDiTError, match=part) as caught:
            read_all(verify)
        assert name in str(caught.value)
        first.write_bytes(data)
    read_all(verify=True)

    opened = CachedLatents(url, 64)
    keys = json.loads(first.with_suffix(".json").read_text())["keys"]
    index = next(i for i in range(len(opened)) if opened.key(i) == keys[2])
    first.write_bytes(data[:6200])  # cut off after it was opened
    with pytest.raises(EDiTError, match=r"ends at byte \d+, but the file at byte 6200"):
        opened[index]
    with pytest.raises(EDiTError, match=r"the json of sample .* cannot be read"):
        opened.info(index)
    first.unlink()
    with pytest.raises(EDiTError, match=r"cannot be read \(there is no such file\)"):
        opened[index]
    first.write_bytes(data)
    first.with_suffix(".json").unlink()
    with pytest.raises(EDiTError, match=r"shard-000-\d+.json: there is no such file"):
        read_all()


def test_what_is_no_remote_cache_is_one_sentence(cached: Path, web: Web) -> None:
    for url, part in (
        (f"{web.url}/elsewhere", "not a cache, which has a manifest.json"),
        ("memory://nowhere", "not a cache, which has a manifest.json"),
        ("nonsense://x", "Protocol not known: nonsense"),
        ("http://127.0.0.1:1/x", "Connect"),
    ):
        with pytest.raises(EDiTError, match=part) as caught:
            CachedLatents(url, 64)
        assert url in str(caught.value)
    (cached / "manifest.json").unlink()
    with pytest.raises(EDiTError, match="this cache is not finished"):
        CachedLatents(f"{web.url}/cache", 64)


def test_a_server_that_takes_no_ranges_is_refused_at_once(cached: Path, web: Web) -> None:
    web.ranges = False
    with pytest.raises(EDiTError, match=r"shard-000-\d+.tar: .* takes no range requests"):
        CachedLatents(f"{web.url}/cache", 64)
    tries = [r.path for r in web.requests if r.path.endswith(".tar")]
    assert len(tries) == len(set(tries)), "what cannot be mended by waiting was tried again"


def test_failures_that_pass_are_waited_for_and_others_are_not(cached: Path, web: Web) -> None:
    data = CachedLatents(f"{web.url}/cache", 64)
    expected = data[3]
    web.failures = [503, 429]
    assert torch.equal(data[3]["latent"], expected["latent"])
    web.failures = [503] * 3
    with pytest.raises(EDiTError, match=r"shard-000-\d+.tar: sample .* \(the server answers 503"):
        data[3]
    assert web.failures == []
    web.failures = [401, 500]
    with pytest.raises(EDiTError, match="the server answers 401"):
        data[3]
    assert web.failures == [500]


def test_forked_workers_read_what_their_parent_opened(cached: Path, web: Web) -> None:
    here, there = CachedLatents(cached, 64), CachedLatents(f"{web.url}/cache", 64)
    there[0]  # so that the parent has a connection, which its children cannot use
    plan = BatchPlan(here, 2, seed=0)
    loader = torch.utils.data.DataLoader(
        there, batch_sampler=[plan.batch(step) for step in range(8)], num_workers=2, collate_fn=collate,
        multiprocessing_context="fork", timeout=20,
    )  # fmt: skip
    for step, batch in enumerate(loader):
        assert torch.equal(batch["latent"], here.collate(plan.batch(step))["latent"])
    assert step == 7


def test_a_key_in_the_query_goes_to_the_server_alone(cached: Path, web: Web) -> None:
    web.key = "key=secret"
    data = CachedLatents(f"{web.url}/cache?key=secret", 64)
    assert data.info(0)["caption"]
    next(cached.glob("64/8x8/*.tar")).unlink()
    for url in (f"{web.url}/cache?key=secret", f"{web.url}/cache?key=secret2", f"{web.url}/none?key=secret"):
        with pytest.raises(EDiTError) as caught:
            CachedLatents(url, 64)
        assert web.url in str(caught.value)
        assert "secret" not in str(caught.value)
    source = TarSource([f"{web.url}/a.tar?key=secret"])
    assert "secret" not in source.name


# --- tars behind URLs ---


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    members = [(f"d/{i:03}.{end}", encoded((70 + 9 * (i % 3), 80), i) if end == "png" else f"text {i}".encode())
               for i in range(12) for end in ("png", "txt")]  # fmt: skip
    return write_tar(tmp_path / "one.tar", members)


@pytest.mark.parametrize("kind", ["ranges", "no ranges", "memory", "packed"])
def test_remote_tars_make_the_same_cache_as_local_ones(
    kind: str, tar: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", 10240)
    build_cache(TarSource([tar]), PoolEncoder(), tmp_path / "local", [64], **STEP)
    web.ranges = kind != "no ranges"
    url = f"{web.url}/one.tar"
    if kind == "memory":
        fsspec.filesystem("memory").pipe_file("/tars/one.tar", tar.read_bytes())
        url = "memory://tars/one.tar"
    elif kind == "packed":
        write_packed(tmp_path / "packed" / "one.tar", tar)
        url = f"{web.url}/packed/one.tar"
    report = build_cache(TarSource([url]), PoolEncoder(), tmp_path / "remote", [64], **STEP)
    assert (report.images, report.cached, report.broken) == (12, {"64": 12}, 0)
    assert_same(contents(tmp_path / "remote", [64]), contents(tmp_path / "local", [64]))
    if kind == "ranges":
        sent = [request.sent for request in web.requests]
        assert sum(sent) <= tar.stat().st_size
        assert max(sent) <= 10240


def write_packed(path: Path, tar: Path) -> None:
    path.parent.mkdir()
    with tarfile.open(tar) as plain, tarfile.open(path, "w:gz") as packed:
        for member in plain:
            packed.addfile(member, io.BytesIO(plain.extractfile(member).read()))  # type: ignore[union-attr]


def test_a_stopped_build_from_a_remote_tar_goes_on(tar: Path, web: Web, tmp_path: Path) -> None:
    source, out = TarSource([f"{web.url}/one.tar"]), tmp_path / "c"

    def stopping(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 8:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        build_cache(source, PoolEncoder(), out, [64], shard_size=1, bucket_step=16, batch_size=1, progress=stopping)
    before = {path: path.read_bytes() for path in out.glob("64/*/*.tar")}
    report = build_cache(source, PoolEncoder(), out, [64], shard_size=1, bucket_step=16, batch_size=1)
    assert report.cached == {"64": 12}
    assert {path: path.read_bytes() for path in before} == before
    shared = [build_cache(source, PoolEncoder(), tmp_path / "two", [64], rank=r, world=2, **STEP) for r in range(2)]
    assert shared[1].images == 12
    assert_same(contents(tmp_path / "two", [64]), contents(out, [64]))


def test_remote_tars_that_end_early_or_are_missing_are_named(tar: Path, web: Web, tmp_path: Path) -> None:
    data = tar.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:9000])
    (tmp_path / "text.tar").write_bytes(b"no tar" * 500)
    for name, part in (
        ("cut.tar", "not a whole tar"),
        ("text.tar", "not a whole tar"),
        ("none.tar", r"cannot be read \(there is no such file\)"),
    ):
        with pytest.raises(EDiTError, match=part) as caught:
            list(TarSource([f"{web.url}/{name}"]))
        assert str(caught.value).startswith(f"{web.url}/{name}: ")
    web.failures = [503] * 20
    with pytest.raises(EDiTError, match=r"one.tar: cannot be read \(the server answers 503"):
        list(TarSource([f"{web.url}/one.tar"]))
    web.failures = [503]
    assert len(list(TarSource([f"{web.url}/one.tar"]))) == 12


def test_the_command_takes_urls_of_tars(
    tar: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PipelineEncoder", lambda *_: PoolEncoder())
    common = ["cache", "--model", "m", "--resolutions", "64", "--bucket-step", "16", "--device", "cpu", "--output"]
    assert main([*common, str(tmp_path / "c"), "--tars", f"{web.url}/one.tar"]) == 0
    assert "cached 12 at 64" in capsys.readouterr().out
    assert main([*common, str(tmp_path / "d"), "--tars", f"{web.url}/none.tar"]) == 2
    assert "there is no such file" in capsys.readouterr().err
