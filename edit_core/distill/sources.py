"""Where images and captions come from: a folder, a Hugging Face dataset, or webdataset tars.

Tars are read with the standard library's tarfile, not with the webdataset library: a cache needs random access to one
image at a time (in a local tar), the same order every time and errors that name the file, not that library's shuffled
streams.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import EDiTError, shown
from ..text import decode_text
from .captions import Caption, Captions, counted, is_beside, is_table, no_caption
from .remote import File, Remote, locate, open_stream, read

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
    """None where there is none that can be used."""
    problem: str = ""
    """Why one that is there cannot be used."""

    @property
    def unusable(self) -> str:
        """Which image it is and why its caption cannot be used; empty where it can, or there is none."""
        return self.problem and f"{shown([self.name])}: {self.problem}"

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

    @property
    def others(self) -> Mapping[str, int]:
        """What lies there and is neither an image nor an image's caption, by kind; whole once all was iterated over."""

    def __iter__(self) -> Iterator[Item]:
        """The images.

        Raises:
            EDiTError: the source cannot be read, or ends early.
        """


class FolderSource:
    """Images of a folder and its subfolders, linked ones too, with the captions that lie beside them.

    Raises:
        EDiTError: there is no such folder, no image in it, a part of it cannot be read, or a list of captions is
            damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise EDiTError(f"{self.folder}: there is no such folder of images")
        others: Counter[str] = Counter()
        self.files: list[Path] = []
        self._captions = Captions(self.folder)
        for path in sorted(_files(self.folder, others)):
            name = path.relative_to(self.folder).as_posix()
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self.files.append(path)
            elif is_table(name):
                try:
                    data = path.read_bytes()
                except OSError as error:
                    raise EDiTError(f"{path}: cannot be read ({error.strerror or error})") from None
                self._captions.add_table(name, data, f"{path}:")
            elif is_beside(name):
                self._captions.add(name, path.read_bytes)
            else:
                others[_kind(name)] += 1
        for path in self.files:
            self._captions.match(path.relative_to(self.folder).as_posix())
        self.others: Mapping[str, int] = others + self._captions.unmatched()
        if not self.files:
            raise EDiTError(
                f"{self.folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}), nor do its subfolders; found "
                f"{counted(self.others) or 'nothing'}"
            )
        self.name = f"the folder {self.folder.resolve()}"
        self.count = len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for path in self.files:
            name = path.relative_to(self.folder).as_posix()
            yield Item(name, path.read_bytes, *self._captions.of(name))

    def require_captions(self) -> None:
        """Looks for one caption that can be used.

        Raises:
            EDiTError: there is none.
        """
        _require(self)


def _files(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """The files of a folder, its subfolders and those that are linked there, each folder once; what is none is counted.

    Links come last: whether a folder is also linked does not change the names of what lies in it.
    """
    seen, folders = set[tuple[int, int]](), [folder]
    while folders:
        links: list[Path] = []
        for place, below, names in chain.from_iterable(os.walk(top, onerror=_unreadable) for top in folders):
            here = Path(place)
            state = here.stat()
            if (state.st_dev, state.st_ino) in seen:
                others["linked folders that are read already"] += 1
                below.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            links += [path for name in below if (path := here / name).is_symlink()]
            for name in names:
                path = here / name
                if path.is_file():
                    yield path
                else:
                    others["links to nothing" if path.is_symlink() else "special files"] += 1
        folders = sorted(links)


def _unreadable(error: OSError) -> None:
    raise EDiTError(f"{error.filename}: this folder of images cannot be read ({error.strerror or error})") from None


def _kind(name: str) -> str:
    return posixpath.splitext(name)[1].lower() or "files without a suffix"


def _require(source: Source) -> None:
    images, example = 0, ""
    for item in source:
        if item.caption is not None:
            return
        images += 1
        example = example or item.unusable
    raise no_caption(source.name, images, source.others, example)


class TarSource:
    """Webdataset tars: images, and captions of the same names in the same tar, in the forms of :class:`Captions`.

    A tar behind a URL is read once, from its start to its end, and never kept; it may be compressed. There, a caption
    must stand right after its image or anywhere before it, as in a tar that is sorted by name. Every process that
    shares the work reads all of them, and so does a run that goes on after another.

    Names are told apart from their suffixes at the last dot: `a.1.jpg` is an image, with `a.1.txt` for a caption.

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
        self.others: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Item]:
        self.others, found = Counter(), 0
        for path in self.files:
            for item in self._items(path):
                found += 1
                yield item
        if not found:
            raise EDiTError(
                f"{self.name}: no image is in there ({', '.join(IMAGE_SUFFIXES)}); found "
                f"{counted(self.others) or 'nothing'}"
            )

    def require_captions(self) -> None:
        """Looks for one caption that can be used; a tar behind a URL is taken at its word, since it is read once.

        Raises:
            EDiTError: there is none.
        """
        if all(isinstance(path, Path) for path in self.files):
            _require(self)

    def _items(self, path: File) -> Iterator[Item]:
        try:
            yield from self._local(path) if isinstance(path, Path) else self._streamed(path)
        except tarfile.TarError as error:
            if isinstance(path, Path):
                kind, mend = "whole, uncompressed", "decompress it if need be, else fetch it again"
            else:
                kind, mend = "whole", "see whether all of it was uploaded"
            raise EDiTError(f"{path}: not a {kind} tar ({error}); {mend}") from None
        except OSError as error:
            raise EDiTError(f"{path}: cannot be read ({error})") from None

    def _local(self, path: Path) -> Iterator[Item]:
        """Its headers are read first, so that its order does not matter."""
        captions, images = Captions(), list[tuple[str, Callable[[], bytes]]]()
        for name, data in _members(path, self.others):
            if _is_image(name):
                images.append((name, data))
            else:
                self._other(path, captions, name, data)
        for name, _ in images:
            captions.match(name)
        self.others += captions.unmatched()
        for name, data in images:
            yield Item(f"{path.name}/{name}", data, *captions.of(name))

    def _streamed(self, path: Remote) -> Iterator[Item]:
        """Images wait for what follows them under the same name, and captions for their images."""
        captions, waiting, stem = Captions(), list[tuple[str, Callable[[], bytes]]](), ""
        without: set[str] = set()

        def group() -> Iterator[Item]:
            for name, data in waiting:
                if not captions.match(name):
                    without.add(posixpath.splitext(name)[0])
                yield Item(f"{path.name}/{name}", data, *captions.of(name))
            for name, _ in waiting:
                captions.drop(name)

        for name, data in _members(path, self.others):
            if (now := posixpath.splitext(name)[0]) not in (stem, *(image for image, _ in waiting)):
                yield from group()
                stem, waiting = now, []
            if _is_image(name):
                waiting.append((name, data))
            else:
                self._other(path, captions, name, data)
        yield from group()
        late = sum(name in without for name in captions.waiting())
        self.others += captions.unmatched()
        if late:
            self.others["captions without an image"] -= late
            self.others["captions that come too long after their image (sort the tar by name)"] += late

    def _other(self, path: File, captions: Captions, name: str, data: Callable[[], bytes]) -> None:
        if is_table(name):
            captions.add_table(name, data(), f"{path}: {shown([name])}")
        elif is_beside(name):
            captions.add(name, data)
        else:
            self.others[_kind(name)] += 1


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _members(path: File, others: Counter[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The names of a tar's files, and what reads each of them at any time later; what is no file is counted."""
    with open_stream(path) as file:
        # A local tar uncompressed only: a compressed one would be unpacked from its start for every image.
        mode = "r:" if isinstance(path, Path) else "r|*"
        with tarfile.open(fileobj=file, mode=mode, bufsize=_BLOCK) as tar:  # type: ignore[call-overload]
            while member := tar.next():
                tar.members = []  # else it keeps every header of a large tar
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    others["links in tars" if member.issym() or member.islnk() else "special files"] += 1
                elif isinstance(path, Path):
                    yield member.name, partial(read, path, member.offset_data, member.size)
                else:  # a stream does not come by again
                    yield member.name, partial(bytes, tar.extractfile(member).read())


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
        self.others: Mapping[str, int] = {}
        self._columns = image, caption
        # Undecoded: a broken image must not end the iteration, and an image that is done need not be decoded.
        self._rows = loaded.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))

    def __iter__(self) -> Iterator[Item]:
        image, caption = self._columns
        index = -1
        try:
            for index, row in enumerate(self._rows):
                yield Item(f"row {index:09d}", _row_reader(row[image]), *_row_caption(row[caption], caption))
        except (EDiTError, GeneratorExit):
            raise
        except Exception as error:
            raise EDiTError(f"{self.name}: cannot be read after row {index} ({_first_line(error)})") from None
        if index < 0:
            raise EDiTError(f"{self.name}: is empty")

    def require_captions(self) -> None:
        """Looks for one caption that can be used; a streamed dataset is taken at its word.

        Raises:
            EDiTError: there is none.
        """
        if not self.count:
            return
        reason = ""
        for text in self._rows.select_columns(self._columns[1])[self._columns[1]]:
            found = _row_caption(text, self._columns[1])
            if found.text is not None:
                return
            reason = reason or found.problem
        usable = f" that can be used ({reason})" if reason else ""
        raise EDiTError(
            f"{self.name}: none of its {self.count} rows has a caption{usable}; choose another --caption-column"
        )


def _row_reader(value: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        if value is None:
            raise ValueError("the row has no image")
        return bytes(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return read


def _row_caption(value: Any, column: str) -> Caption:
    """Of a list of captions the first; an image that has none may hold None."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        try:
            value = decode_text(value)
        except ValueError as error:
            return Caption(None, f"its {column} cannot be read ({error})")
    if value is None or isinstance(value, str):
        return Caption((value or "").strip() or None)
    return Caption(None, f"its {column} is of type {type(value).__name__}, not text")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
