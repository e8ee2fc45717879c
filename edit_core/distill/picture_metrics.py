"""How pictures compare: pair by pair, and as sets by the features of a network."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..similarity import psnr, ssim

__all__ = ["clip_score", "cmmd", "fid", "latent_cosine", "lpips", "psnr", "ssim"]

_SIGMA = 10.0  # CMMD's kernel width and scale, as in its authors' code
_SCALE = 1000.0
_LPIPS_SIDE = 64  # pixels; AlexNet's poolings leave nothing of smaller pictures


def latent_cosine(student: Tensor, teacher: Tensor) -> float:
    """Cosine of two latents `(c, h, w)`, -1 to 1."""
    return float(F.cosine_similarity(student.double().flatten(), teacher.double().flatten(), dim=0))


def lpips(side: int) -> tuple[Callable[[Tensor, Tensor], float] | None, str]:
    """LPIPS (Zhang et al. 2018, AlexNet) of two pictures `(H, W, 3)` uint8, or why there is none here.

    AlexNet's own weights come with neither torchmetrics nor torchvision; nothing is fetched for them.

    Args:
        side: of the pictures, in pixels.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision is not installed"
    weights = importlib.import_module("torchvision.models").AlexNet_Weights.DEFAULT
    name = weights.url.rsplit("/", 1)[1]
    if not (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
        return None, f"torchvision's {name} is not in torch hub's folder of checkpoints"
    if side < _LPIPS_SIDE:
        return None, f"it needs pictures of {_LPIPS_SIDE} pixels or more per side"
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    return lambda student, teacher: float(metric(_planes(student), _planes(teacher))), ""


def clip_score(images: Tensor, texts: Tensor) -> float:
    """CLIP score as torchmetrics': 100 times the mean cosine of pictures and their prompts, at least 0.

    Args:
        images: CLIP features of N pictures, `(N, D)`.
        texts: of their prompts, `(N, D)`.
    """
    return max(0.0, 100 * float(F.cosine_similarity(images.double(), texts.double()).mean()))


def cmmd(x: Tensor, y: Tensor) -> float:
    """CLIP maximum mean discrepancy of two sets of pictures ("Rethinking FID", Jayasumana et al., arXiv 2401.09603).

    The squared MMD of normalised CLIP features under the kernel `exp(-|a - b|² / 2σ²)`, σ = 10, times 1000; pairs of a
    picture with itself count, as in its authors' code, so equal sets are at 0. They use CLIP ViT-L/14 at 336 pixels.

    Args:
        x: CLIP features `(N, D)`.
        y: CLIP features `(M, D)`.
    """
    x, y = F.normalize(x.double()), F.normalize(y.double())
    return _SCALE * (_kernel_mean(x, x) + _kernel_mean(y, y) - 2 * _kernel_mean(x, y))


def _kernel_mean(x: Tensor, y: Tensor) -> float:
    rows = x.split(1024)  # so that memory does not grow with the square of the number of pictures
    total = sum(float((-(2 - 2 * part @ y.T) / (2 * _SIGMA**2)).exp().sum()) for part in rows)
    return total / (len(x) * len(y))


def fid(x: Tensor, y: Tensor) -> float:
    """Fréchet distance (Heusel et al. 2017) of two sets of features, by torchmetrics, in float64; at least 0.

    Of sets that are equal, rounding may leave less than 0.

    Args:
        x: features `(N, D)`, N at least 2.
        y: features `(M, D)`, M at least 2.
    """
    metric = FrechetInceptionDistance(feature=_Given(x.shape[1]))
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    return max(0.0, float(metric.compute()))


class _Given(nn.Module):
    """Lets torchmetrics' FID take features in place of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _planes(picture: Tensor) -> Tensor:
    """`(H, W, 3)` uint8 -> `(1, 3, H, W)` in 0-1."""
    return picture.permute(2, 0, 1)[None].float() / 255
