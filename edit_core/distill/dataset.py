"""Reads a cache: samples by index straight from the shards, and a plan of batches that needs no state.

The shards may lie behind a URL. Their samples are then read by range requests, not as webdataset's streams: with random
access a sample follows from its index alone, so that a resumed training goes on exactly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import EDiTError, said, shown
from .cache import EMPTY_PROMPT, FORMAT, FORMAT_VERSION
from .records import Manifest, Record, check
from .remote import File, exists, locate, open_stream, read

__all__ = ["BatchPlan", "CachedLatents", "collate"]

logger = logging.getLogger(__name__)

_REQUESTS = 16  # shards behind a URL that are looked at at once
_MOST_JSON = 1 << 24  # bytes
_DAMAGED = (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError)
"""What safetensors' `load` raises for bytes that are not one of its files, or hold a dtype that PyTorch lacks."""


class _Place(NamedTuple):
    bucket: tuple[int, int]
    key: str
    shard: File
    offset: int
    """Of the tar header."""
    size: int
    """Of the tensors' bytes."""


class CachedLatents(Dataset[dict[str, Tensor]]):
    """The samples of one resolution, ordered by bucket and key, however they are spread over shards.

    A sample has `latent` (c, h, w), `prompt_embeds` (T, C), and `prompt_mask` (T) bool (PixArt-Σ) or `pooled` (P)
    (SD3.5).

    Args:
        folder: what `cache` wrote: a path, or a URL that fsspec knows, such as `https://…` or `s3://…`.
        resolution: one of the cache's.
        verify: compare every shard's sha256, which reads them whole.
        held_out: so many samples are no part of any bucket, and so of no :class:`BatchPlan`: the last ones of the
            bucket that has most, for an evaluation on what was not trained on.

    Raises:
        EDiTError: not a finished cache, no such resolution, no bucket with more samples than are held out, or a shard
            that is missing or not as it was written; later also by reading a sample.
    """

    def __init__(self, folder: str | Path, resolution: int, verify: bool = False, held_out: int = 0) -> None:
        self.folder, self.resolution = locate(folder), resolution
        self.manifest = _manifest(self.folder)
        self.backbone: str = self.manifest["backbone"]
        if resolution not in self.manifest["resolutions"]:
            known = ", ".join(map(str, self.manifest["resolutions"]))
            raise EDiTError(f"{self.folder}: this cache has no resolution {resolution}, but {known}")
        self._names = {"latent", *_empty_prompt(self.folder, self.manifest["empty_prompt"])}
        shards = [s for s in self.manifest["shards"] if s["file"].split("/")[0] == str(resolution)]
        if not shards:
            raise EDiTError(f"{self.folder}: this cache has no image at {resolution} pixels; all were too small")
        find = partial(_places, self.folder, verify=verify)
        if isinstance(self.folder, Path):
            found = list(map(find, shards))
        else:
            with ThreadPoolExecutor(_REQUESTS) as pool:
                found = list(pool.map(find, shards))
        self._places = sorted(chain.from_iterable(found))
        self.buckets: dict[tuple[int, int], range] = {}
        """Height and width in latent cells -> its indices."""
        start = 0
        for end in range(1, len(self._places) + 1):
            if end == len(self._places) or self._places[end].bucket != self._places[start].bucket:
                self.buckets[self._places[start].bucket] = range(start, end)
                start = end
        self.held_out = self._hold_out(held_out)
        """The indices of the samples that are in no bucket; they are read like all others."""

    def _hold_out(self, count: int) -> range:
        bucket, span = max(self.buckets.items(), key=lambda item: len(item[1]))
        if not 0 <= count < len(span):
            raise EDiTError(
                f"{self.folder}: at {self.resolution} pixels {count} images cannot be held out: the largest bucket, "
                f"{bucket[0]}x{bucket[1]}, has {len(span)}, and one at least must be left to train on"
            )
        self.buckets[bucket] = span[: len(span) - count]
        return span[len(span) - count :]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self._places[index]
        what = f"{place.shard}: sample {shown([place.key])}"
        try:
            data = read(place.shard, place.offset, tarfile.BLOCKSIZE + place.size)
        except OSError as error:
            raise EDiTError(f"{what} cannot be read ({error.strerror or error})") from None
        if len(data) < tarfile.BLOCKSIZE + place.size:
            end = place.offset + tarfile.BLOCKSIZE + place.size
            raise EDiTError(f"{what} ends at byte {end}, but the file at byte {place.offset + len(data)}")
        try:
            header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "replace")
            found, right = f"{shown([header.name])} of {header.size} bytes", (f"{place.key}.safetensors", place.size)
            fits = (header.name, header.size) == right
        except (tarfile.TarError, ValueError):
            found, fits = "no sample", False
        if not fits:
            raise EDiTError(
                f"{what} of {place.size} bytes should be at byte {place.offset}, but there is {found}: "
                "this file is another shard's, or damaged"
            )
        try:
            sample = load(data[tarfile.BLOCKSIZE :])
        except _DAMAGED as error:
            raise EDiTError(f"{what} is damaged ({said(error)})") from None
        if sample.keys() != self._names:
            raise EDiTError(f"{what} is damaged: it holds {shown(sorted(sample))}, not {shown(sorted(self._names))}")
        if sample["latent"].shape[1:] != place.bucket:
            raise EDiTError(f"{what} has no latent of {place.bucket[0]}x{place.bucket[1]} cells")
        return sample

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Samples of one bucket as a batch: `latent` (B, c, h, w), `prompt_embeds` (B, T, C) and so on."""
        return collate([self[index] for index in indices])

    @staticmethod
    def empty_prompt(folder: str | Path) -> dict[str, Tensor]:
        """A sample's tensors but for the latent, of the empty prompt: for a caption that is dropped.

        Raises:
            EDiTError: the file is missing or damaged.
        """
        path = locate(folder) / EMPTY_PROMPT
        try:
            return load(read(path))
        except (OSError, *_DAMAGED) as error:
            raise EDiTError(f"{path}: cannot be read ({said(error)})") from None

    @staticmethod
    def describe(folder: str | Path) -> dict[str, Any]:
        """What a training notes of its data: numbers and digests; no paths, since weights are published.

        Raises:
            EDiTError: not a finished cache.
        """
        manifest = _manifest(locate(folder))
        images: dict[str, int] = {}
        for shard in manifest["shards"]:
            resolution = shard["file"].split("/")[0]
            images[resolution] = images.get(resolution, 0) + shard["samples"]
        shards = "".join(sorted(shard["sha256"] for shard in manifest["shards"]))
        return {
            "backbone": manifest["backbone"],
            "dtype": manifest["dtype"],
            "encoder": manifest["encoder"],
            "images": images,
            "shards": hashlib.sha256(shards.encode()).hexdigest(),
        }

    def key(self, index: int) -> str:
        """The sample's name in its shard."""
        return self._places[index].key

    def info(self, index: int) -> dict[str, Any]:
        """The sample's json: caption, source, size (width, height) and crop (left, top, right, bottom).

        Raises:
            EDiTError: the shard is damaged.
        """
        place = self._places[index]
        start = place.offset + tarfile.BLOCKSIZE * (1 + math.ceil(place.size / tarfile.BLOCKSIZE))
        try:
            header = tarfile.TarInfo.frombuf(read(place.shard, start, tarfile.BLOCKSIZE), "utf-8", "replace")
            if not 0 <= header.size <= _MOST_JSON:
                raise ValueError(f"{header.size} bytes are not a sample's")
            return json.loads(read(place.shard, start + tarfile.BLOCKSIZE, header.size))
        except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
            what = f"{place.shard}: the json of sample {shown([place.key])}"
            raise EDiTError(f"{what} cannot be read ({said(error)})") from None


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of one bucket as a batch: every tensor gets a first dimension.

    Raises:
        EDiTError: no sample, or samples of several buckets.
    """
    if not samples:
        raise EDiTError("a batch needs at least one sample")
    if len(shapes := {tuple(sample["latent"].shape) for sample in samples}) > 1:
        raise EDiTError(f"a batch needs samples of one bucket, not of {len(shapes)}: {sorted(shapes)}")
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class BatchPlan:
    """An endless sequence of batches, each of one bucket, as a function of the seed and the step alone.

    Every epoch shuffles each bucket, cuts it into whole batches (what is left over waits for another epoch's order),
    and shuffles those. Processes that share a step split the same batch, so their number does not change the training.

    Args:
        dataset: whose indices it gives.
        batch_size: of all processes together.
        seed: of the orders.
        world: how many processes there are.
        rank: which of them this is.

    Raises:
        EDiTError: bad numbers, or no bucket has as many samples as a batch.
    """

    def __init__(self, dataset: CachedLatents, batch_size: int, seed: int, world: int = 1, rank: int = 0) -> None:
        if not 0 <= rank < world:
            raise EDiTError(f"process {rank} of {world} cannot be: ranks go from 0 to world - 1")
        if batch_size < 1 or batch_size % world:
            raise EDiTError(f"a batch of {batch_size} cannot be split among {world} processes")
        self.batch_size, self.seed, self.world, self.rank = batch_size, seed, world, rank
        self.buckets = {bucket: span for bucket, span in dataset.buckets.items() if len(span) >= batch_size}
        """Those that are used."""
        small = [f"{h}x{w} ({len(span)})" for (h, w), span in dataset.buckets.items() if len(span) < batch_size]
        if not self.buckets:
            raise EDiTError(
                f"{dataset.folder}: at {dataset.resolution} pixels no bucket has the {batch_size} images of a batch: "
                f"{', '.join(small)}; choose a smaller batch or cache more images"
            )
        if small:
            logger.warning(
                "%s: at %s pixels these buckets of latent cells have fewer images than a batch of %s, and are not "
                "used: %s", dataset.folder, dataset.resolution, batch_size, ", ".join(small),
            )  # fmt: skip
        counts = [len(span) // batch_size for span in self.buckets.values()]
        self.steps_per_epoch = sum(counts)
        self._ends = list(accumulate(counts))
        self._epoch = -1
        self._orders: list[list[int]] = []
        self._batches: list[int] = []

    def batch(self, step: int) -> list[int]:
        """This process's part of a step's batch."""
        share = self.batch_size // self.world
        return self.global_batch(step)[self.rank * share : (self.rank + 1) * share]

    def global_batch(self, step: int) -> list[int]:
        """The whole batch of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # only saves time: the orders follow from seed and epoch
            self._orders = [
                [span[i] for i in self._shuffled(len(span), f"{epoch} {bucket}")]
                for bucket, span in self.buckets.items()
            ]
            self._batches, self._epoch = self._shuffled(self.steps_per_epoch, str(epoch)), epoch
        chosen = self._batches[position]
        bucket = bisect_right(self._ends, chosen)
        first = (chosen - (self._ends[bucket - 1] if bucket else 0)) * self.batch_size
        return self._orders[bucket][first : first + self.batch_size]

    def _shuffled(self, count: int, what: str) -> list[int]:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {what}".encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(seed - 2**63)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order


def _manifest(folder: File) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        if not exists(path):
            if exists(folder / "settings.json"):
                raise EDiTError(f"{folder}: this cache is not finished; run the same `cache` command again")
            raise EDiTError(f"{folder}: not a cache, which has a manifest.json")
    except OSError as error:
        raise EDiTError(f"{path}: cannot be read ({error.strerror or error})") from None
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EDiTError(f"{path}: not a cache's manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise EDiTError(
            f"{path}: format_version {manifest.get('format_version')!r:.80} is unknown; this version reads "
            f"{FORMAT_VERSION}"
        )
    check(Manifest, manifest, str(path))
    return manifest


def _read_json(file: File) -> Any:
    """As :func:`edit_core.files.read_json`, of files behind URLs too."""
    try:
        return json.loads(read(file))
    except FileNotFoundError:
        raise EDiTError(f"{file}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EDiTError(f"{file}: cannot be read ({said(error)})") from None


def _empty_prompt(folder: File, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The empty prompt's tensors, once they are known to be as they were written."""
    path = folder / EMPTY_PROMPT
    try:
        data = read(path)
    except OSError as error:
        raise EDiTError(f"{path}: cannot be read ({error.strerror or error})") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise EDiTError(f"{path}: its {len(data)} bytes are not the {entry['bytes']} bytes that were written")
    return load(data)


def _places(folder: File, shard: dict[str, Any], verify: bool) -> list[_Place]:
    """Where the samples of a shard lie, once it is known to be as it was written."""
    path = folder / shard["file"]
    try:
        _check_size(path, shard["bytes"])
        if verify:
            digest = hashlib.sha256()
            with open_stream(path) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            if (found := digest.hexdigest()) != shard["sha256"]:
                raise EDiTError(f"{path}: its sha256 is {found}, but it was written with {shard['sha256']}")
    except FileNotFoundError:
        raise EDiTError(f"{path}: this shard of {shard['samples']} samples is missing") from None
    except OSError as error:
        raise EDiTError(f"{path}: this shard cannot be read ({error.strerror or error})") from None
    name = shard["file"].removesuffix(".tar") + ".json"
    record = _read_json(folder / name)
    check(Record, record, str(folder / name))
    if record["sha256"] != shard["sha256"] or not len(record["keys"]) == len(record["places"]) == shard["samples"]:
        raise EDiTError(f"{folder / name}: this record of {record['samples']} samples is another shard's")
    if any(offset + tarfile.BLOCKSIZE + size > shard["bytes"] for offset, size in record["places"]):
        raise EDiTError(f"{folder / name}: this record is damaged: a sample would lie beyond its shard's end")
    height, width = map(int, shard["file"].split("/")[1].split("x"))
    return [
        _Place((height, width), key, path, offset, size)
        for key, (offset, size) in zip(record["keys"], record["places"], strict=True)
    ]


def _check_size(path: File, size: int) -> None:
    if isinstance(path, Path):
        if (found := path.stat().st_size) != size:
            raise EDiTError(f"{path}: this shard has {found} bytes, but it was written with {size}")
        return
    # The one request that tells size and existence, and that the server sends parts of files; HEAD tells less.
    end = read(path, size - 1, 2)
    if len(end) != 1:
        raise EDiTError(f"{path}: this shard has {'more' if end else 'fewer'} than the {size} bytes of its making")
