"""Files on this machine or behind a URL, to be read whole, in part, or as a stream.

fsspec does the second kind, since it gives HTTP, S3 and a dozen more the same random access; a file on this machine is
opened as always, without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

__all__ = ["File", "Remote", "exists", "locate", "open_stream", "read"]

T = TypeVar("T")

_PAUSES = (0.5, 2.0, 8.0)  # seconds before a request is made again: one lost among millions must not end a training
_LATER = (408, 429)  # the client errors of HTTP that pass


@dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL, as far as it is used like a :class:`~pathlib.Path`."""

    url: str

    def __truediv__(self, name: str) -> Remote:
        path, mark, query = self.url.partition("?")
        return Remote(f"{path.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        """Without the query, which may hold a key."""
        return self.url.partition("?")[0]

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]


File = Path | Remote


def locate(place: str | Path) -> File:
    """What a user's text names: `https://…`, `s3://…` or any other URL that fsspec knows, else a local path."""
    return Remote(place) if isinstance(place, str) and "://" in place else Path(place)


def exists(file: File) -> bool:
    """Whether there is such a file.

    Raises:
        OSError: it cannot be told, for the network's sake.
    """
    if isinstance(file, Path):
        return file.is_file()
    try:
        read(file, 0, 1)
    except FileNotFoundError:
        return False
    return True


def read(file: File, start: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file from `start` on: `length` of them, or as many as there are.

    Raises:
        OSError: it cannot be read; of a remote file the message is a reason without the name.
    """
    if isinstance(file, Path):
        # Opened anew each time: a file that forked DataLoader workers share would have one position for all.
        with open(file, "rb") as opened:
            opened.seek(start)
            return opened.read(-1 if length is None else length)

    def request() -> bytes:
        # Found anew each time, since a forked process cannot use its parent's; within one, fsspec keeps them.
        system, path = _system(file)
        if length is None:
            return system.cat_file(path, start=start or None)
        # Told that the file ends here, fsspec neither asks the server for its size nor reads ahead.
        with system.open(path, "rb", size=start + length) as opened:
            opened.seek(start)
            return opened.read(length)

    return _patiently(request)


def open_stream(file: File) -> BinaryIO | _Stream:
    """A file to read from its start to its end, in large blocks; nothing of a remote one is kept on disk.

    Raises:
        OSError: it cannot be read; later also by reading.
    """
    return open(file, "rb") if isinstance(file, Path) else _Stream(file)


class _Stream:
    """Every block is a request of its own: a connection that waits while an encoder works would be cut off.

    Where a server sends files only from their start, one connection must do.
    """

    def __init__(self, file: Remote) -> None:
        self._source, self._position = file, 0
        self._opened = _patiently(lambda: self._open(cache_type="none"))

    def _open(self, **options: Any) -> Any:
        system, path = _system(self._source)
        return system.open(path, "rb", **options)

    def read(self, size: int) -> bytes:
        data = _patiently(lambda: self._read(size))
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            self._opened.seek(self._position)
            return self._opened.read(size)
        except ValueError as error:
            if not _lacks_ranges(error):
                raise
        self._opened = self._open(block_size=0)
        left = self._position
        while left:
            left -= len(self._opened.read(left))
        return self._opened.read(size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _system(file: Remote) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    if not file.url.startswith(("http://", "https://")):
        return url_to_fs(file.url)
    from aiohttp import ClientTimeout

    # By default aiohttp gives a whole answer five minutes, too few for a large file in one connection.
    return url_to_fs(file.url, client_kwargs={"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)})


def _patiently(request: Callable[[], T]) -> T:
    """Makes a request again where it failed for a reason that may pass.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: any other failure.
    """
    for pause in _PAUSES:
        try:
            return request()
        except Exception as error:  # every protocol's library raises its own
            reason, passing = _reason(error)
            if not passing:
                raise reason from None
        time.sleep(pause)
    try:
        return request()
    except Exception as error:
        raise _reason(error)[0] from None


def _reason(error: Exception) -> tuple[OSError, bool]:
    """What to raise for an error of fsspec, and whether it may pass."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of HTTP, fsspec calls every failure so
    status = getattr(error, "status", 0)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError("there is no such file"), False
    if status:  # aiohttp's own text would hold the whole URL
        return OSError(f"the server answers {status} {getattr(error, 'message', '')}".rstrip()), (
            status >= 500 or status in _LATER
        )
    if _lacks_ranges(error):
        return OSError("its server takes no range requests, so that every sample would cost the whole file"), False
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OSError(text), not isinstance(error, PermissionError | ValueError | ImportError)


def _lacks_ranges(error: Exception) -> bool:
    return isinstance(error, ValueError) and "range requests" in str(error)
