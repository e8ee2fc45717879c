"""Where images and captions come from: a folder, a Hugging Face dataset, or webdataset tars.

Tars are read with the standard library's tarfile, not with the webdataset library: a cache needs random access to one
image at a time (in a local tar), the same order every time and errors that name the file, not that library's shuffled
streams.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import EDiTError
from .remote import File, locate, open_stream, read

__all__ = ["DatasetSource", "FolderSource", "Item", "Source", "TarSource"]

_BLOCK = 1 << 22  # bytes of a remote tar per request

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Item(NamedTuple):
    """One image of a source, not read yet."""

    name: str
    """What the source calls it: a path, `tar/key`, or a row's number. Unique in its source."""
    read: Callable[[], bytes]
    """Reads the image file's bytes; any exception means that this image is broken."""
    caption: str | None
    """None where there is none."""

    @property
    def key(self) -> str:
        """A name for any file system and for webdataset (no dots, no slashes): readable, and unique by a digest."""
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", self.name.rsplit(".", 1)[0])[-48:]
        return f"{readable}-{hashlib.sha256(self.name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


class Source(Protocol):
    """Images with captions, in the same order every time."""

    @property
    def name(self) -> str:
        """What it is, for messages, and for refusing to continue a cache of another source."""

    @property
    def count(self) -> int:
        """How many images there are; 0 where only reading them all would tell."""

    def __iter__(self) -> Iterator[Item]:
        """The images.

        Raises:
            EDiTError: the source cannot be read, or ends early.
        """


class FolderSource:
    """Images of a folder and its subfolders; `a.txt` holds the caption of `a.png`.

    Raises:
        EDiTError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise EDiTError(f"{self.folder}: there is no such folder of images")
        self.files = sorted(
            path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise EDiTError(f"{self.folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}), nor do its subfolders")
        self.name = f"the folder {self.folder.resolve()}"
        self.count = len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for path in self.files:
            try:
                caption = path.with_suffix(".txt").read_text("utf-8", "replace")
            except FileNotFoundError:
                caption = ""
            except OSError as error:
                raise EDiTError(f"{path.with_suffix('.txt')}: cannot be read ({error})") from None
            yield Item(path.relative_to(self.folder).as_posix(), path.read_bytes, _clean(caption))


class TarSource:
    """Webdataset tars: an image and a `.txt` of the same name, one after the other.

    A tar behind a URL is read once, from its start to its end, and never kept; it may be compressed. Every process that
    shares the work reads all of them, and so does a run that goes on after another.

    Args:
        files: paths, or URLs that fsspec knows, such as `https://…` or `s3://…`.

    Raises:
        EDiTError: a local file is not there, or none was named; a remote one only says so when it is read.
    """

    count = 0

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [locate(file) for file in files]
        if not self.files:
            raise EDiTError("no tar was named")
        for path in self.files:
            if isinstance(path, Path) and not path.is_file():
                raise EDiTError(f"{path}: there is no such tar")
        if len({path.name for path in self.files}) < len(self.files):
            raise EDiTError("two of the tars have the same file name, and samples are told apart by it; rename one")
        paths = [str(path.resolve() if isinstance(path, Path) else path) for path in self.files]
        digest = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.name = f"the tar {paths[0]}" if len(paths) == 1 else f"{len(paths)} tars from {paths[0]} on ({digest})"

    def __iter__(self) -> Iterator[Item]:
        found = 0
        for path in self.files:
            for item in self._items(path):
                found += 1
                yield item
        if not found:
            raise EDiTError(f"{self.name}: no image is in there ({', '.join(IMAGE_SUFFIXES)})")

    @staticmethod
    def _items(path: File) -> Iterator[Item]:
        key, caption, images = "", "", list[tuple[str, Callable[[], bytes]]]()

        def group() -> Iterator[Item]:
            for name, image in images:
                yield Item(f"{path.name}/{name}", image, _clean(caption))

        try:
            for member, data in _members(path):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if (member_key := f"{folder}/{stem}") != key:
                    yield from group()
                    key, caption, images = member_key, "", []
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images.append((member.name, data))
                elif suffix == "txt":
                    caption = data().decode("utf-8", "replace")
        except tarfile.TarError as error:
            if isinstance(path, Path):
                kind, mend = "whole, uncompressed", "decompress it if need be, else fetch it again"
            else:
                kind, mend = "whole", "see whether all of it was uploaded"
            raise EDiTError(f"{path}: not a {kind} tar ({error}); {mend}") from None
        except OSError as error:
            raise EDiTError(f"{path}: cannot be read ({error})") from None
        yield from group()


def _members(path: File) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The files of a tar, and what reads each of them at any time later."""
    with open_stream(path) as file:
        # A local tar uncompressed only: a compressed one would be unpacked from its start for every image.
        mode = "r:" if isinstance(path, Path) else "r|*"
        with tarfile.open(fileobj=file, mode=mode, bufsize=_BLOCK) as tar:  # type: ignore[call-overload]
            while member := tar.next():
                tar.members = []  # else it keeps every header of a large tar
                if not member.isfile():
                    continue
                if isinstance(path, Path):
                    yield member, partial(read, path, member.offset_data, member.size)
                else:  # a stream does not come by again
                    yield member, partial(bytes, tar.extractfile(member).read())


class DatasetSource:
    """A Hugging Face dataset: saved by `save_to_disk`, or any other that `load_dataset` can stream.

    A streamed dataset is read whole by every process that shares the work, since only then have rows the same numbers
    for all of them.

    Args:
        name: a folder, or a dataset's name on the hub.
        image: the column of images (an Image feature, or encoded bytes).
        caption: the column of captions; of a list of captions the first is taken.
        split: which part of it.

    Raises:
        EDiTError: the library is missing, or the dataset cannot be opened, is empty or lacks a column.
    """

    def __init__(self, name: str, image: str = "image", caption: str = "text", split: str = "train") -> None:
        try:
            import datasets
        except ImportError:
            raise EDiTError("this needs the library datasets: install edit-attention[distill]") from None
        folder = Path(name)
        here = folder.is_dir()
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                loaded: Any = datasets.load_from_disk(str(folder))
                if isinstance(loaded, datasets.DatasetDict):
                    if split not in loaded:
                        raise EDiTError(f"{name}: has no split {split!r}, but {', '.join(loaded)}")
                    loaded = loaded[split]
            else:
                loaded = datasets.load_dataset(str(folder) if here else name, split=split, streaming=True)
            columns = list(loaded.column_names or next(iter(loaded), {}))
        except EDiTError:
            raise
        except Exception as error:  # the library raises its own, pyarrow's and the network's
            raise EDiTError(f"{name}: cannot be opened as a dataset ({_first_line(error)})") from None
        for column in (image, caption):
            if column not in columns:
                raise EDiTError(f"{name}: has no column {column!r}; it has {', '.join(columns) or 'none'}")
        self.name = f"the dataset {folder.resolve() if here else name}, split {split}, columns {image} and {caption}"
        self.count = 0 if isinstance(loaded, datasets.IterableDataset) else len(loaded)
        self._columns = image, caption
        # Undecoded: a broken image must not end the iteration, and an image that is done need not be decoded.
        self._rows = loaded.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))

    def __iter__(self) -> Iterator[Item]:
        image, caption = self._columns
        index = -1
        try:
            for index, row in enumerate(self._rows):
                text = row[caption]
                if isinstance(text, list):
                    text = text[0] if text else None
                yield Item(f"row {index:09d}", _row_reader(row[image]), _clean(text if isinstance(text, str) else ""))
        except (EDiTError, GeneratorExit):
            raise
        except Exception as error:
            raise EDiTError(f"{self.name}: cannot be read after row {index} ({_first_line(error)})") from None
        if index < 0:
            raise EDiTError(f"{self.name}: is empty")


def _row_reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        if value is None:
            raise ValueError("the row has no image")
        return bytes(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return read


def _clean(caption: str) -> str | None:
    return caption.strip() or None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
