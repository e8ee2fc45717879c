"""The captions that lie beside images, in the forms that trainers write and read.

A file of the image's name beside it (`a.txt`, `a.caption` or `a.png.txt` for `a.png`), and tables in the image's folder
or above it: `metadata.jsonl` and `metadata.csv`, as Hugging Face's image folders have them, and kohya's `meta_….json`.
Where an image has several captions they must agree: none is preferred to another.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EDiTError, said, shown
from ..text import decode_text

__all__ = ["BESIDE", "TABLES", "Caption", "Captions", "counted", "is_beside", "is_table", "no_caption"]

BESIDE = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "meta_cap.json", "meta_cap_dd.json", "meta_clean.json", "meta_lat.json")
_FIELDS = ("text", "caption", "prompt")  # of the lines of a metadata file


class Caption(NamedTuple):
    """An image's."""

    text: str | None
    """None where there is none that can be used."""
    problem: str = ""
    """Why one that is there cannot be used."""


class Captions:
    """All captions of a folder or a tar, and which of them have an image.

    Names are paths from the top of the folder or tar on, with slashes.

    Args:
        root: the folder; tables may name files by whole paths in it.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root.resolve() if root else None
        self._beside: dict[str, dict[str, Callable[[], bytes]]] = {}
        self._listed: dict[str, list[tuple[str, str]]] = {}
        self._matched: set[str] = set()
        self._useless: Counter[str] = Counter()

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """A file that holds one caption."""
        self._beside.setdefault(posixpath.splitext(name)[0], {})[name] = read

    def add_table(self, name: str, data: bytes, source: str) -> None:
        """A file that lists captions.

        Args:
            name: of the file.
            data: what it holds.
            source: what to call it in an error.

        Raises:
            EDiTError: it is not what its name says.
        """
        folder, file = posixpath.split(name)
        try:
            text = decode_text(data)
        except ValueError as error:
            raise EDiTError(f"{source} cannot be read as text ({error})") from None
        try:
            for image, texts in _rows(file, text):
                if image is None:
                    self._useless[f"entries of {file} that name no file"] += 1
                elif not texts:
                    self._useless[f"entries of {file} without a text"] += 1
                else:
                    self._listed.setdefault(self._place(folder, image), []).extend(
                        (f"{name}'s {field}", text) for field, text in texts.items()
                    )
        except (ValueError, RecursionError, csv.Error) as error:
            raise EDiTError(f"{source} is no list of captions ({said(error)}); mend it, or take it away") from None

    def _place(self, folder: str, image: str) -> str:
        if self._root and (path := Path(image)).is_absolute():
            try:
                return path.resolve().relative_to(self._root).as_posix()
            except ValueError:
                return image
        return posixpath.normpath(posixpath.join(folder, image))

    def match(self, image: str) -> bool:
        """Notes that there is this image; says whether it has a caption."""
        names = {image, posixpath.splitext(image)[0]}
        found = {name for name in names if name in self._beside or name in self._listed}
        self._matched |= found
        return bool(found)

    def of(self, image: str) -> Caption:
        """An image's caption."""
        found: dict[str, str] = {}  # text -> where
        for name in (posixpath.splitext(image)[0], image):
            for file, read in self._beside.get(name, {}).items():
                try:
                    text = decode_text(read())
                except ValueError as error:
                    return Caption(None, f"its caption {shown([file])} cannot be read ({error})")
                except OSError as error:
                    return Caption(None, f"its caption {shown([file])} cannot be read ({error.strerror or error})")
                found.setdefault(text.strip(), file)
            for place, text in self._listed.get(name, ()):
                found.setdefault(text.strip(), place)
        found.pop("", None)
        if len(found) > 1:
            one, other = sorted(found.values())[:2]
            return Caption(None, f"its captions differ in {shown([one])} and {shown([other])}; keep one of them")
        return Caption(next(iter(found), None))

    def drop(self, image: str) -> None:
        """Forgets the files beside an image, which a stream has gone by."""
        for name in (image, posixpath.splitext(image)[0]):
            self._beside.pop(name, None)

    def unmatched(self) -> Counter[str]:
        """What has no image or cannot be one's caption, by kind."""
        found = Counter(self._useless)
        for name, beside in self._beside.items():
            if name not in self._matched:
                found["captions without an image"] += len(beside)
        for name, entries in self._listed.items():
            if name not in self._matched:
                files = {posixpath.basename(place.rpartition("'s ")[0]) for place, _ in entries}
                found.update(f"entries of {file} that no image was found for" for file in files)
        return found

    def waiting(self) -> Iterator[str]:
        """The names, without their suffixes, of the files that have no image."""
        return (name for name in self._beside if name not in self._matched)


def _rows(file: str, text: str) -> Iterator[tuple[str | None, dict[str, str]]]:
    """The images that a table names, None where an entry names none, with their texts by field."""
    if file.lower().endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
            raise ValueError("kohya's holds an object for each image")
        for name, value in content.items():
            caption, tags = (value.get(field) for field in ("caption", "tags"))
            parts = [part for part in (caption, tags) if isinstance(part, str) and part.strip()]
            yield name, {"caption": ", ".join(parts)} if parts else {}  # as kohya's trainers put them together
        return
    rows: Iterator[Any]
    if file.lower().endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text, newline=""))
    else:
        rows = (_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for row in rows:
        image = row.get("file_name")
        texts = {name: row[name] for name in _FIELDS if isinstance(row.get(name), str) and row[name].strip()}
        yield (image if isinstance(image, str) and image else None), texts


def _line(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def is_beside(name: str) -> bool:
    """Whether a file of this name holds one image's caption."""
    return posixpath.splitext(name)[1].lower() in BESIDE


def is_table(name: str) -> bool:
    """Whether a file of this name lists captions."""
    return posixpath.basename(name).lower() in TABLES


def counted(kinds: Mapping[str, int]) -> str:
    """Kinds and how many there are of each, for a sentence."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


def no_caption(source: str, images: int, others: Mapping[str, int], example: str = "") -> EDiTError:
    """What to raise where no image has a caption that can be used.

    Args:
        source: what they were looked for in.
        images: how many there are.
        others: what else is there, by kind.
        example: an image, and what is wrong with its caption.
    """
    beside = " or ".join(BESIDE)
    return EDiTError(
        f"{source}: none of its {images} images has a caption{f' that can be used ({example})' if example else ''}; "
        f"looked for a {beside} of the image's name beside it, and for {', '.join(TABLES)}; found "
        f"{counted(others) or 'nothing else'}; write a .txt for each image"
    )
