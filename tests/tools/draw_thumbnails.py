"""Draws the picture of every template in `workflows/`, from the template itself: `python draw_thumbnails.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
WIDTH, HEIGHT, HEADER = 640, 400, 93
FINER = 2
"""Drawn so many times larger, then scaled down."""
GROUND, BAR, NODE, TITLE = "#1c1c1e", "#26262b", "#353535", "#2a2a2a"
INK, FAINT, VALUE = "#ffffff", "#bdbdc7", "#8d8d95"
SOCKET_TOP, SOCKET_STEP = 14, 20  # of a node, as the frontend draws them
NOTES = ("MarkdownNote", "Note")

MODELS = {
    "small_world_pixart_sigma": "Small world: PixArt-Σ",
    "small_world_sd35_medium": "Small world: SD3.5-Medium",
    "pixart_sigma": "PixArt-Σ",
    "sd35_medium": "SD3.5-Medium",
}
KINDS = {
    "": ("base model", "softmax attention", "#3f789e"),
    "_edit": ("EDiT", "linear attention", "#5a9e5a"),
    "_ab": ("A/B", "base beside EDiT, same seed", "#7d7db8"),
    "_calibrate": ("calibrate", "train, report, apply and save EDiT weights", "#5a9e5a"),
    "_benchmark": ("benchmark", "seconds per call, base against EDiT", "#b8823c"),
}
LINKS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "EDIT_WEIGHTS": "#6fcf97",
}  # fmt: skip

Point = tuple[float, float]


def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype(f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


class Canvas:
    """A template's graph, scaled into the space below the header."""

    def __init__(self, draw: ImageDraw.ImageDraw, groups: list[dict[str, Any]]) -> None:
        self.draw = draw
        boxes = [group["bounding"] for group in groups]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right = max(box[0] + box[2] for box in boxes)
        bottom = max(box[1] + box[3] for box in boxes)
        width, height = FINER * (WIDTH - 28), FINER * (HEIGHT - HEADER - 28)
        self.scale = min(width / (right - left), height / (bottom - top))
        self.x = (FINER * WIDTH - self.scale * (right - left)) / 2 - self.scale * left
        self.y = FINER * HEADER + (FINER * (HEIGHT - HEADER) - self.scale * (bottom - top)) / 2 - self.scale * top

    def at(self, x: float, y: float) -> Point:
        return self.x + self.scale * x, self.y + self.scale * y

    def box(self, x: float, y: float, width: float, height: float, **look: Any) -> None:
        self.draw.rounded_rectangle((self.at(x, y), self.at(x + width, y + height)), self.scale * 8, **look)

    def text(self, x: float, y: float, text: str, size: float, width: float, color: str = FAINT) -> None:
        """Left to right from the middle of its left edge, cut where there is no more room."""
        drawn = font(self.scale * size)
        while text and drawn.getlength(text) > self.scale * width:
            text = text[:-1]
        self.draw.text(self.at(x, y), text, color, drawn, anchor="lm")

    def link(self, start: Point, end: Point, color: str) -> None:
        """A curve that leaves to the right and arrives from the left."""
        reach = max(40.0, 0.25 * abs(end[0] - start[0]))
        points = []
        for step in range(25):
            t = step / 24
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            x = a * start[0] + b * (start[0] + reach) + c * (end[0] - reach) + d * end[0]
            points.append(self.at(x, (a + b) * start[1] + (c + d) * end[1]))
        self.draw.line(points, color, FINER, joint="curve")


def socket(node: dict[str, Any], slot: int, output: bool) -> Point:
    x, y = node["pos"]
    return x + (node["size"][0] if output else 0), y + SOCKET_TOP + SOCKET_STEP * slot


def draw_node(canvas: Canvas, node: dict[str, Any]) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    canvas.box(x, y - 30, width, height + 30, fill=NODE)
    canvas.box(x, y - 30, width, 30, fill=TITLE)
    canvas.text(x + 24, y - 15, node["title"], 15, width - 30)
    widgets = [entry for entry in node["inputs"] if "widget" in entry]
    sockets = len(node["inputs"]) - len(widgets)
    for slot, entry in enumerate(node["inputs"][:sockets]):
        canvas.text(x + 14, socket(node, slot, output=False)[1], entry["name"], 12, width / 2, VALUE)
    top = y + SOCKET_TOP + SOCKET_STEP * max(sockets, len(node["outputs"]))
    # Without the widget that changes a seed after each run, which is no input.
    values = [value for value in node["widgets_values"] if value not in ("fixed", "randomize")]
    for place, (entry, value) in enumerate(zip(widgets, values, strict=True)):
        if top + 24 * place + 10 > y + height:
            break
        shown = entry["name"] if entry["link"] is not None else f"{entry['name']}   {value}"
        canvas.box(x + 14, top + 24 * place - 9, width - 28, 20, fill=GROUND)
        canvas.text(x + 24, top + 24 * place + 1, shown.replace("\n", " "), 12, width - 48, VALUE)


def draw_links(canvas: Canvas, template: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in template["nodes"]}
    for _, source, output, target, slot, kind in template["links"]:
        start, end = socket(nodes[source], output, output=True), socket(nodes[target], slot, output=False)
        canvas.link(start, end, LINKS.get(kind, "#9a9aa2"))


def picture(name: str, template: dict[str, Any]) -> Image.Image:
    model = next(key for key in MODELS if name.startswith(key))
    badge, subtitle, color = KINDS[name.removeprefix(model)]
    if model.startswith("small_world"):
        subtitle += "; nothing to download"
    image = Image.new("RGB", (FINER * WIDTH, FINER * HEIGHT), GROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, FINER * WIDTH, FINER * HEADER), BAR)
    draw.rectangle((0, 0, FINER * 10, FINER * HEADER), color)
    title, label = font(FINER * 27, bold=True), font(FINER * 17, bold=True)
    draw.text((FINER * 28, FINER * 32), MODELS[model], INK, title, anchor="lm")
    left = FINER * 46 + title.getlength(MODELS[model])
    right = left + label.getlength(badge) + FINER * 24
    draw.rounded_rectangle((left, FINER * 16, right, FINER * 49), FINER * 10, color)
    draw.text((left + FINER * 12, FINER * 32.5), badge, INK, label, anchor="lm")
    draw.text((FINER * 28, FINER * 69), subtitle, FAINT, font(FINER * 18), anchor="lm")

    canvas = Canvas(draw, template["groups"])
    for group in template["groups"]:
        x, y, width, height = group["bounding"]
        red, green, blue = (int(group["color"][i : i + 2], 16) for i in (1, 3, 5))
        canvas.box(x, y, width, height, fill=(red // 3 + 14, green // 3 + 14, blue // 3 + 14), outline=group["color"])
        canvas.text(x + 10, y + 20, group["title"], 22, width - 20, group["color"])
    for node in template["nodes"]:
        if node["type"] not in NOTES:
            draw_node(canvas, node)
    draw_links(canvas, template)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> None:
    for path in sorted(WORKFLOWS.glob("*.json")):
        template = json.loads(path.read_text(encoding="utf-8"))
        picture(path.stem, template).save(path.with_suffix(".jpg"), quality=88, optimize=True)


if __name__ == "__main__":
    main()
