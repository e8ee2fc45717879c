"""Builds a cache: shards of latents and text embeddings, by resolution and bucket.

    cache/settings.json                               what it is made with; another run must agree
    cache/empty_prompt.safetensors                    the embeddings of the empty prompt
    cache/512/64x64/shard-RRR-NNNNNN.tar              samples of 64x64 latent cells, written by process RRR
    cache/512/64x64/shard-RRR-NNNNNN.json             that shard's record: samples, bytes, sha256, keys and places
    cache/ranks/rank-RRR-of-WWW.json                  what process RRR left out, once it is through
    cache/manifest.json                               all of it, once every process is through

A shard exists once its record does. The record is written last, after the shard has its final name and lies on the
disk; a process that dies leaves at most files without a record, which its next run removes. Nothing is locked: every
process takes its own share of the keys, and writes only files with its own number in their names. The last one takes
out what is stale: samples whose image or caption has changed or gone since they were written, known by their digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import EDiTError, shown
from ..files import read_json, write_file
from .buckets import View, buckets, views_of
from .captions import counted, no_caption
from .encoders import CELL, Encoder
from .shards import DiskError, OpenShard, as_json, records, remove_unfinished, samples_of, take_out, writing
from .sources import Item, Source

__all__ = ["EMPTY_PROMPT", "FORMAT", "FORMAT_VERSION", "CacheReport", "Progress", "build_cache"]

FORMAT = "edit-cache"
FORMAT_VERSION = 1
EMPTY_PROMPT = "empty_prompt.safetensors"
T = TypeVar("T")
Progress = Callable[[Iterable[Item], int, str], Iterable[Item]]
"""`edit_core.runtime.progress`, or alike."""

_SHARD_SECONDS = 600.0  # a shard is closed after so long, full or not, so that a kill costs no more than that
_EXAMPLES = 5  # images that a report names
_READERS = min(8, os.cpu_count() or 1)


@dataclass
class CacheReport:
    """What one process, or all of them, made of its images."""

    images: int = 0
    cached: dict[str, int] = field(default_factory=dict)
    """By resolution."""
    too_small: dict[str, int] = field(default_factory=dict)
    """By resolution: images that would have to be enlarged."""
    no_caption: int = 0
    unusable: int = 0
    """Images with a caption that cannot be read, or with several that differ."""
    broken: int = 0
    duplicates: int = 0
    examples: list[str] = field(default_factory=list)
    """A few of the images that were left out as broken or without a caption, and why."""
    others: dict[str, int] = field(default_factory=dict)
    """By kind: what lies in the source and is neither an image nor an image's caption."""
    changed: int = 0
    """Images that an earlier run cached otherwise, which were encoded anew."""
    undigested: int = 0
    """Of these, images that were cached by a version that noted no digests."""
    removed: int = 0
    """Images that an earlier run cached, and that are no longer there."""
    cut: dict[str, int] = field(default_factory=dict)
    """By limit: captions of cached images that the text encoders read the beginning of."""
    complete: bool = False
    """Whether all processes are through, and the manifest is written."""

    def leave_out(self, item: Item, reason: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{shown([item.name])}: {reason}")

    def add(self, other: CacheReport) -> None:
        for name in (
            "images", "no_caption", "unusable", "broken", "duplicates", "changed", "undigested", "removed"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("cached", "too_small", "others", "cut"):
            counts = getattr(self, name)
            for kind, count in getattr(other, name).items():
                counts[kind] = counts.get(kind, 0) + count
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def __str__(self) -> str:
        cached = ", ".join(f"{count} at {resolution}" for resolution, count in self.cached.items())
        left = [f"{count} too small for {resolution}" for resolution, count in self.too_small.items() if count]
        counts = {
            "without a caption": self.no_caption,
            "with a caption that cannot be used": self.unusable,
            "broken": self.broken,
            "found twice": self.duplicates,
        }
        left += [counted(counts)] if counted(counts) else []
        lines = [f"{self.images} images; cached {cached}", "left out: " + (", ".join(left) or "none")]
        lines += [f"  {example}" for example in self.examples]
        if counted(self.others):
            lines.append(f"neither an image nor an image's caption: {counted(self.others)}")
        if self.cut:
            cut = ", ".join(f"{count} over {limit}" for limit, count in self.cut.items())
            lines.append(f"captions that are not read to their end: {cut}")
        if self.changed or self.removed:
            since = f"since the run before: {self.changed} encoded anew, {self.removed} gone and taken out"
            old = f" ({self.undigested} were cached by a version that did not note what they were made of)"
            lines.append(since + (old if self.undigested else ""))
        return "\n".join(lines)


def build_cache(
    source: Source,
    encoder: Encoder,
    output: str | Path,
    resolutions: Sequence[int],
    *,
    batch_size: int = 8,
    shard_size: int = 256,
    bucket_step: int = 64,
    max_aspect: float = 2.0,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda items, total, label: items,
    too_long: Callable[[str], Sequence[str]] = lambda caption: (),
) -> CacheReport:
    """Encodes a source's images and captions into a folder, or goes on where an earlier run stopped.

    What is cached already is kept as long as its image's file and its caption are what they were: what has changed is
    encoded anew, and what is gone is taken out.

    Every image goes, at every resolution, to the bucket whose aspect is nearest to its own: it is scaled down and
    cropped at the centre. It is never enlarged. Ctrl-C closes the open shards, then raises KeyboardInterrupt.

    Args:
        source: images with captions.
        encoder: see :class:`Encoder`.
        output: the cache's folder; made if need be.
        resolutions: pixels per side of a square.
        batch_size: images of the smallest resolution per call of the VAE (fewer of the larger ones), and prompts per
            call of the text encoders.
        shard_size: most samples per shard.
        bucket_step: buckets' sides are multiples of so many pixels.
        max_aspect: of the longer to the shorter side of a bucket.
        rank: this process's number among those that share the work; no two at once may have the same.
        world: how many processes share the work.
        progress: wraps the source's items.
        too_long: the limits of the text encoders that a caption is longer than.

    Returns:
        the report of all processes if this was the last one, else of this one.

    Raises:
        EDiTError: bad arguments, an existing cache of something else, nothing usable in the source, memory or disk
            that do not suffice. Finished shards stay, and the next run goes on from them.
    """
    output = Path(output)
    if not 0 <= rank < world <= 999:
        raise EDiTError(f"process {rank} of {world} cannot be: ranks go from 0 to world - 1, and world to 999")
    if batch_size < 1 or shard_size < 1:
        raise EDiTError("the batch size and the shard size must be at least 1")
    resolutions = sorted(set(resolutions))
    sizes = {r: buckets(r, bucket_step, max_aspect) for r in resolutions}
    settings = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "backbone": encoder.backbone,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "encoder": encoder.fingerprint,
        "source": source.name,
        "resolutions": resolutions,
        "bucket_step": bucket_step,
        "max_aspect": float(max_aspect),
    }
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        _agree(output, settings)
        remove_unfinished(output, None if world == 1 else rank)
        (output / "ranks").mkdir(exist_ok=True)
        (output / "ranks" / _rank_file(rank, world)).unlink(missing_ok=True)
        empty = output / EMPTY_PROMPT
        if not empty.exists():
            with _memory("one prompt"):
                prompt = encoder.encode_prompts([""])
            write_file(empty, save({name: tensor[0].contiguous() for name, tensor in prompt.items()}))
        done: _Done = {r: {} for r in resolutions}
        for path, record in records(output):
            known = done[int(path.parent.parent.name)]
            for key, digest in samples_of(record):
                known.setdefault(key, set()).add(digest)
    build = _Build(encoder, output, done, batch_size, shard_size, rank, world, too_long)
    with _deferred_interrupt() as stop:
        build.run(source, sizes, progress, stop)
    report = build.report
    with writing(output):
        write_file(output / "ranks" / _rank_file(rank, world), as_json({**asdict(report), "stale": build.stale}))
        reports = [output / "ranks" / _rank_file(number, world) for number in range(world)]
        if not all(path.exists() for path in reports):
            return report
        return _finish(output, settings, [read_json(path) for path in reports])


_Done = dict[int, dict[str, set[str]]]
"""Resolution -> key -> the digests of what it was cached of: more than one where a run was stopped on its way."""


class _Build:
    """The state of one run: what waits for its batch, and the open shards."""

    def __init__(
        self,
        encoder: Encoder,
        output: Path,
        done: _Done,
        batch_size: int,
        shard_size: int,
        rank: int,
        world: int,
        too_long: Callable[[str], Sequence[str]],
    ) -> None:
        self.encoder, self.output, self.done = encoder, output, done
        self.batch_size, self.shard_size, self.rank, self.world = batch_size, shard_size, rank, world
        self.too_long = too_long
        counts = {str(r): 0 for r in done}
        self.report = CacheReport(cached=dict(counts), too_small=dict(counts))
        self.now: dict[str, str] = {}
        """Key -> the digest of what the source has for it; empty where that cannot be used."""
        self.stale: list[tuple[str, str]] = []
        """Keys and digests of this process's share that are cached, and that the source no longer has."""
        self.chunk: list[tuple[Item, str, list[View]]] = []
        self.waiting: dict[tuple[int, int, int], list[tuple[str, str, View, dict[str, Tensor]]]] = {}
        self.shards: dict[tuple[int, int, int], OpenShard] = {}

    def run(
        self, source: Source, sizes: dict[int, list[tuple[int, int]]], progress: Progress, stop: threading.Event
    ) -> None:
        from PIL import UnidentifiedImageError

        captions, seen, unusable = 0, 0, ""

        def mine() -> Iterator[Item]:
            nonlocal captions, seen, unusable
            for item in source:
                seen += 1
                captions += item.caption is not None
                unusable = unusable or item.unusable
                if _share(item.key, self.world) == self.rank:
                    yield item

        def read(item: Item) -> tuple[str, list[View] | str]:
            if item.caption is None:
                return "", []
            try:
                data = item.read()
                digest = _digest(data, item.caption)
                wanted = {r: sizes[r] for r, known in self.done.items() if digest not in known.get(item.key, ())}
                return digest, views_of(item, data, wanted) if wanted else []
            except UnidentifiedImageError:  # its own message has only an address in memory
                return "", "not an image that Pillow can read"
            except Exception as error:  # Pillow raises every kind there is for a damaged file
                return "", (str(error).strip() or type(error).__name__).splitlines()[0]

        label = f"cache {self.rank + 1}/{self.world}" if self.world > 1 else "cache"
        items = progress(mine(), source.count // self.world, label)
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                for item, (digest, views) in _ahead(pool, read, items, 2 * _READERS):
                    if stop.is_set():
                        raise KeyboardInterrupt
                    self.report.images += 1
                    if item.key in self.now:
                        self.report.duplicates += 1
                        self.report.leave_out(item, "an image of this name came before")
                        continue
                    self.now[item.key] = digest
                    self._take(item, digest, views)
            self._encode_chunk()
            for bucket in list(self.waiting):
                self._encode_waiting(bucket)
            self._close_all()
        except DiskError:
            self._abandon_all()
            raise
        except BaseException:
            self._close_all()
            raise
        if self.rank == 0:  # every process has seen all of them
            self.report.others = dict(source.others)
        if seen and not captions:
            raise no_caption(source.name, seen, source.others, unusable)
        self._compare()

    def _compare(self) -> None:
        """Finds what is stale, once the whole source is known."""
        keys = {key for known in self.done.values() for key in known if _share(key, self.world) == self.rank}
        for key in sorted(keys):
            cached = {digest for known in self.done.values() for digest in known.get(key, ())}
            now = self.now.get(key)
            stale = sorted(digest for digest in cached if not now or digest != now)
            self.stale += [(key, digest) for digest in stale]
            self.report.removed += now is None
            if now and stale:
                self.report.changed += 1
                self.report.undigested += stale == [""]

    def _take(self, item: Item, digest: str, views: list[View] | str) -> None:
        if item.problem:
            self.report.unusable += 1
            self.report.leave_out(item, item.problem)
        elif item.caption is None:
            self.report.no_caption += 1
            self.report.leave_out(item, "no caption")
        elif isinstance(views, str):
            self.report.broken += 1
            self.report.leave_out(item, views)
        else:
            new = {view.resolution for view in views}
            cached = {r for r, known in self.done.items() if r in new or digest in known.get(item.key, ())}
            for resolution in self.done:
                (self.report.cached if resolution in cached else self.report.too_small)[str(resolution)] += 1
            if not cached:
                self.now[item.key] = ""
                return
            for limit in self.too_long(item.caption):
                self.report.cut[limit] = self.report.cut.get(limit, 0) + 1
            if views:
                self.chunk.append((item, digest, views))
            if len(self.chunk) == self.batch_size:
                self._encode_chunk()

    def _encode_chunk(self) -> None:
        """Encodes the chunk's captions, once for all resolutions, and hands its images on to their buckets."""
        chunk, self.chunk = self.chunk, []
        if not chunk:
            return
        with _memory(f"{len(chunk)} prompts"):
            prompts = self.encoder.encode_prompts([item.caption or "" for item, _, _ in chunk])
        for index, (item, digest, views) in enumerate(chunk):
            prompt = {name: tensor[index] for name, tensor in prompts.items()}
            for view in views:
                self.waiting.setdefault(view.bucket, []).append((item.key, digest, view, prompt))
                # Larger images in smaller batches, so that one batch size suits all resolutions.
                most = max(1, self.batch_size * min(self.done) ** 2 // view.resolution**2)
                if len(self.waiting[view.bucket]) >= most:
                    self._encode_waiting(view.bucket)

    def _encode_waiting(self, bucket: tuple[int, int, int]) -> None:
        samples = self.waiting.pop(bucket)
        resolution, height, width = bucket
        with _memory(f"{len(samples)} images of {height}x{width} pixels"):
            latents = self.encoder.encode_images(torch.stack([view.pixels for _, _, view, _ in samples]))
        for (key, digest, view, prompt), latent in zip(samples, latents, strict=True):
            shard = self.shards.get(bucket)
            if shard is None:
                folder = self.output / str(resolution) / f"{height // CELL}x{width // CELL}"
                shard = self.shards[bucket] = OpenShard(self.output, folder, self.rank)
            tensors = {"latent": latent, **prompt}
            shard.add(key, digest, {name: t.contiguous() for name, t in tensors.items()}, view.meta)
            if len(shard.keys) >= self.shard_size:
                self.shards.pop(bucket).close()
        now = time.monotonic()
        for other in [b for b, shard in self.shards.items() if now - shard.opened > _SHARD_SECONDS]:
            self.shards.pop(other).close()

    def _close_all(self) -> None:
        while self.shards:
            self.shards.popitem()[1].close()

    def _abandon_all(self) -> None:
        while self.shards:
            self.shards.popitem()[1].abandon()


def _digest(data: bytes, caption: str) -> str:
    """Of all that a sample is made of, but for the settings, which the whole cache has in common."""
    return hashlib.sha256(hashlib.sha256(data).digest() + caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _share(key: str, world: int) -> int:
    """Whose a key is: by a digest, not by position, so that a source that grew gives every process its former share."""
    return int(key[-8:], 16) % world


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[Item], T], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, T]]:
    """Reads items in other threads, in order, at most `depth` ahead."""
    waiting: deque[tuple[Item, Future[T]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one interrupts as always. Other threads get none anyway."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _memory(what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise EDiTError(
            f"the device's memory does not suffice to encode {what}; choose a smaller batch size or dtype "
            "(finished shards are kept)"
        ) from None


def _agree(output: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new cache, or checks that they are an existing one's."""
    path = output / "settings.json"
    if not path.exists():
        write_file(path, as_json(settings))
    before = read_json(path)
    if not isinstance(before, dict):
        raise EDiTError(f"{path}: is not a cache's settings")
    for name, value in settings.items():
        if before.get(name) != value:
            what = " (the VAE, the text encoders, and whether both ftfy and bs4 are installed)" * (name == "encoder")
            raise EDiTError(
                f"{output}: this cache was begun with {name}{what} {before.get(name)!r}, and now it is {value!r}; "
                "choose another folder, or the same settings"
            )


def _rank_file(rank: int, world: int) -> str:
    return f"rank-{rank:03d}-of-{world:03d}.json"


def _finish(output: Path, settings: dict[str, Any], reports: list[dict[str, Any]]) -> CacheReport:
    """Takes out what is stale, and writes the manifest. Two processes that end together write the same one."""
    stale = {(key, digest) for part in reports for key, digest in part.pop("stale", [])}
    report = CacheReport(complete=True)
    for part in reports:
        report.add(CacheReport(**part))
    if stale:
        (output / "manifest.json").unlink(missing_ok=True)  # until it is written anew, the cache is not finished
        for path, record in records(output):
            take_out(path, record, stale)
    shards, owners = [], dict[tuple[str, str], str]()
    for _, record in records(output):
        resolution = record["file"].split("/")[0]
        for key in record.pop("keys"):
            if (other := owners.setdefault((resolution, key), record["file"])) != record["file"]:
                raise EDiTError(
                    f"{output}: {record['file']} and {other} hold the same image, since two processes shared a rank; "
                    "remove one of them with its .json and run the same command again"
                )
        for name in ("places", "digests"):
            record.pop(name, None)
        shards.append(record)
    if not shards:
        raise EDiTError(f"no image could be cached: {str(report).splitlines()[1]}")
    empty = (output / EMPTY_PROMPT).read_bytes()
    manifest = {
        **settings,
        "empty_prompt": {"file": EMPTY_PROMPT, "bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest()},
        "report": asdict(report),
        "shards": shards,
    }
    write_file(output / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return report
