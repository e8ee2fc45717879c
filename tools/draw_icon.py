"""Draws `docs/icon.png` and `docs/banner.png`, which the registry shows: cost against pixels, N² and N."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON, BANNER = (400, 400), (1260, 540)
FINER = 4
"""Drawn so many times larger, then scaled down."""
GROUND, GRID, FAINT, INK = "#1c1c1e", "#34343a", "#bdbdc7", "#ffffff"
SQUARE, LINE = "#c8553d", "#6fcf97"

Box = tuple[float, float, float, float]


def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"DejaVuSans{'-Bold' if bold else ''}.ttf", FINER * size)


def canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (FINER * size[0], FINER * size[1]), GROUND)
    return image, ImageDraw.Draw(image)


def curves(draw: ImageDraw.ImageDraw, box: Box, width: float) -> None:
    """A parabola and a straight line over a grid of 6 x 6 cells; both start in a corner of the box."""
    left, top, right, bottom = (FINER * side for side in box)
    for part in range(7):
        x, y = left + (right - left) * part / 6, top + (bottom - top) * part / 6
        draw.line([(x, top), (x, bottom)], fill=GRID, width=FINER * 2)
        draw.line([(left, y), (right, y)], fill=GRID, width=FINER * 2)
    for colour, reach, height in ((SQUARE, 0.72, lambda t: t**2), (LINE, 1.0, lambda t: 0.42 * t)):
        points = []
        for step in range(401):
            t = step / 400
            points.append((left + (right - left) * reach * t, bottom - (bottom - top) * height(t)))
        radius = FINER * width / 2
        for x, y in points:  # round ends, and no notches where segments meet
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def save(image: Image.Image, size: tuple[int, int], name: str) -> None:
    small = image.resize(size, Image.Resampling.LANCZOS)
    small.quantize(128, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)


def icon() -> None:
    image, draw = canvas(ICON)
    draw.text((FINER * 200, FINER * 64), "EDiT", fill=INK, font=font(88, bold=True), anchor="mm")
    curves(draw, (56, 132, 344, 348), 20)
    save(image, ICON, "icon.png")


def banner() -> None:
    image, draw = canvas(BANNER)
    curves(draw, (80, 100, 460, 440), 18)
    draw.text((FINER * 390, FINER * 64), "softmax, N²", fill=SQUARE, font=font(26), anchor="mm")
    draw.text((FINER * 474, FINER * 296), "EDiT, N", fill=LINE, font=font(26), anchor="lm")
    draw.text((FINER * 270, FINER * 476), "cost of attention over image tokens", fill=FAINT, font=font(22), anchor="mm")
    draw.text((FINER * 640, FINER * 190), "EDiT", fill=INK, font=font(120, bold=True), anchor="lm")
    for row, line in enumerate(("Linear attention in ComfyUI", "for PixArt-Σ and", "Stable Diffusion 3.5-Medium")):
        draw.text((FINER * 646, FINER * (300 + 52 * row)), line, fill=FAINT, font=font(36), anchor="lm")
    save(image, BANNER, "banner.png")


if __name__ == "__main__":
    icon()
    banner()
