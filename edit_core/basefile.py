"""Base models on disk, without loading them: names, shapes, and single tensors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .backbones import PART, Base, identify, plain_name
from .errors import EDiTModelError, said

__all__ = ["BaseFile"]


class BaseFile:
    """A safetensors file, or a diffusers folder (of a pipeline or of its transformer, sharded or not).

    Raises:
        EDiTModelError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Plain names and shapes of all tensors, prefixes included."""
        self.dtypes: dict[str, str] = {}
        """Names and dtypes of all tensors, as safetensors calls them (`F16`)."""
        self._places: dict[str, tuple[Path, str]] = {}
        self.files = _files(self.path)
        """The safetensors files that it consists of; those of a folder lie in one folder, the transformer's."""
        for file in self.files:
            try:
                with safe_open(file, framework="pt", device="cpu") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                        entry, name = tensors.get_slice(key), plain_name(key)
                        self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
                        self._places[name] = file, key
            except SafetensorError as error:
                raise EDiTModelError(f"{file.name} is not a complete safetensors file ({said(error)})") from None
            except OSError as error:
                raise EDiTModelError(f"{file} cannot be read ({error})") from None

    def tensor(self, key: str) -> Tensor:
        """One tensor by its plain name, on the CPU."""
        file, own = self._places[key]
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return tensors.get_tensor(own)

    def identify(self, name: str | None = None) -> Base:
        """What the file holds.

        Args:
            name: what to call the file in an error; its own name by default.

        Raises:
            EDiTModelError: nothing that EDiT works on.
        """
        renamed = any(own != key for key, (_, own) in self._places.items())
        return replace(identify(self.shapes, name or self.path.name), renamed=renamed)


def _check_parts(files: list[Path]) -> None:
    for file in files:
        if match := PART.search(file.name):
            name, count = file.name[: match.start()], int(match[2])
            there = {
                int(other[1]) for each in files if (other := PART.search(each.name)) and each.name.startswith(name)
            }
            if gone := set(range(1, min(count, 99_999) + 1)) - there:
                raise EDiTModelError(
                    f"{file.parent} holds {len(there)} of a model's {count} parts, and not part {min(gone)}; get it too"
                )


def _files(path: Path) -> list[Path]:
    if os.path.isfile(path):
        return [path]
    for folder in (path / "transformer", path):
        # Not a glob alone: of a name that is too long, or a folder that may not be read, it makes an error of its own.
        if os.path.isdir(folder) and (found := sorted(folder.glob("*.safetensors"))):
            _check_parts(found)
            return found
    raise EDiTModelError(f"{path}: there is no such file, nor a diffusers folder with .safetensors files in it")
