"""Writes `workflows/`: `python make_workflows.py OBJECT_INFO`, a ComfyUI server's saved answer to GET /object_info.

One description per workflow gives both its API file and its UI template, so the two cannot drift apart.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_core.world.scenes import COLOURS, GROUNDS, SHAPES, TEXTURES

from workflow_models import KINDS, MODELS, Model

OUT = Path(__file__).resolve().parents[1] / "workflows"
PACK_ID = "edit-attention"
TITLE_HEIGHT, GAP = 30, 24
BLUE, GREEN, VIOLET = "#3f789e", "#88AA88", "#8888AA"
SEED = 20250807
TURBO = {"steps": 8, "cfg": 1.5}
"""What the LoRA of SD3.5 Medium's template is for."""


@dataclass
class Node:
    type: str
    title: str
    inputs: dict[str, Any]
    size: tuple[int, int]
    id: int = 0
    models: list[dict[str, str]] = field(default_factory=list)
    blocks: int = 0
    """For the layer picker: how many the model has, which else is only known after a run."""
    after_generate: str = "randomize"

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


@dataclass
class Group:
    title: str
    color: str
    columns: list[tuple[int, list[Node]]]
    """Per column its width and its nodes, from top to bottom."""
    under: tuple[int, ...] = ()
    """The groups, counted from 1, that it lies below; none for right of all before it."""


def base_of(model: Model) -> Node:
    return Node(
        "EDiTLoadModel", f"Load {model.title}",
        {"model_name": f"diffusion_models/{model.file}", "weight_dtype": "default", "edit_weights": "none"}, (340, 120),
    )  # fmt: skip


def init_of(blocks: int, model: tuple[Node, int]) -> Node:
    inputs = {"model": model, "compression": 4, "layers": "all"}
    return Node("EDiTInit", "Init EDiT weights", inputs, (340, 150), blocks=blocks)


def applied_of(
    blocks: int, model: tuple[Node, int], weights: tuple[Node, int] | None = None, layers: Any = "all"
) -> Node:
    """EDiT on a model: without weights, piecewise attention."""
    given = {"edit_weights": weights} if weights else {}
    return Node(
        "EDiTApply", "Apply EDiT",
        {"layers": layers, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0, "quality": "balanced",
         "model": model, **given}, (340, 250), blocks=blocks,
    )  # fmt: skip


def weights_of(model: Model) -> list[Node]:
    """The node that loads a model's published weights, where there are any."""
    return [Node("EDiTLoadWeights", "Load EDiT weights", {"edit_name": model.edit_file}, (340, 80))] * bool(
        model.edit_file
    )


def prompt_of(model: Model, title: str, words: str, text: Node, height: int) -> Node:
    size = {"width": model.side, "height": model.side} if model.sized else {}
    kind = "CLIPTextEncodePixArtAlpha" if model.sized else "CLIPTextEncode"
    return Node(kind, title, {**size, "text": words, "clip": text[0]}, (400, height + 50 * model.sized))


def control_of(model: Model, positive: Node, negative: Node, vae: Node) -> list[Node]:
    """A ControlNet on the edges of the picture that ComfyUI comes with; the last but one node has the conditionings."""
    loader = Node("ControlNetLoader", "Load ControlNet", {"control_net_name": model.control}, (340, 60))
    image = Node("LoadImage", "Picture to take edges from", {"image": "example.png"}, (340, 314))
    edges = Node("Canny", "Edges", {"image": image[0], "low_threshold": 0.1, "high_threshold": 0.3}, (340, 82))
    applied = Node(
        "ControlNetApplyAdvanced", "Apply ControlNet",
        {"positive": positive[0], "negative": negative[0], "control_net": loader[0], "image": edges[0],
         "strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "vae": vae[0]}, (340, 186),
    )  # fmt: skip
    shown = Node("PreviewImage", "The edges", {"images": edges[0]}, (340, 246))
    return [loader, image, edges, applied, shown]


def numbered(groups: list[Group]) -> list[Group]:
    """The same groups, once their nodes have their numbers."""
    nodes = [node for group in groups for _, column in group.columns for node in column]
    for number, node in enumerate(nodes, start=1):
        node.id = number
    return groups


def benchmark_of(model: Model) -> list[Group]:
    """The model before and after EDiT, timed."""
    base = base_of(model)
    weights = weights_of(model)
    applied = applied_of(model.blocks, base[0], weights[0][0] if weights else None)
    benchmark = Node(
        "EDiTBenchmark", "Benchmark",
        {"model_a": base[0], "model_b": applied[0], "sizes": model.timed_sizes, "repeats": 5}, (480, 440),
    )  # fmt: skip
    table = Node("PreviewAny", "Table", {"source": benchmark[1]}, (480, 260))
    save = Node(
        "SaveImage", "Save chart", {"filename_prefix": f"EDiT/{model.name}_benchmark", "images": benchmark[0]},
        (480, 330),
    )  # fmt: skip
    return numbered([
        Group("1 · Model", BLUE, [(340, [base])]),
        Group("2 · Fast attention", GREEN, [(340, [*weights, applied])], under=(1,)),
        Group("3 · Times", BLUE, [(480, [benchmark, table]), (480, [save])]),
    ])  # fmt: skip


def groups_of(model: Model, kind: str) -> list[Group]:
    """The workflow's nodes, in the groups and columns in which they are drawn."""
    if kind == "_benchmark":
        return benchmark_of(model)
    edit, both, calibrate, guided = kind != "", "_ab" in kind, kind == "_calibrate", kind == "_lora_controlnet_slg"
    large = kind == "_4096"
    base = base_of(model)
    text = Node(
        model.text_loader, "Load text encoders", model.text_inputs, (340, 120),
        models=[{"name": n, "url": u, "directory": "text_encoders"} for n, u in model.text_files.items()],
    )  # fmt: skip
    vae = Node("VAELoader", "Load VAE", {"vae_name": model.vae}, (340, 60))
    if Path(model.vae_source).name == model.vae:  # a link only helps where it gives the file the name that is asked for
        vae.models = [{"name": model.vae, "url": model.vae_source, "directory": "vae"}]
    loaders = [base, text, vae]
    positive = prompt_of(model, "Prompt", model.prompt, text, 170)
    negative = prompt_of(model, "Negative prompt", model.negative, text, 110)
    side = 2048 if kind.endswith("_2048") else model.side
    latent = Node(model.latent, "Size", {"width": side, "height": side, "batch_size": 1}, (400, 110))

    base_trunk = base
    patches = []
    if model.shift is not None:
        base_trunk = Node("ModelSamplingSD3", "Shift", {"shift": model.shift, "model": base[0]}, (340, 60))
        patches.append(base_trunk)
    variants = {"": base_trunk}
    reported = []
    control = control_of(model, positive, negative, vae) if guided else []
    guides = (control[3][0], control[3][1]) if guided else (positive[0], negative[0])
    if calibrate:
        init = init_of(model.blocks, base_trunk[0])
        weights = Node(
            "EDiTCalibrate", "Calibrate",
            {"model": base_trunk[0], "edit_weights": init[0], "positive": positive[0], "negative": negative[0],
             "latent": latent[0], "steps": model.calibration_steps, "lr": 0.005, "seed": 0}, (340, 420),
            after_generate="fixed",  # else every run would train anew
        )  # fmt: skip
        saved = Node(
            "EDiTSaveWeights", "Save EDiT weights",
            {"filename_prefix": f"{model.name}_calibrated", "edit_weights": weights[0]}, (340, 60),
        )  # fmt: skip
        report = Node(
            "EDiTLayerReport", "Layer report",
            {"model": base_trunk[0], "edit_weights": weights[0], "conditioning": positive[0], "latent": latent[0],
             "threshold": 0.25}, (400, 360),
        )  # fmt: skip
        layers = Node("PreviewAny", "Suggested layers", {"source": report[1]}, (400, 120))
        applied = applied_of(model.blocks, base_trunk[0], weights[0], report[1])
        patches += [init, weights, saved]
        reported = [report, layers, applied]
        variants = {"_calibrated": applied}
    elif edit:
        loaded = weights_of(model)
        applied = applied_of(model.blocks, base_trunk[0], loaded[0][0] if loaded else None)
        patches += [*loaded, applied]
        variants = {"_base": base_trunk, "_edit": applied} if both else {"_edit": applied}
        if guided:
            lora = Node(
                "LoraLoaderModelOnly", "Load LoRA",
                {"lora_name": model.lora, "strength_model": 1.0, "model": base_trunk[0]}, (340, 82),
                models=[{"name": model.lora, "url": model.lora_source, "directory": "loras"}],
            )  # fmt: skip
            applied.inputs["model"] = lora[0]
            skip = Node(
                "SkipLayerGuidanceSD3", "SkipLayerGuidance",
                # As Stability AI recommends for this model.
                {"layers": "7, 8, 9", "scale": 2.5, "start_percent": 0.01, "end_percent": 0.2, "model": applied[0]},
                (340, 154),
            )  # fmt: skip
            patches = [base_trunk, lora, applied, skip]
            variants = {kind: skip}
    settings = [positive, negative, latent]
    seed: Any = SEED
    if both or large:
        settings.append(Node("PrimitiveInt", "Seed of both", {"value": SEED}, (400, 82), after_generate="fixed"))
        seed = settings[-1][0]

    def sampled(title: str, source: Node, start: Node, **changes: Any) -> Node:
        return Node(
            "KSampler", title,
            {"seed": seed, **model.sampling, **(TURBO if guided else {}), "model": source[0], "positive": guides[0],
             "negative": guides[1], "latent_image": start[0], **changes}, (315, 262),
            after_generate="randomize" if seed == SEED else "fixed",
        )  # fmt: skip

    groups = [
        Group("1 · Models", BLUE, [(340, loaders)]),
        Group("2 · Prompt, size and seed" if both or large else "2 · Prompt and size", BLUE, [(400, settings)]),
    ]
    if control:
        groups.append(Group("3 · ControlNet", BLUE, [(340, control[:3]), (340, control[3:])]))
    if calibrate:
        groups[1].under = (1,)
    if patches:
        titles = {"": "Sampling", "_calibrate": "Calibrate", "_lora_controlnet_slg": "LoRA, EDiT, guidance"}
        title, color = titles.get(kind, "Fast attention"), GREEN if edit else BLUE
        below = () if calibrate else (1,)
        groups.append(Group(f"{len(groups) + 1} · {title}", color, [(340, patches)], below))
    if reported:
        groups.append(Group("4 · Report and apply", GREEN, [(400, reported)]))
    if large:
        first = sampled("Sample small", base_trunk, latent)
        latent = Node(
            "LatentUpscale", "Enlarge",
            {"samples": first[0], "upscale_method": "bicubic", "width": 4096, "height": 4096, "crop": "disabled"},
            (315, 130),
        )  # fmt: skip
        groups.append(Group(f"{len(groups) + 1} · Small picture, enlarged", VIOLET, [(315, [first]), (315, [latent])]))
    decoded = []
    for suffix, source in variants.items():
        name = " as it is" if suffix == "_base" else " EDiT" if suffix else ""
        changes = {"denoise": 0.55} if large else {}
        sampler = sampled("Sample large" if large else f"Sample{name}", source, latent, **changes)
        if large:
            decode = Node(
                "VAEDecodeTiled", "Decode in tiles",
                {"samples": sampler[0], "vae": vae[0], "tile_size": 1024, "overlap": 128, "temporal_size": 64,
                 "temporal_overlap": 8}, (315, 154),
            )  # fmt: skip
        else:
            decode = Node("VAEDecode", "Decode", {"samples": sampler[0], "vae": vae[0]}, (315, 46))
        decoded.append(decode)
        saved_as = kind if large else kind.removeprefix("_ab") + suffix if both else suffix
        save = Node(
            "SaveImage", f"Save{name}", {"filename_prefix": f"EDiT/{model.name}{saved_as}", "images": decode[0]},
            (360, 390),
        )  # fmt: skip
        arm = {"_base": ("The model as it is", VIOLET), "_edit": ("With EDiT", GREEN)}
        label, color = arm[suffix] if both else ("Picture", BLUE)
        below = (3, 4) if reported else (3,) if control else (len(groups),) if large or decoded[1:] else ()
        groups.append(Group(f"{len(groups) + 1} · {label}", color, [(315, [sampler, decode]), (360, [save])], below))
    if both:
        compare = Node(
            "EDiTCompare", "Compare", {"image_a": decoded[0][0], "image_b": decoded[1][0], "gain": 4.0}, (400, 480)
        )
        groups.append(Group(f"{len(groups) + 1} · Compare", BLUE, [(400, [compare])], under=(2,)))
    return numbered(groups)


def note_of(model: Model, kind: str) -> str:
    """Markdown for the user: what the template draws, what EDiT does in it, and the files."""

    def line(name: str, url: str) -> str:
        original = Path(url).name
        return f"- `{name}` ([download]({url}){'' if original == name else f', then rename {original}'})"

    text = [f"## {model.title}: {KINDS[kind]}", ""]
    if kind == "":
        text += [
            "The model as it is, without EDiT: the picture to compare with. The templates with `_edit` and `_ab` in "
            "their names make it faster.", "",
        ]  # fmt: skip
    else:
        text += [*(LINEAR if kind == "_calibrate" else PIECEWISE), ""]
    if kind == "_edit":
        text += [
            "*quality* in *Apply EDiT* is the dial: **faithful** is nearest to the model, **fast** is fastest. To "
            "switch EDiT off, bypass *Apply EDiT* (Ctrl+B): that gives the model's own picture.", "",
        ]  # fmt: skip
    elif kind in ("_ab", "_ab_2048"):
        text += [*TWO_PICTURES, "", UNMEASURED, ""]
    if kind == "_ab_2048":
        text += ["This is four times the size that the model was made for: things may come twice, in both pictures "
                 "alike. The larger the picture, the more time EDiT saves.", ""]  # fmt: skip
    elif kind == "_4096":
        text += LARGE
    elif kind == "_benchmark":
        text += [*MEASURED, ""]
    elif kind == "_calibrate":
        text += [*calibration_of(model), ""]
    elif kind == "_lora_controlnet_slg":
        text += [*GUIDED, ""]
    text += ["### Files", "", "**models/diffusion_models**", "", line(model.file, model.source), ""]
    if kind != "_benchmark":
        text += ["**models/text_encoders**", "", *(line(n, u) for n, u in model.text_files.items()), ""]
        text += ["**models/vae**", "", line(model.vae, model.vae_source), ""]
    if kind == "_lora_controlnet_slg":
        text += [
            "**models/loras**", "", line(model.lora, model.lora_source), "",
            "**models/controlnet**", "", line(model.control, model.control_source), "",
        ]  # fmt: skip
    text += [
        "*EDiT: Load Model* also finds files in models/checkpoints. After adding files, press **R**."
        + (" The model is gated: accept its licence on its page first." if model.shift else "")
    ]
    return "\n".join(text)


def small_note_of(model: Model, kind: str) -> str:
    """Markdown for the user: what the small world is, and what can be asked of it."""
    files = [f"- of models/diffusion_models: `{model.file}`, the teacher"]
    if kind != "_benchmark":
        files.append(f"- of models/vae: `{model.vae}`")
    if kind != "_calibrate":
        files.append(f"- of models/edit: `{model.edit_file}`, EDiT weights that were distilled from it")
    text = [
        f"## The {model.title}: {KINDS[kind]}", "",
        "### Files", "",
        "They come with the pack, and are listed beside your own:", "",
        *files, "",
        "Nothing has to be downloaded, and a CPU is enough.", "",
        "### What it is", "",
        "A model of the real architecture with a few million parameters, which has seen nothing but drawn scenes. Load "
        "it with *EDiT: Load Model* and encode text with *EDiT: Small World Text Encoder*; everything else is as for "
        "the real one.", "",
    ]  # fmt: skip
    if kind == "_benchmark":
        return "\n".join([*text, *MEASURED])
    text += [
        "### What to ask for", "",
        "One to three shapes, each with its size, colour and place, then the ground:", "",
        f"- shapes: {', '.join(SHAPES)}; large (big) or small (little)",
        f"- colours: {', '.join(COLOURS)}",
        "- places: top, middle or bottom, and left, centre or right",
        f"- grounds: {', '.join(GROUNDS)}, with {', '.join(TEXTURES)}",
        "- and perhaps: *the right half mirrors the left*, *framed in the colour of the third shape*, *as many dots "
        "left as right*", "",
        "Other words mean nothing to it. It has seen pictures of about 256x256 pixels; sides are multiples of 16"
        + (", and PixArt in ComfyUI wants a mean side of more than 256." if "pixart" in model.name else "."), "",
    ]  # fmt: skip
    return "\n".join([*text, *(TWO_PICTURES if kind == "_ab" else calibration_of(model))])


def calibration_of(model: Model) -> list[str]:
    return [
        "### What happens", "",
        "1. *Init EDiT weights* makes untrained weights that start near the model.",
        "2. *Calibrate* has the model draw the prompt, and every linear attention learns to give what the attention "
        "that it replaces gives. No pictures are needed. The node shows the error of each step; cancelling stops it "
        "and keeps nothing.",
        "3. *Layer report* measures how well each attention is imitated, and suggests the blocks to make linear.",
        "4. *Apply EDiT* makes those blocks linear, and the sampler draws.",
        "5. *Save EDiT weights* writes them to **models/edit**, as "
        f"`{model.name}_calibrated_00001_.safetensors`. The next time, load them with *EDiT: Load Weights*.", "",
        "### What to expect", "",
        "This trains each attention by itself, on one prompt at one size. It brings untrained weights nearer to the "
        "model, and does not replace a distillation (the pack's README says how to do one). If the suggestion is "
        "*none*, the picture is the base model's own: raise the *steps* of *Calibrate*, or the report's "
        "*threshold*.", "",
        "The calibration keeps its seed, so that a second run with another picture's seed does not train again.",
    ]  # fmt: skip


MEASURED = [
    "### What is measured", "",
    "Seconds for single calls of both models on one picture, without guidance, in alternation; the median of all "
    "*repeats*, with the fastest and slowest in the table. Text encoding and the VAE do not count.", "",
    "*sizes* are sides of square pictures in pixels, multiples of 16. Small pictures gain nothing or lose; the larger "
    "they are, the more EDiT saves. Out of memory? Leave out the largest.",
]  # fmt: skip

TWO_PICTURES = [
    "### Reading the two pictures", "",
    "Both samplers get the same seed, prompt and settings; the attention is all that differs. "
    "The first picture is the same as without EDiT in the graph. *Compare* shows both, and how alike they are. Both "
    "may draw a detail well and yet differently, so low figures alone do not mean a bad picture.",
]  # fmt: skip

UNMEASURED = (
    "How good the pictures of the real model are was not measured where this pack was made, which has none: this "
    "template is how you see it on yours."
)

LARGE = [
    "### How it is drawn", "",
    "1. *Sample small* draws at 1024x1024, the size that the model was made for: the composition comes from here.",
    "2. *Enlarge* makes the latent four times as wide and high.",
    "3. *Sample large* draws over it at 4096x4096, with EDiT: at this size the model's own attention takes nearly all "
    "of the time. A higher *denoise* invents more, a lower one keeps more.",
    "4. *Decode in tiles* turns it into a picture piece by piece, since all of it at once takes more memory than most "
    "cards have. Out of memory? Lower *tile_size*.", "",
]  # fmt: skip

GUIDED = [
    "### LoRA, ControlNet and SkipLayerGuidance", "",
    "All three are ComfyUI's own nodes, and EDiT changes nothing about them. A LoRA may be loaded before or after "
    "*Apply EDiT*; the ControlNet adds to what the blocks give; SkipLayerGuidance skips blocks. To do without one of "
    "them, bypass its node (Ctrl+B), or set its strength or scale to 0.", "",
    "The LoRA is the one that lets the model draw in 8 steps with little guidance. Without it, or with one of your "
    "own, set *Sample EDiT* to 28 steps and a cfg of 4.5.", "",
    "*Picture to take edges from* starts with the picture that ComfyUI comes with (`input/example.png`); choose one of "
    "your own. ControlNets for SD3.5 Large do not fit SD3.5 Medium.", "",
    "To switch EDiT off, bypass *Apply EDiT*: the rest stays as it is.",
]  # fmt: skip

PIECEWISE = [
    "### What EDiT does", "",
    "Large pictures take so long because the model compares every part of the picture with every other. *Apply EDiT* "
    "lets each part look closely at what matters most to it, and at the average of everything else. **Nothing has to "
    "be trained or downloaded for it.** What it costs grows with the picture's area, no longer with its square.",
]  # fmt: skip

LINEAR = [
    "### What EDiT does", "",
    "Large pictures take so long because the model compares every part of the picture with every other. EDiT's linear "
    "attention sums the picture up instead, which is cheapest of all; but it has to be trained for the model. "
    "No trained weights are published; this template makes some. Without any, *Apply EDiT* uses piecewise attention, "
    "which needs none: see the templates with `_edit` and `_ab` in their names.",
]  # fmt: skip


def api_of(groups: list[Group]) -> dict[str, Any]:
    nodes = [node for group in groups for _, column in group.columns for node in column]
    return {
        str(node.id): {
            "inputs": {k: [str(v[0].id), v[1]] if isinstance(v, tuple) else v for k, v in node.inputs.items()},
            "class_type": node.type,
            "_meta": {"title": node.title},
        }
        for node in nodes
    }


def place(groups: list[Group], left: int) -> tuple[dict[int, tuple[int, int]], list[dict[str, Any]]]:
    """Positions of the nodes and the groups' frames: groups side by side, or one below others."""
    positions: dict[int, tuple[int, int]] = {}
    frames: list[dict[str, Any]] = []
    for number, group in enumerate(groups, start=1):
        above = [frames[other - 1]["bounding"] for other in group.under]
        x = above[0][0] if above else max((f["bounding"][0] + f["bounding"][2] + GAP for f in frames), default=left)
        top = max((y + height + GAP for _, y, _, height in above), default=0)
        column_x, bottom = x + 12, 0
        for width, column in group.columns:
            y = top + 44 + TITLE_HEIGHT
            for node in column:
                positions[node.id] = (column_x, y)
                y += node.size[1] + GAP + TITLE_HEIGHT
            bottom = max(bottom, y - TITLE_HEIGHT - GAP + 14)
            column_x += width + 40
        width = column_x - 40 + 12 - x
        frames.append(
            {"id": number, "title": group.title, "bounding": [x, top, width, bottom - top], "color": group.color,
             "font_size": 24, "flags": {}}
        )  # fmt: skip
    return positions, frames


def ui_of(groups: list[Group], note: str, info: dict[str, Any]) -> dict[str, Any]:
    nodes = [node for group in groups for _, column in group.columns for node in column]
    note_width, note_height = 440, 620 if len(note) > 1500 else 340
    positions, frames = place(groups, 0)
    links: list[list[Any]] = []
    drawn: dict[int, dict[str, Any]] = {}
    for order, node in enumerate(nodes):
        schema = info[node.type]
        outputs = [
            {"name": name, "type": kind, "links": []}
            for name, kind in zip(schema["output_name"], schema["output"], strict=True)
        ]
        core = not node.type.startswith("EDiT")
        properties: dict[str, Any] = {"cnr_id": "comfy-core" if core else PACK_ID, "Node name for S&R": node.type}
        if node.models:
            properties["models"] = node.models
        if node.blocks:
            properties["edit_blocks"] = node.blocks
        drawn[node.id] = {
            "id": node.id, "type": node.type, "pos": list(positions[node.id]), "size": list(node.size), "flags": {},
            "order": order, "mode": 0, "inputs": [], "outputs": outputs, "title": node.title,
            "properties": properties, "widgets_values": [],
        }  # fmt: skip
    for node in nodes:
        schema = info[node.type]
        specs = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        sockets, widgets = [], []
        for name in specs:
            kind = specs[name][0]
            options = specs[name][1] if len(specs[name]) > 1 else {}
            is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            socket: dict[str, Any] = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind}
            if is_widget:
                socket["widget"] = {"name": name}
            socket["link"] = None
            value = node.inputs.get(name)  # optional inputs may be left open
            if isinstance(value, tuple):
                source, output = value
                slot = drawn[source.id]["outputs"][output]
                socket["link"] = len(links) + 1
                slot["links"].append(socket["link"])
                links.append([socket["link"], source.id, output, node.id, (name, is_widget), slot["type"]])
            (widgets if is_widget else sockets).append(socket)
            if is_widget:
                seed = name in ("seed", "noise_seed")
                unlinked = SEED if seed else options.get("default")
                drawn[node.id]["widgets_values"].append(unlinked if isinstance(value, tuple) else value)
                if seed or options.get("control_after_generate"):
                    drawn[node.id]["widgets_values"].append(node.after_generate)
        drawn[node.id]["inputs"] = sockets + widgets  # as the frontend orders them
    for link in links:
        names = [socket["name"] for socket in drawn[link[3]]["inputs"]]
        link[4] = names.index(link[4][0])
    markdown = {
        "id": len(nodes) + 1, "type": "MarkdownNote", "pos": [-note_width - GAP, TITLE_HEIGHT],
        "size": [note_width, note_height], "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [],
        "title": "Read me", "properties": {}, "widgets_values": [note], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip
    return {
        "last_node_id": markdown["id"], "last_link_id": len(links), "nodes": [*drawn.values(), markdown],
        "links": links, "groups": frames, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def main() -> None:
    info = json.loads(Path(sys.argv[1]).read_text())
    (OUT / "api").mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        note = small_note_of if model.text_loader == "EDiTSmallWorldText" else note_of
        for kind in model.kinds:
            groups = groups_of(model, kind)
            for path, content in (
                (OUT / "api" / f"{model.name}{kind}.json", api_of(groups)),
                (OUT / f"{model.name}{kind}.json", ui_of(groups, note(model, kind), info)),
            ):
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
