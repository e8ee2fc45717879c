"""Base models on disk, without loading them: names, shapes, and single tensors."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .backbones import Base, identify
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
        """Names and shapes of all tensors, prefixes included."""
        self.dtypes: dict[str, str] = {}
        """Names and dtypes of all tensors, as safetensors calls them (`F16`)."""
        self._files: dict[str, Path] = {}
        self.files = _files(self.path)
        """The safetensors files that it consists of; those of a folder lie in one folder, the transformer's."""
        for file in self.files:
            try:
                with safe_open(file, framework="pt", device="cpu") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                        entry = tensors.get_slice(key)
                        self.shapes[key], self.dtypes[key] = tuple(entry.get_shape()), entry.get_dtype()
                        self._files[key] = file
            except SafetensorError as error:
                raise EDiTModelError(f"{file.name} is not a complete safetensors file ({said(error)})") from None
            except OSError as error:
                raise EDiTModelError(f"{file} cannot be read ({error})") from None

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self._files[key], framework="pt", device="cpu") as tensors:
            return tensors.get_tensor(key)

    def identify(self, name: str | None = None) -> Base:
        """What the file holds.

        Args:
            name: what to call the file in an error; its own name by default.

        Raises:
            EDiTModelError: nothing that EDiT works on.
        """
        return identify(self.shapes, name or self.path.name)


def _files(path: Path) -> list[Path]:
    if os.path.isfile(path):
        return [path]
    for folder in (path / "transformer", path):
        # Not a glob alone: of a name that is too long, or a folder that may not be read, it makes an error of its own.
        if os.path.isdir(folder) and (found := sorted(folder.glob("*.safetensors"))):
            return found
    raise EDiTModelError(f"{path}: there is no such file, nor a diffusers folder with .safetensors files in it")
