"""The sizes that a cache's pictures have, and how an image gets one of them: scaled down, and cropped at the centre."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import EDiTError
from .encoders import CELL
from .sources import Item

__all__ = ["View", "buckets", "views_of"]


def buckets(resolution: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels whose area is near `resolution`², sides multiples of `step`.

    Raises:
        EDiTError: no such size, or a step that latents cannot have.
    """
    if step < 2 * CELL or step % (2 * CELL):
        raise EDiTError(f"a bucket step of {step} pixels cannot be: it must be a multiple of {2 * CELL}")
    if max_aspect < 1:
        raise EDiTError(f"a largest aspect of {max_aspect} cannot be: a square's is 1")
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = round(resolution * resolution / short / step) * step
        if short <= long <= short * max_aspect:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise EDiTError(f"no bucket of {resolution}² pixels has sides that are multiples of {step}")
    return sorted(sizes)


class View(NamedTuple):
    """An image at one resolution."""

    resolution: int
    pixels: Tensor
    """(3, H, W) uint8."""
    meta: dict[str, Any]
    """The sample's json: caption, name, original size (width, height) and crop (left, top, right, bottom)."""

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Resolution, and height and width in pixels."""
        return self.resolution, self.pixels.shape[1], self.pixels.shape[2]


def views_of(item: Item, data: bytes, wanted: dict[int, list[tuple[int, int]]]) -> list[View]:
    """The image in its bucket of every resolution for which it is large enough."""
    import numpy
    from PIL import Image, ImageOps

    views = []
    with Image.open(io.BytesIO(data)) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError(f"its colours are {opened.mode}, not of 8 bits")
        quarter_turn = opened.getexif().get(0x0112, 1) >= 5  # the orientation that cameras note
        width, height = opened.size[::-1] if quarter_turn else opened.size
        image: Image.Image | None = None
        for resolution, sizes in wanted.items():
            size = min(sizes, key=lambda size: (_ratio(size[0] * width, size[1] * height), size))
            if size[0] > height or size[1] > width:
                continue
            if image is None:
                image = _rgb(ImageOps.exif_transpose(opened))
            scale = min(height / size[0], width / size[1])
            left, top = (round((a - b * scale) / 2, 6) for a, b in ((width, size[1]), (height, size[0])))
            crop = (left, top, width - left, height - top)
            scaled = image.resize(size[::-1], Image.Resampling.LANCZOS, box=crop)
            pixels = torch.from_numpy(numpy.array(scaled)).permute(2, 0, 1).contiguous()
            meta = {"caption": item.caption, "source": item.name, "size": [width, height], "crop": crop}
            views.append(View(resolution, pixels, meta))
    return views


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def _rgb(image: Any) -> Any:
    """As RGB, with what is transparent in white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
