"""What networks on this disk see in pictures, for the scores of sets of pictures. Nothing is fetched."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import EDiTError
from ..runtime import progress
from .encoders import quiet

__all__ = ["ClipFeatures", "FeatureSets", "InceptionFeatures", "real_pictures"]


class ClipFeatures:
    """A CLIP of transformers', from a folder on disk.

    Args:
        folder: as `save_pretrained` writes model and processor, with safetensors.
        device: where to compute, in float32.

    Raises:
        EDiTError: it cannot be loaded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "config.json").is_file():
            raise EDiTError(f"{folder}: not a CLIP's folder, which has a config.json")
        from transformers import CLIPModel, CLIPProcessor

        try:
            with quiet():
                model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
                self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises every kind there is for a damaged folder
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EDiTError(f"{folder}: this CLIP cannot be loaded ({reason})") from None
        self.model = model.float().to(device).eval()
        self.device = device
        self.files = sorted(folder.glob("*.safetensors"))
        """Its weights."""
        self.dim: int = self.model.config.projection_dim

    # The model's get_image_features gives a tensor or an object, depending on transformers' version.

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` uint8 -> features `(B, D)`, float32 on the CPU, not normalised."""
        pixels = self.processor(images=list(pictures.numpy()), return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device))[1]
        return self.model.visual_projection(pooled).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts, cut to what CLIP takes -> features `(B, D)`, float32 on the CPU, not normalised."""
        length = self.model.config.text_config.max_position_embeddings
        batch = self.processor(
            text=list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(self.device)
        pooled = self.model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[1]
        return self.model.text_projection(pooled).cpu()


class InceptionFeatures:
    """FID's own Inception, as torch-fidelity builds it, with weights from a file.

    Args:
        file: torch-fidelity's `weights-inception-2015-12-05-*.pth`.
        device: where to compute, in float32.

    Raises:
        EDiTError: torch-fidelity is not installed, or the file is not what it should be.
    """

    dim = 2048

    def __init__(self, file: Path, device: torch.device) -> None:
        if not file.is_file():
            raise EDiTError(f"{file}: there is no such file of Inception weights")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise EDiTError("--inception needs torch-fidelity, which has FID's Inception: pip install torch-fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            # torch-fidelity unpickles whatever a file holds; this one holds tensors alone.
            with tempfile.TemporaryDirectory() as folder:
                torch.save(state, Path(folder) / "inception.pth")
                network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(Path(folder) / "inception.pth"))
        except Exception as error:  # pickles and state dicts fail in every way there is
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EDiTError(f"{file}: not torch-fidelity's Inception weights ({reason})") from None
        self.network, self.device, self.files = network.to(device), device, [file]

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Pictures `(B, H, W, 3)` uint8 -> features `(B, 2048)`, float32 on the CPU."""
        return self.network(pictures.permute(0, 3, 1, 2).to(self.device)).cpu()


@dataclass
class FeatureSets:
    """What one network sees in each set of pictures: `teacher`, `student`, and `real` where there is one."""

    network: ClipFeatures | InceptionFeatures
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, who: str, pictures: Tensor) -> None:
        self.found.setdefault(who, []).append(self.network.images(pictures))

    def of(self, who: str) -> Tensor:
        """`(N, D)`"""
        return torch.cat(self.found[who])

    def compare(self, measure: Callable[[Tensor, Tensor], float]) -> dict[str, float]:
        """Every two of the sets, by `<one>_<other>`."""
        pairs = [("teacher", "student"), ("teacher", "real"), ("student", "real")]
        return {f"{a}_{b}": measure(self.of(a), self.of(b)) for a, b in pairs if a in self.found and b in self.found}


def real_pictures(files: Sequence[Path], size: int, batch: int) -> Iterator[Tensor]:
    """Image files as batches `(B, size, size, 3)` uint8, centre-cropped to squares and scaled.

    Raises:
        EDiTError: one cannot be read.
    """
    starts = range(0, len(files), batch)
    for start in progress(starts, len(starts), "real images"):
        pictures = []
        for path in files[start : start + batch]:
            try:
                with Image.open(path) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            except Exception as error:  # pillow raises every kind there is for a damaged file
                raise EDiTError(f"{path}: this image cannot be read ({error})") from None
            pictures.append(torch.from_numpy(np.array(fitted)))
        yield torch.stack(pictures)
