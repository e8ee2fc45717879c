"""What the engine costs, at the real models' width: writes docs/bench_training.json and the tables of docs/training.md.

Random weights and random latents: neither time nor memory depends on them. Overhead is the time of an engine's step
over that of the same forwards, losses and backward called by hand, in alternation, and wants a quiet machine; memory is
the highest that a process of its own held while it took two steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edit_core.backbones import backbone_named
from edit_core.bench import device_name
from edit_core.distill.cache import build_cache
from edit_core.distill.config import RunConfig, load_config
from edit_core.distill.engine import Engine
from edit_core.distill.losses import FeatureTap
from edit_core.distill.memory import estimate
from edit_core.distill.sources import FolderSource
from edit_core.models import empty_transformer, random_transformer
from edit_core.runtime import DTYPES

WIDTHS = {"pixart_sigma": (4, 4096), "sd35_medium": (16, 4096)}


class RandomEncoder:
    """Latents and embeddings of real shapes from noise."""

    dtype = torch.bfloat16
    fingerprint = "random"

    def __init__(self, backbone: str) -> None:
        self.backbone = backbone

    def encode_images(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        return torch.randn(len(pixels), WIDTHS[self.backbone][0], height // 8, width // 8)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, width = backbone_named(self.backbone).real.prompt_tokens, WIDTHS[self.backbone][1]
        found = {"prompt_embeds": torch.randn(len(prompts), tokens, width, dtype=self.dtype)}
        if self.backbone == "pixart_sigma":
            return found | {"prompt_mask": torch.ones(len(prompts), tokens, dtype=torch.bool)}
        return found | {"pooled": torch.randn(len(prompts), 2048, dtype=self.dtype)}


def prepare(backbone: str, folder: Path, resolution: int, blocks: int | None, dtype: torch.dtype) -> None:
    random_transformer(backbone_named(backbone), blocks, dtype, resolution).save_pretrained(
        folder / "model" / "transformer"
    )
    (folder / "images").mkdir()
    for i in range(2):
        Image.fromarray(np.full((resolution, resolution, 3), i, np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text("noise")
    build_cache(FolderSource(folder / "images"), RandomEncoder(backbone), folder / "cache", [resolution])


def config(folder: Path, kind: str, resolution: int, precision: str, steps: int = 2) -> RunConfig:
    stage: dict[str, Any] = {"kind": kind, "resolution": resolution, "steps": steps, "batch_size": 1}
    return RunConfig.model_validate(
        {
            "precision": precision,
            "model": folder / "model", "cache": str(folder / "cache"), "output": folder / kind, "stages": [stage],
            "watch": {"held_out": 0, "evaluate_every": 0, "preview_every": 0}, "checkpoint_every": 1000,
        }
    )  # fmt: skip


def overhead(folder: Path, resolution: int, precision: str, repeats: int) -> dict[str, float]:
    """Median seconds of an engine's step of `distill`, and of its two forwards and one backward by hand."""
    engine = Engine(config(folder, "distill", resolution, precision, steps=10**6))
    stage = engine.config.stages[0].model_copy(update={"gradient_checkpointing": False})
    data, backbone = engine.data[0], backbone_named(engine.weights.backbone)
    plan, times = engine._plan(data, stage, 0), {"engine": [], "by hand": []}
    for i in range(repeats + 1):  # the first pair warms up
        batch = data.collate(plan.batch(i))  # a training reads it ahead
        start = time.perf_counter()
        losses = engine._train_step(stage, batch)
        engine._update(stage, losses)
        times["engine"].append(time.perf_counter() - start)

        latent = batch.pop("latent").to(DTYPES[precision])
        noised = backbone.objective.noise_batch(latent, [torch.Generator().manual_seed(i)])
        arguments = backbone.call_arguments(noised.latent, noised.timestep, batch, engine.device)
        engine.learner.begin()
        features = FeatureTap()
        start = time.perf_counter()
        with engine._autocast():
            wanted = engine.student.call(arguments, features.teacher, grad=False)
            teacher = backbone.objective.prediction(wanted).float()
            found = engine.student.call(arguments, features.student, grad=True)
            student = backbone.objective.prediction(found).float()
            (mse_loss(student, noised.noise) + mse_loss(student, teacher) + 0.5 * features.total()).backward()
        times["by hand"].append(time.perf_counter() - start)
    found = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    pairs = zip(times["engine"][1:], times["by hand"][1:], strict=True)
    return found | {"overhead": statistics.median(a / b for a, b in pairs) - 1}


def memory(folder: Path, kind: str, resolution: int, precision: str) -> dict[str, float]:
    """The most that a process held over two steps, in GB, beside the estimate."""
    code = (
        "import sys, resource; sys.path[:0] = [sys.argv[1]]\n"
        "from edit_core.distill.config import load_config; from edit_core.distill.engine import Engine\n"
        "Engine(load_config(sys.argv[2])).run(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = config(folder, kind, resolution, precision)
    file = folder / f"{kind}.yaml"
    file.write_text(run.model_dump_json())
    empty = "import torch, diffusers.models, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peak, bare = (
        int(
            subprocess.run([sys.executable, "-c", *args], check=True, capture_output=True, text=True).stdout.split()[-1]
        )
        for args in ((code, str(ROOT), str(file)), (empty,))
    )
    return {"peak_gb": (peak - bare) * 1024 / 1e9, "estimate_gb": estimate(run)[0].total / 1e9}


def estimates(folder: Path) -> dict[str, list[str]]:
    """What the shipped configurations will take per process, by the headers of files of the real models' shapes."""
    found = {}
    for backbone in WIDTHS:
        header, end = {}, 0
        for name, tensor in empty_transformer(backbone_named(backbone)).state_dict().items():
            size = 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = folder / backbone / "transformer" / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)  # a hole: nothing is read of it
        for size, world in (("24gb", 1), ("8gpu", 8)):
            run = load_config(f"{backbone}_{size}", [f"model={folder / backbone}"])
            sharded = size == "8gpu" and backbone == "sd35_medium"
            found[f"{backbone}_{size}"] = [str(e) for e in estimate(run, world, sharded)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=None, help="for a quick look; the real number by default")
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="not every CPU computes bfloat16 well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbone", choices=[*WIDTHS], action="append")
    parser.add_argument("--measure", choices=["memory", "overhead"], action="append", help="both by default")
    parser.add_argument("--save", type=Path, default=ROOT / "docs" / "bench_training.json")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.save.read_text()) if options.save.exists() else {}
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as temporary:
        found["estimates"] = estimates(Path(temporary))
    for backbone in options.backbone or WIDTHS:
        with tempfile.TemporaryDirectory(dir=ROOT / "out") as temporary:
            folder = Path(temporary)
            prepare(backbone, folder, options.resolution, options.blocks, DTYPES[options.precision])
            about = {
                "device": device_name(torch.device("cpu")), "torch": torch.__version__, "dtype": options.precision,
                "resolution": options.resolution, "blocks": options.blocks or "all", "batch": 1,
            }  # fmt: skip
            for what in options.measure or ["memory", "overhead"]:
                if what == "memory":
                    result: dict[str, Any] = {
                        kind: memory(folder, kind, options.resolution, options.precision)
                        for kind in ("transfer", "distill")
                    }
                else:
                    result = overhead(folder, options.resolution, options.precision, options.repeats)
                print(backbone, result, flush=True)
                found.setdefault(what, {})[backbone] = about | result
                options.save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
