"""The small world's table: trains students by every method and judges them, `tools/world table` (ours).

A row is a backbone, a method and a seed. Rows that the results have already are left alone, so that methods and seeds
can be added later; a training that was stopped goes on where it was. `teacher` is judged first, for each backbone, and
then what needs no training.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from edit_core import EDiTConfig, EDiTWeights, apply_edit
from edit_core.distill.config import RunConfig, load_config
from edit_core.distill.engine import Engine
from edit_core.distill.sampling import grid, png
from edit_core.distill.teacher import load_teacher
from edit_core.files import write_file
from edit_core.hosts.diffusers import EDiTHandle
from edit_core.world.codec import CHANNELS
from edit_core.world.data import main as make_cache
from edit_core.world.draw import held_out, pictures, real
from edit_core.world.files import export_pipeline

from . import classifier, judge

__all__ = ["METHODS", "TEACHER", "main", "missing"]

TEACHER = "teacher"
METHODS: dict[str, dict[str, Any]] = {
    name: {"student": {"preset": preset, **fields}}
    for name, preset, fields in (
        ("piecewise_fast", "piecewise", {"quality": "fast"}),
        ("piecewise", "piecewise", {}),
        ("piecewise_faithful", "piecewise", {"quality": "faithful"}),
        ("piecewise_trained", "piecewise", {}),
        ("edit", "paper", {}),
        ("local", "local", {}),
        ("sana", "sana", {}),
        ("linfusion", "linfusion", {}),
        ("kv_compression", "kv_compression", {}),
        ("no_conv_fusion", "paper", {"query": "plain"}),
        ("conv_fusion_on_keys", "paper", {"key": "conv_fusion"}),
        ("no_compression", "paper", {"key": "plain"}),
        ("exact", "paper", {"normaliser": "exact"}),
        ("features_after_relu", "paper", {"softmax_features": "post"}),
        ("all_linear", "paper", {"joint": "linear"}),
        ("local_branch", "paper", {"local": True}),
        ("squared_relu", "paper", {"kernel": "squared_relu"}),
        ("local_dense_conv", "local", {"query": "conv_fusion"}),
        ("local_no_conv_fusion", "local", {"query": "plain"}),
        ("local_exact", "local", {"normaliser": "exact"}),
        ("side_alone", "paper", {}),
        ("no_transfer", "paper", {}),
        ("edit_mixed", "paper", {}),
        ("local_longer", "local", {}),
        ("local_mixed", "local", {}),
    )
}
METHODS["side_alone"]["trainable"] = "side"
METHODS["edit_mixed"]["layers"] = METHODS["local_mixed"]["layers"] = "0-3, 5"
"""What differs from the committed configuration, `world_<backbone>`. Ours are `local`, two of its parts alone, and it
with the paper's ConvFusion, without any, and with the exact normalisers. `mixed` leaves the block dense that
`python -m edit_core plan` finds hardest to imitate."""
UNTRAINED = ("piecewise_fast", "piecewise", "piecewise_faithful")
"""What needs no weights, and is judged without any training."""
CONFIGURED = {"piecewise_trained": "world_{}_piecewise"}
"""The configuration of what starts where others do not."""
LONGER = {"local_longer": 3}
"""How many times as many steps."""
MAIN = ("edit", "local", "sana", "linfusion", "kv_compression")
"""What is trained from three seeds; the others from one, or as `--seed` asks."""
ONLY = {
    **dict.fromkeys(("exact", "features_after_relu", "all_linear", "local_exact"), ("sd35_medium",)),
    **dict.fromkeys(("edit_mixed", "local_mixed"), ("pixart_sigma",)),
}
"""Backbones of what not both have: a joint attention's own choices, and a block that was found to be the hardest."""
SIZES = (256, 384)
"""Pixels per side of what is drawn; students are trained at the first."""
COST_SIZES = (256, 1024)
SHOWN = 8
"""Pictures that are kept of every row."""
SHEET_SIDE, _MARGIN = 128, 150
"""Pixels per picture of the sheet that compares methods, and for their names."""


def missing(rows: Sequence[dict[str, Any]], backbone: str) -> list[tuple[str, int]]:
    """Methods and seeds of a backbone that are not in the results, in the order of worth."""
    wanted = [(TEACHER, 0), *((method, 0) for method in METHODS if backbone in ONLY.get(method, CHANNELS))]
    wanted += [(method, seed) for seed in (1, 2) for method in MAIN]
    found = {(row["method"], row["seed"]) for row in rows if row["backbone"] == backbone}
    return [row for row in wanted if row not in found]


def configured(backbone: str, method: str, seed: int, folder: Path) -> RunConfig:
    """The committed configuration with what the method changes in it."""
    config = load_config(CONFIGURED.get(method, "world_{}").format(backbone))
    changes: dict[str, Any] = {
        "model": folder / "teacher", "cache": str(folder / "cache"), "output": folder / f"{method}-{seed}",
        "seed": seed, **METHODS[method],
    }  # fmt: skip
    if method == "no_transfer":  # as many steps all the same
        first, second = config.stages
        changes["stages"] = [second.model_copy(update={"steps": first.steps + second.steps})]
    if times := LONGER.get(method):
        changes["stages"] = [stage.model_copy(update={"steps": stage.steps * times}) for stage in config.stages]
    return config.model_copy(update=changes)


def train(backbone: str, method: str, seed: int, folder: Path) -> Path:
    """Trains a student, or goes on with it; returns its file."""
    engine = Engine(configured(backbone, method, seed, folder))
    engine.resume()
    return engine.run()


def judged(backbone: str, method: str, seed: int, folder: Path, count: int) -> dict[str, Any]:
    """A row of the results; its first pictures are written beside the student."""
    transformer = load_teacher(folder / "teacher", torch.float32, torch.device("cpu"))
    eyes, asked = classifier.load(), held_out(count)
    row: dict[str, Any] = {"backbone": backbone, "method": method, "seed": seed, "pictures": count}
    row["base"] = sum(p.numel() for p in transformer.parameters())
    output = folder / f"{method}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    handle = None
    if method in UNTRAINED:
        handle = apply_edit(transformer, configured(backbone, method, seed, folder).edit_config())
    elif method != TEACHER:
        weights = EDiTWeights.load(output / "student.safetensors")
        handle, row["training"] = apply_edit(transformer, weights), weights.training
    for size in SIZES:
        shown = asked if size == SIZES[0] else asked[: count // 4]  # the larger ones take several times as long
        drawn = pictures(backbone, transformer, shown, size)
        row[str(size)] = judge.worth(drawn, shown, backbone, eyes)
        write_file(output / f"{size}.png", png(grid([drawn[:SHOWN]])))
        if handle:
            row[f"distance {size}"] = judge.distance(backbone, transformer, handle, size)
    if handle:
        row["side"] = sum(p.numel() for p in handle.sides.parameters())
        row["trained"] = sum(p.numel() for p in handle.trainable().values())
        if seed == 0:  # others cost the same
            row |= _costs(backbone, transformer, handle)
    return row


def _costs(backbone: str, transformer: Any, handle: EDiTHandle) -> dict[str, Any]:
    return {f"cost {size}": judge.cost(backbone, transformer, handle, size) for size in COST_SIZES}


def timed(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row of a student with its costs measured anew, on an untrained one, which costs the same."""
    config = configured(row["backbone"], row["method"], row["seed"], folder)
    transformer, student = load_teacher(config.model, torch.float32, torch.device("cpu")), config.edit_config()
    weights: EDiTWeights | EDiTConfig = student
    if row["method"] not in UNTRAINED:
        weights = EDiTWeights.init(transformer, student, config.layers, trainable=config.trainable)
    with apply_edit(transformer, weights) as handle:
        return row | _costs(row["backbone"], transformer, handle)


def sheet(backbone: str, folder: Path) -> Image.Image:
    """What the captions ask for, and what the teacher and every method draw from the same noise, a line each."""
    drawn = {"as asked": grid([real(backbone, held_out(SHOWN), SIZES[0])])}
    for method in (TEACHER, *METHODS):
        file = folder / f"{method}-0" / f"{SIZES[0]}.png"
        if file.exists():
            drawn[method.replace("_", " ")] = Image.open(file)
    page = Image.new("RGB", (_MARGIN + SHOWN * SHEET_SIDE, len(drawn) * SHEET_SIDE), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, line) in enumerate(drawn.items()):
        page.paste(line.resize((SHOWN * SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS), (_MARGIN, i * SHEET_SIDE))
        pen.text((8, (i + 0.5) * SHEET_SIDE), name, "black", anchor="lm", font_size=15)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/world table",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", choices=[*CHANNELS], required=True, help="start one process for each")
    parser.add_argument(
        "--method", choices=[TEACHER, *METHODS], help="one row alone, judged anew; a training that was begun goes on"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --method")
    parser.add_argument(
        "--costs", action="store_true", help="time every method of the results again, one after the other, and no more"
    )
    parser.add_argument("--results", type=Path, default=Path("docs/world.json"), help="rows are added to this file")
    parser.add_argument("--runs", type=Path, default=Path("out/world"), help="folder for teachers, caches, students")
    parser.add_argument("--scenes", type=int, default=4096, help="that students are trained on")
    parser.add_argument("--pictures", type=int, default=128, help="that are drawn to judge a row; a quarter at 384²")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two backbones side by side are faster than one on two cores
    folder = options.runs / options.backbone
    if not (folder / "teacher").exists():
        export_pipeline(options.backbone, folder / "teacher")
    if options.costs:
        for row in _rows(options.results):
            if row["backbone"] == options.backbone and any(name.startswith("cost") for name in row):
                print(f"{options.backbone} {row['method']}")
                _write(options.results, timed(row, folder))
        return
    todo = [(options.method, options.seed)] if options.method else missing(_rows(options.results), options.backbone)
    for method, seed in todo:
        if method not in (TEACHER, *UNTRAINED):
            cache = ["--output", str(folder / "cache"), "--count", str(options.scenes)]
            make_cache(["--backbone", options.backbone, *cache])
            file = train(options.backbone, method, seed, folder)
            if file.suffix != ".safetensors":
                print(f"{file}: stopped; the same command goes on")
                return
        row = judged(options.backbone, method, seed, folder, options.pictures)
        _write(options.results, row)
        print(f"{options.backbone} {method} {seed}: {row[str(SIZES[0])]['all']:.1%}")
        picture = io.BytesIO()
        sheet(options.backbone, folder).save(picture, "JPEG", quality=88)
        write_file(options.results.with_name(f"world_{options.backbone}.jpg"), picture.getvalue())


def _write(results: Path, row: dict[str, Any]) -> None:
    """Adds a row to the results, or replaces it."""
    keys = ("backbone", "method", "seed")
    # Read again: the other backbone's process writes here too.
    rows = [other for other in _rows(results) if any(other[key] != row[key] for key in keys)]
    write_file(results, (json.dumps([*rows, row], indent=1) + "\n").encode())


def _rows(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text("utf-8")) if results.exists() else []
