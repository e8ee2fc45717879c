"""A cache read back: samples, batches, and what is damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from support import caching
from support.caching import STEP, PoolEncoder

from edit_core.distill.cache import build_cache
from edit_core.distill.dataset import BatchPlan, CachedLatents, collate
from edit_core.distill.sources import FolderSource
from edit_core.errors import EDiTError

images = caching.images


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


def test_held_out_samples_are_in_no_batch(small: Path) -> None:
    whole, data = CachedLatents(small, 64), CachedLatents(small, 64, held_out=3)
    assert data.held_out == whole.buckets[8, 8][-3:]
    assert {**whole.buckets, (8, 8): whole.buckets[8, 8][:6]} == data.buckets
    assert len(whole.held_out) == 0
    plan = BatchPlan(data, 2, seed=0)
    seen = {index for step in range(20 * plan.steps_per_epoch) for index in plan.batch(step)}
    assert seen == set(range(len(data))) - set(data.held_out)
    assert data.collate(data.held_out)["latent"].shape[0] == 3
    assert [data.key(i) for i in data.held_out] == [whole.key(i) for i in data.held_out]
    for count in (9, -1):
        with pytest.raises(EDiTError, match=rf"64 pixels {count} images cannot be held out: .* 8x8, has 9"):
            CachedLatents(small, 64, held_out=count)
    assert len(CachedLatents(small, 64, held_out=8).buckets[8, 8]) == 1
