"""Draws the README's picture from the demo's: `edit demo`, then `draw_comparison.py out/demo_pixart_sigma.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).resolve().parents[1] / "docs" / "comparison.jpg"
ROWS = ("as asked", "teacher", "EDiT", "piecewise")
COLUMNS, GAP, TILE, MARGIN = 6, 4, 128, 92
"""How many pictures are shown; pixels between those of the demo; a picture's side; what the rows' names take."""


def main(sheet: str) -> None:
    demo = Image.open(sheet).convert("RGB")
    side = (demo.height - (len(ROWS) - 1) * GAP) // len(ROWS)
    picture = Image.new("RGB", (MARGIN + COLUMNS * (TILE + 2), len(ROWS) * (TILE + 2)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype("DejaVuSans.ttf", 16)
    for row, name in enumerate(ROWS):
        top = row * (TILE + 2)
        draw.text((8, top + TILE / 2), name, fill="black", font=font, anchor="lm")
        for column in range(COLUMNS):
            x, y = column * (side + GAP), row * (side + GAP)
            tile = demo.crop((x, y, x + side, y + side)).resize((TILE, TILE), Image.Resampling.LANCZOS)
            picture.paste(tile, (MARGIN + column * (TILE + 2), top))
    picture.save(TARGET, quality=88, subsampling=0)  # small things in strong colours


if __name__ == "__main__":
    main(*sys.argv[1:])
