"""Lists of transformer blocks as people write them: `"all"`, `"none"`, `"0, 3-9, 27"`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .errors import EDiTError, quoted

__all__ = ["check_layers", "format_layers", "parse_layers"]

_ITEM = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?")


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Block indices, sorted, of a `layers` text for a model of `depth` blocks.

    Raises:
        EDiTError: the text is no such list, a range runs backwards, or a block does not exist.
    """
    words = text.strip().lower()
    if words == "all":
        return tuple(range(depth))
    if words == "none":
        return ()
    chosen: set[int] = set()
    for first, last in _ranges(text):
        if last >= depth:
            raise EDiTError(f"layers: block {last} does not exist; this model has blocks 0-{depth - 1}")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def check_layers(text: str) -> None:
    """The form of a `layers` text, before it is known for which model.

    Raises:
        EDiTError: the text is no such list, or a range runs backwards.
    """
    if text.strip().lower() not in ("all", "none"):
        for _ in _ranges(text):
            pass


def _ranges(text: str) -> Iterator[tuple[int, int]]:
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise EDiTError(
                f"layers: {quoted(item.strip())} in {quoted(text)} is not a block or a range; "
                'write "all", "none" or "0, 3-9, 27"'
            )
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise EDiTError(f"layers: the range {quoted(item.strip())} runs backwards; write {last}-{first}")
        yield first, last


def format_layers(blocks: Iterable[int]) -> str:
    """The shortest text that :func:`parse_layers` reads back as these blocks (`"none"` for no block)."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
