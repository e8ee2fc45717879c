"""Files that are there whole or not at all, even after a kill or when the power fails."""

from __future__ import annotations

import errno
import json
import mmap
import os
import secrets
from pathlib import Path
from typing import Any

from .errors import EDiTError

__all__ = ["new_output", "read_json", "sync_folder", "write_file"]


def new_output(text: str | os.PathLike[str]) -> Path:
    """A path to write to.

    Raises:
        EDiTError: it exists already, or its folder does not.
    """
    path = Path(text)
    if os.path.lexists(path):  # a link to nowhere is there as well
        raise EDiTError(f"{path} exists already; choose another name")
    if not os.path.isdir(path.parent):
        raise EDiTError(f"{path.parent} is not a folder; make it first")
    return path


def write_file(path: Path, data: bytes | mmap.mmap, replace: bool = True) -> None:
    """Writes a file beside its place and renames it there; an existing one is replaced only by the complete new one.

    Args:
        path: what to write; its folder must be there.
        data: all of it.
        replace: False keeps a file that is there already, however many processes write this name at once.

    Raises:
        FileExistsError: there is one, and it is not to be replaced.
        OSError: the disk is full, or the folder cannot be written; nothing is left behind then.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(part, path)
        else:
            _rename_to_new(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _rename_to_new(part: Path, path: Path) -> None:
    """A rename that fails where there is something of that name; POSIX's own would replace it."""
    if os.name != "posix":
        os.rename(part, path)
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network disks know no second name: take the name first, and then fill it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Makes a folder's entries durable; Windows has no such call, and some network disks do not know it of folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # POSIX's answer where a descriptor's kind cannot be synchronised
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        EDiTError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise EDiTError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EDiTError(f"{path}: cannot be read ({error})") from None
