"""Draws the picture of every template in `workflows/`: `python draw_thumbnails.py [NAME ...]`, all of them by default.

Those of the small world show what its models draw of the template's prompt; the others show their graph, since no
weights of the real models could be had where this was made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from edit_core import EDiTConfig, EDiTWeights, apply_edit
from edit_core.distill.calibrate import calibrate
from edit_core.distill.losses import TransferTap
from edit_core.layers import format_layers
from edit_core.world.draw import draw as draw_scene
from edit_core.world.files import load_teacher, shipped
from edit_core.world.text import WorldText

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
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
    "sd35_large": "SD3.5-Large",
    "pixart_alpha": "PixArt-α",
}
KINDS = {
    "": ("as it is", "the model without EDiT", "#3f789e"),
    "_edit": ("EDiT", "faster at once: nothing to train or download", "#5a9e5a"),
    "_ab": ("A/B", "the model as it is beside EDiT, same seed", "#7d7db8"),
    "_ab_2048": ("A/B 2048²", "the model as it is beside EDiT, same seed", "#7d7db8"),
    "_4096": ("4096²", "drawn small, enlarged, drawn over with EDiT", "#5a9e5a"),
    "_calibrate": ("calibrate", "train, report, apply and save EDiT weights", "#5a9e5a"),
    "_benchmark": ("benchmark", "seconds per call, the model as it is against EDiT", "#b8823c"),
    "_lora_controlnet_slg": ("EDiT", "with LoRA, ControlNet and SkipLayerGuidance", "#5a9e5a"),
}
LINKS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "EDIT_WEIGHTS": "#6fcf97", "CONTROL_NET": "#6ee7b7",
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


def values_of(node: dict[str, Any]) -> list[Any]:
    """Its widgets' values, without the one that changes a seed after each run, which is no input."""
    return [value for value in node["widgets_values"] if value not in ("fixed", "randomize")]


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
    for place, (entry, value) in enumerate(zip(widgets, values_of(node), strict=True)):
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


def value_of(template: dict[str, Any], kind: str, name: str) -> Any:
    """What the first node of a kind has in a widget."""
    node = next(node for node in template["nodes"] if node["type"] == kind)
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    return values_of(node)[widgets.index(name)]


class Errors(TransferTap):
    """What EDiT: Layer Report measures: every attention's error, by the calls of a drawing."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: dict[str, list[float]] = {}

    def __call__(self, key: str, dense: Callable[[], Any], edit: Callable[[], Any]) -> Any:
        output = super().__call__(key, dense, edit)
        self.found.setdefault(key, []).append(float(self.losses[key]))
        return output

    def within(self, threshold: float) -> str:
        """The blocks none of whose attentions has a larger mean error."""
        blocks = {int(key.split(".")[0]) for key in self.found}
        above = {int(key.split(".")[0]) for key, values in self.found.items() if fmean(values) > threshold}
        return format_layers(blocks - above)


def scenes_of(name: str, template: dict[str, Any]) -> dict[str, Image.Image]:
    """What the template's models draw of its prompt with its seed, by what to call it."""
    backbone = name.removeprefix("small_world_").rpartition("_")[0]
    teacher = load_teacher(shipped("diffusion_models", backbone))
    prompt, kind = value_of(template, "CLIPTextEncode", "text"), "PrimitiveInt" if name.endswith("_ab") else "KSampler"
    seed = value_of(template, kind, "value" if kind == "PrimitiveInt" else "seed")
    size = next(node for node in template["nodes"] if node["type"].startswith("Empty"))
    width, height = size["widgets_values"][:2]

    def drawn(weights: EDiTWeights | None, layers: str = "all") -> Image.Image:
        handle = apply_edit(teacher, weights, layers) if weights else None
        pixels = draw_scene(backbone, teacher, [prompt], [seed], width, height, value_of(template, "KSampler", "steps"))
        if handle:
            handle.remove()
        return Image.fromarray(pixels[0].numpy())

    if name.endswith("_ab"):
        student = EDiTWeights.load(shipped("edit", backbone))
        return {"softmax attention": drawn(None), "EDiT, distilled": drawn(student)}
    text, steps = WorldText(), value_of(template, "EDiTCalibrate", "steps")
    both = text.encode_prompts([prompt, ""])
    positive, negative = ({key: part[i : i + 1] for key, part in both.items()} for i in (0, 1))
    untrained = EDiTWeights.init(teacher, EDiTConfig.preset())
    trained, _ = calibrate(
        teacher, untrained, [positive], negative, steps=steps, height=height // 8, width=width // 8,
        lr=value_of(template, "EDiTCalibrate", "lr"),
    )  # fmt: skip
    errors = Errors()
    with apply_edit(teacher, trained) as handle:  # the teacher draws meanwhile
        handle.tap = errors
        draw_scene(backbone, teacher, [prompt], [0], width, height, steps=10, guidance=1.0)
    layers = errors.within(value_of(template, "EDiTLayerReport", "threshold"))
    return {
        "softmax attention": drawn(None),
        "EDiT, untrained": drawn(untrained),
        f"{steps} steps, blocks {layers}": drawn(trained, layers),
    }


def draw_scenes(image: Image.Image, draw: ImageDraw.ImageDraw, scenes: dict[str, Image.Image]) -> None:
    """Pictures in a line, their names below."""
    side = FINER * min(250, (WIDTH - 28) // len(scenes) - 16)
    step = FINER * WIDTH // len(scenes)
    top = FINER * (HEADER + (HEIGHT - HEADER - 28) // 2) - side // 2
    for place, (label, scene) in enumerate(scenes.items()):
        left = place * step + (step - side) // 2
        image.paste(scene.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        middle = (left + side // 2, top + side + FINER * 16)
        draw.text(middle, label, FAINT, font(FINER * 15), anchor="mm")


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

    if model.startswith("small_world") and not name.endswith("_benchmark"):
        draw_scenes(image, draw, scenes_of(name, template))
    else:
        draw_graph(draw, template)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_graph(draw: ImageDraw.ImageDraw, template: dict[str, Any]) -> None:
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


def main() -> None:
    for path in [WORKFLOWS / f"{name}.json" for name in sys.argv[1:]] or sorted(WORKFLOWS.glob("*.json")):
        template = json.loads(path.read_text(encoding="utf-8"))
        picture(path.stem, template).save(path.with_suffix(".jpg"), quality=88, optimize=True)


if __name__ == "__main__":
    main()
