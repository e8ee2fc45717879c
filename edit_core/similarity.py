"""How alike two pictures are, pixel by pixel; plain PyTorch, so that it runs wherever a node does."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import EDiTError

__all__ = ["psnr", "ssim"]

_WINDOW = 11  # pixels, and the width of the Gaussian in it, as in the paper
_SIGMA = 1.5


def psnr(student: Tensor, teacher: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures `(H, W, 3)` uint8, in dB; infinite where they are the same."""
    error = float((student.double() - teacher.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(student: Tensor, teacher: Tensor) -> float:
    """Structural similarity of two pictures `(H, W, 3)` uint8, up to 1 (Wang et al. 2004, 11x11 Gaussian window).

    As torchmetrics has it, which mirrors pictures at their edges.

    Raises:
        EDiTError: a side is too short for that.
    """
    height, width = student.shape[:2]
    edge = _WINDOW // 2
    if min(height, width) <= edge:
        raise EDiTError(f"SSIM needs pictures of {edge + 1} pixels or more per side, and these are {width}x{height}")
    planes = (picture.permute(2, 0, 1)[:, None].double() / 255 for picture in (student, teacher))
    x, y = (F.pad(plane, (edge, edge, edge, edge), mode="reflect") for plane in planes)  # (3, 1, H + 10, W + 10)
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - edge
    gauss = (-(offsets**2) / (2 * _SIGMA**2)).exp()
    gauss = gauss / gauss.sum()

    def local(values: Tensor) -> Tensor:
        """Means over the windows, `(3, 1, H, W)`."""
        return F.conv2d(F.conv2d(values, gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = ((local(z * z) - mean**2).clamp(min=0) for z, mean in ((x, mean_x), (y, mean_y)))
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * contrast).mean())
