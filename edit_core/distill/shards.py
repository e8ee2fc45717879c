"""A cache's shards: how one is written, found again, and rid of what is stale."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..errors import EDiTError
from ..files import read_json, write_file

__all__ = ["DiskError", "OpenShard", "as_json", "records", "remove_unfinished", "samples_of", "take_out", "writing"]


class OpenShard:
    """A tar being written under a temporary name."""

    def __init__(self, root: Path, folder: Path, rank: int) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.stem[-6:]) for path in folder.glob(f"shard-{rank:03d}-??????.*")]
            self.path = folder / f"shard-{rank:03d}-{max(numbers, default=-1) + 1:06d}.tar"
            self.part = self.path.with_suffix(".part")
            self.file = open(self.part, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self.root, self.opened = root, time.monotonic()
        self.digest, self.bytes, self.whole = hashlib.sha256(), 0, True
        self.keys: list[str] = []
        self.digests: list[str] = []
        self.places: list[tuple[int, int]] = []

    def add(self, key: str, digest: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Appends a sample: two members, as webdataset has them."""
        self.whole = False
        with writing(self.part):
            place = self.bytes
            data = save(tensors)
            self._member(f"{key}.safetensors", data)
            self._member(f"{key}.json", as_json(meta))
        self.keys.append(key)
        self.digests.append(digest)
        self.places.append((place, len(data)))
        self.whole = True

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._append(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def _append(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        """Makes the shard exist, unless it was cut off within a sample (by a second Ctrl-C)."""
        if not self.whole:
            self.abandon()
            return
        try:
            with writing(self.path):
                self._append(bytes(2 * tarfile.BLOCKSIZE))
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.part, self.path)
                record = {
                    "file": self.path.relative_to(self.root).as_posix(),
                    "samples": len(self.keys),
                    "bytes": self.bytes,
                    "sha256": self.digest.hexdigest(),
                    "keys": self.keys,
                    "digests": self.digests,
                    "places": self.places,
                }
                write_file(self.path.with_suffix(".json"), as_json(record))
        except DiskError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Removes what was written, as far as that is possible."""
        with suppress(OSError):
            self.file.close()  # flushes, which fails again on a full disk
        with suppress(OSError):
            self.part.unlink(missing_ok=True)


class DiskError(EDiTError):
    """The cache cannot be written; closing more shards would fail too."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}); finished shards are kept, so run the same "
            "command again once that is mended"
        ) from None


def as_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def remove_unfinished(output: Path, rank: int | None) -> None:
    """Removes what a dead process left: shards without a record. Of all processes where this is the only one."""
    name = "???" if rank is None else f"{rank:03d}"
    for pattern in (f"shard-{name}-??????.part", f".shard-{name}-??????.*.part"):
        for path in output.glob(f"*/*/{pattern}"):
            path.unlink(missing_ok=True)
    for path in output.glob(f"*/*/shard-{name}-??????.tar"):
        if not path.with_suffix(".json").exists():
            path.unlink(missing_ok=True)


def records(output: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The finished shards' records. A shard that was since lost or cut off does not count: its images come again."""
    for path in sorted(output.glob("*/*/shard-*.json")):
        record = read_json(path)
        shard = path.with_suffix(".tar")
        if shard.exists() and shard.stat().st_size == record["bytes"]:
            yield path, record


def samples_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A record's keys and digests; versions before these noted none, so that what they cached is encoded anew."""
    return list(zip(record["keys"], record.get("digests", [""] * len(record["keys"])), strict=True))


def take_out(path: Path, record: dict[str, Any], stale: set[tuple[str, str]]) -> None:
    """Writes a shard anew without what is stale. If that is cut short, its record no longer fits: it counts as lost."""
    samples = samples_of(record)
    kept = [index for index, sample in enumerate(samples) if sample not in stale]
    if len(kept) == len(samples):
        return
    shard = path.with_suffix(".tar")
    if not kept:
        path.unlink(missing_ok=True)
        shard.unlink(missing_ok=True)
        return
    ends = [*(offset for offset, _ in record["places"][1:]), record["bytes"] - 2 * tarfile.BLOCKSIZE]
    part = shard.with_name(f".{shard.name}.{secrets.token_hex(4)}.part")
    digest, size, places = hashlib.sha256(), 0, list[tuple[int, int]]()
    try:
        with open(shard, "rb") as source, open(part, "wb") as target:
            for index in kept:
                offset, length = record["places"][index]
                source.seek(offset)
                data = source.read(ends[index] - offset)
                places.append((size, length))
                target.write(data)
                digest.update(data)
                size += len(data)
            target.write(bytes(2 * tarfile.BLOCKSIZE))
            digest.update(bytes(2 * tarfile.BLOCKSIZE))
            size += 2 * tarfile.BLOCKSIZE
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, shard)
    finally:
        part.unlink(missing_ok=True)
    keys, digests = ([samples[index][i] for index in kept] for i in range(2))
    new = {"samples": len(kept), "bytes": size, "sha256": digest.hexdigest()}
    write_file(path, as_json({**record, **new, "keys": keys, "digests": digests, "places": places}))
