"""The evaluation of a student: the metrics against independent formulas, the sampling against diffusers' own, the
command from end to end on small models."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support import models, pipelines, training
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from edit_core import EDiTWeights, apply_edit
from edit_core.backbones import BACKBONES
from edit_core.cli import main
from edit_core.distill import evaluate, picture_features, picture_metrics
from edit_core.distill.cache import build_cache
from edit_core.distill.dataset import CachedLatents
from edit_core.distill.distance import teacher_distance
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.eval_page import chart, table
from edit_core.distill.evaluate import cached_batches
from edit_core.distill.losses import dense_tap
from edit_core.distill.picture_features import ClipFeatures
from edit_core.distill.picture_metrics import clip_score, cmmd, fid, latent_cosine, lpips, psnr, ssim
from edit_core.distill.sampling import Sampler, grid
from edit_core.distill.sources import FolderSource
from edit_core.distill.teacher import load_teacher

CPU = torch.device("cpu")
PROMPTS = ["a red fox in the snow", "two ships at sea"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Per backbone, a pipeline's folder, a student for it and a file of prompts; made on first use."""
    made: dict[str, dict[str, Path]] = {}

    def get(backbone: str) -> dict[str, Path]:
        if backbone not in made:
            folder = tmp_path_factory.mktemp(backbone)
            model = pipelines.build(backbone, folder / "model")
            models.trained_like(load_teacher(model, torch.float32, CPU)).save(folder / "student.safetensors")
            (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
            made[backbone] = {
                "model": model,
                "weights": folder / "student.safetensors",
                "prompts": folder / "prompts.txt",
            }
        return made[backbone]

    return get


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 8 features, of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = pipelines.clip_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(7)
    config = CLIPConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8}, projection_dim=8)
    model = CLIPModel(config).eval()
    models.randomise(model, 8)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def arguments(paths: dict[str, Path], output: Path, *more: str) -> list[str]:
    small = ["--size", "64", "--steps", "2", "--batch", "2", "--device", "cpu", "--json"]
    named = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["eval", *named, "--output", str(output), *small, *more]


def run(capsys: Any, words: list[str]) -> dict[str, Any]:
    assert main(words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def conditions(model: Path, prompts: list[str]) -> dict[str, torch.Tensor]:
    return PipelineEncoder(model, CPU, torch.float32).encode_prompts(prompts)


# --- metrics ---


def test_psnr_is_ten_times_the_logarithm_of_peak_over_mean_square() -> None:
    a, b = pixels(20, 24, 3, seed=1), pixels(20, 24, 3, seed=2)
    mean_square = ((a.numpy().astype(float) - b.numpy().astype(float)) ** 2).mean()
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / mean_square), rel=1e-6)
    assert psnr(a, a) == math.inf


def test_ssim_is_one_for_equal_pictures_and_the_closed_form_for_flat_ones() -> None:
    a = pixels(32, 32, 3)
    assert ssim(a, a) == pytest.approx(1.0)
    slightly = (a.int() + pixels(32, 32, 3, seed=1) // 16).clamp(max=255).byte()
    assert -1 <= ssim(a, pixels(32, 32, 3, seed=2)) < ssim(a, slightly) < 1
    x, y = 50 / 255, 200 / 255
    flat = ssim(torch.full((32, 32, 3), 50, dtype=torch.uint8), torch.full((32, 32, 3), 200, dtype=torch.uint8))
    assert flat == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), rel=1e-4)


def test_the_cosine_of_latents_knows_direction_and_not_length() -> None:
    a, b = torch.randn(4, 6, 6), torch.randn(4, 6, 6)
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert latent_cosine(a, b) == pytest.approx(expected, abs=1e-6)
    assert latent_cosine(a, -3 * a) == pytest.approx(-1)


def test_cmmd_is_the_double_loop_over_normalised_features() -> None:
    x, y = 3 * torch.randn(7, 5), torch.randn(9, 5) + 0.5

    def kernel(left: Any, right: Any) -> float:
        total = 0.0
        for a in left.double().numpy():
            for b in right.double().numpy():
                difference = a / np.linalg.norm(a) - b / np.linalg.norm(b)
                total += math.exp(-float(difference @ difference) / (2 * 10**2))
        return total / (len(left) * len(right))

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 0.1
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x[torch.randperm(7)]) == pytest.approx(0, abs=1e-10)


def test_cmmd_of_many_pictures_is_that_of_all_pairs_at_once() -> None:
    x, y = torch.randn(1500, 3).double(), torch.randn(1100, 3).double() + 1
    a, b = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    means = [(-torch.cdist(p, q).square() / 200).exp().mean() for p, q in ((a, a), (b, b), (a, b))]
    assert cmmd(x, y) == pytest.approx(1000 * float(means[0] + means[1] - 2 * means[2]), rel=1e-6)


def test_fid_is_the_distance_of_two_gaussians() -> None:
    x = torch.randn(200, 6).double() @ torch.randn(6, 6).double()
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    covariance = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    mean, scale, shift = x.mean(0), 1.7, torch.arange(6).double()
    # of x and s·x + t: covariances Σ and s²Σ commute, so that tr(Σ + s²Σ - 2sΣ) = (1-s)² tr Σ
    expected = float((mean - (scale * mean + shift)).square().sum() + (1 - scale) ** 2 * covariance.trace())
    assert fid(x, scale * x + shift) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("pictures", "dim"), [(2, 64), (5, 300), (300, 20)])
def test_fid_of_a_set_with_itself_is_not_below_zero(pictures: int, dim: int) -> None:
    for seed in range(4):
        x = 30 * torch.randn(pictures, dim, generator=torch.Generator().manual_seed(seed))
        assert 0 <= fid(x, x) < 1e-2


def test_clips_features_and_score_are_what_the_model_itself_compares(clip_folder: Path) -> None:
    clip, pictures = ClipFeatures(clip_folder, CPU), pixels(2, 48, 48, 3)
    images, texts = clip.images(pictures), clip.texts(PROMPTS)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(images=list(pictures.numpy()), text=PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert images.shape == texts.shape == (2, clip.dim)
    assert clip_score(images, texts) == pytest.approx(max(0.0, 100 * float(logits.diag().mean())), rel=1e-4)
    assert clip_score(images, images) == pytest.approx(100, rel=1e-6)
    assert clip_score(images, -images) == 0
    assert clip.texts(["a red fox " * 100]).shape == (1, 8), "a long prompt is cut"


def test_lpips_says_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_metrics.importlib.util, "find_spec", lambda name: None)
    assert lpips(512) == (None, "torchvision is not installed")


# --- sampling ---


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_the_sampler_draws_what_the_whole_pipeline_draws(backbone: str, teachers: Any) -> None:
    model = teachers(backbone)["model"]
    transformer = load_teacher(model, torch.float32, CPU)
    sampler = Sampler(model, transformer)
    encoded, negative = conditions(model, PROMPTS), conditions(model, [""])
    latents = sampler.draw(encoded, negative, [3, 4], 8, 10, steps=3, guidance=4.0)
    whole = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    extra = {"use_resolution_binning": False} if backbone == "pixart_sigma" else {}
    expected = whole(
        PROMPTS, negative_prompt=["", ""], num_inference_steps=3, guidance_scale=4.0, height=64, width=80,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], output_type="np", **extra,
    ).images  # fmt: skip
    drawn = sampler.decode(latents)
    assert latents.shape == (2, transformer.config.in_channels, 8, 10)
    assert drawn.shape == (2, 64, 80, 3) and drawn.dtype == torch.uint8
    assert np.abs(drawn.numpy() - expected * 255).max() < 1
    alone = {name: value[1:] for name, value in encoded.items()}
    again = sampler.draw(alone, negative, [4], 8, 10, steps=3, guidance=4.0)
    assert models.relative_error(again[0], latents[1]) < 1e-4, "a picture depends on its neighbours"
    unguided = [sampler.draw(encoded, other, [3, 4], 8, 10, steps=2, guidance=1.0) for other in (negative, alone)]
    assert torch.equal(*unguided), "without guidance the negative prompt plays a part"


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_the_sampler_works_under_autocast_with_a_student_in_float32(backbone: str, teachers: Any) -> None:
    paths = teachers(backbone)
    transformer = load_teacher(paths["model"], torch.bfloat16, CPU)
    sampler = Sampler(paths["model"], transformer)
    encoded, negative = conditions(paths["model"], PROMPTS[:1]), conditions(paths["model"], [""])
    with apply_edit(transformer, EDiTWeights.load(paths["weights"])) as handle:
        handle.sides.float()
        with torch.autocast("cpu", torch.bfloat16):
            latents = sampler.draw(encoded, negative, [0], 8, 8, steps=2, guidance=4.0)
            inside = sampler.decode(latents)
    assert latents.dtype == torch.float32 and bool(latents.isfinite().all())
    assert torch.equal(inside, sampler.decode(latents)), "the VAE worked in another dtype"


def test_a_grid_has_its_rows_above_each_other() -> None:
    teacher, student = pixels(3, 5, 7, 3, seed=1), pixels(3, 5, 7, 3, seed=2)
    sheet = np.array(grid([teacher, student]))
    assert sheet.shape == (2 * 5 + 4, 3 * 7 + 8, 3)
    assert np.array_equal(sheet[:5, 11:18], teacher[1].numpy())
    assert np.array_equal(sheet[9:, 22:], student[2].numpy())
    assert (sheet[5:9] == 255).all()


# --- the command ---


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_a_rerun_from_the_json_alone_gives_the_same_scores(
    backbone: str, teachers: Any, clip_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    paths = teachers(backbone)
    real = training.draw_images(tmp_path / "real", 3)
    sets = ["--clip", str(clip_folder), "--images", str(real)]
    more = ["--seeds", "2", "--seed", "5", "--guidance", "3", "--layers", "0-1", "--samples", "3", *sets]
    report = run(capsys, arguments(paths, tmp_path / "one", *more))
    scores, settings = report["scores"], report["settings"]
    assert json.loads((tmp_path / "one" / "eval.json").read_text()) == report
    assert [picture["seed"] for picture in report["pictures"]] == [5, 6, 7, 8]
    assert [picture["prompt"] for picture in report["pictures"]] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert set(scores["cmmd"]) == set(scores["fid_clip"]) == {"teacher_student", "teacher_real", "student_real"}
    assert report["data"]["images"]["count"] == 3
    assert {key.split(".")[0] for key in scores["attentions"]} == {"0", "1"}
    assert 0 < scores["ssim"] < 1 and scores["psnr"] > 0 and scores["attention_error"] > 0
    assert set(report["absent"]) == {"lpips", "fid_inception"} or scores["lpips"] is not None
    assert any("covariance" in note for note in report["notes"])
    clip = ClipFeatures(clip_folder, CPU)
    for who, score in scores["clip_score"].items():
        files = [tmp_path / "one" / picture["files"][who] for picture in report["pictures"]]
        images = clip.images(torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]))
        assert score == pytest.approx(
            clip_score(images, clip.texts([p["prompt"] for p in report["pictures"]])), abs=1e-3
        )

    prompts = tmp_path / "again.txt"
    prompts.write_text("\n".join(settings["prompts"]))
    words = ["eval", "--model", str(paths["model"]), "--weights", str(paths["weights"]), "--prompts", str(prompts)]
    words += ["--output", str(tmp_path / "two"), "--json", *sets]
    names = ["seed", "seeds", "steps", "guidance", "size", "batch", "samples", "layers", "dtype", "device"]
    again = run(capsys, [*words, *(word for name in names for word in (f"--{name}", str(settings[name])))])
    assert set(settings) == {*names, "prompts", "resolution"}, "a setting that a rerun does not know"
    assert json.dumps(again["scores"]) == json.dumps(scores)
    first, second = ({**r, "seconds": None} for r in (report, again))
    assert first == second


def test_the_files_hold_what_was_measured_and_no_path_of_this_machine(
    teachers: Any, clip_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    paths, output = teachers("sd35_medium"), tmp_path / "out"
    report = run(capsys, arguments(paths, output, "--clip", str(clip_folder)))
    for picture in report["pictures"]:
        images = {name: np.array(Image.open(output / file)).astype(int) for name, file in picture["files"].items()}
        assert images["teacher"].shape == (64, 64, 3)
        error = np.abs(images["student"] - images["teacher"])
        assert picture["psnr"] == pytest.approx(10 * math.log10(255**2 / (error**2).mean()), rel=1e-6)
        assert np.array_equal(images["difference"], np.minimum(4 * error, 255))
    means = {name: np.mean([picture[name] for picture in report["pictures"]]) for name in ("psnr", "ssim")}
    assert means == pytest.approx({name: report["scores"][name] for name in means})
    sheet = np.array(Image.open(output / "grid.png"))
    assert np.array_equal(sheet[:64, :64], np.array(Image.open(output / "pictures" / "00000_teacher.png")))
    assert np.array_equal(sheet[68:, 68:], np.array(Image.open(output / "pictures" / "00001_student.png")))

    page, data = (output / "index.html").read_text(), (output / "eval.json").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) == 2 * 3 * 2 and all((output / link).is_file() for link in links)
    assert "<script" not in page and all(prompt in page for prompt in PROMPTS)
    for path in (tmp_path, paths["model"], clip_folder, Path.home(), Path.cwd()):
        assert str(path) not in page and str(path) not in data
    assert report["weights"]["sha256"] in data and report["weights"]["sha256"][:16] in page


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_attention_that_needs_no_weights_is_compared_like_a_student(
    backbone: str, teachers: Any, tmp_path: Path, capsys: Any
) -> None:
    paths = {name: path for name, path in teachers(backbone).items() if name != "weights"}
    found = {}
    for quality, asked in (("balanced", []), ("fast", ["--quality", "fast"])):
        words = arguments(paths, tmp_path / quality, "--preset", "piecewise", "--size", "256", *asked)
        report = found[quality] = run(capsys, words)
        weights = report["weights"]
        assert (weights["sha256"], weights["preset"], weights["config"]["quality"]) == (None, "piecewise", quality)
        page = (tmp_path / quality / "index.html").read_text()
        assert f"the student is piecewise attention, quality {quality}, without weights" in page
        assert "weights none" in page and "without weights" in table(report)
    errors = [found[quality]["scores"]["prediction_error"] for quality in ("balanced", "fast")]
    assert 0 < errors[0] < errors[1]


def test_a_student_of_no_layers_is_its_teacher(teachers: Any, clip_folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = ["--layers", "none", "--dtype", "bfloat16", "--clip", str(clip_folder)]
    report = run(capsys, arguments(teachers("pixart_sigma"), tmp_path / "out", *more))
    scores = report["scores"]
    assert scores["psnr"] is None and "infinite" in report["absent"]["psnr"]
    assert scores["ssim"] == pytest.approx(1) and scores["latent_cosine"] == pytest.approx(1)
    assert scores["prediction_error"] == 0 and scores["attentions"] == {} and scores["attention_error"] is None
    assert scores["cmmd"]["teacher_student"] == pytest.approx(0, abs=1e-9)
    assert scores["fid_clip"]["teacher_student"] == pytest.approx(0, abs=1e-5)
    assert scores["clip_score"]["teacher"] == scores["clip_score"]["student"]
    assert report["weights"]["blocks"] == "none"


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_errors_grow_as_weights_are_disturbed(backbone: str, teachers: Any, tmp_path: Path, capsys: Any) -> None:
    paths = teachers(backbone)
    weights = EDiTWeights.init(load_teacher(paths["model"], torch.float32, CPU))
    found = []
    for size in (0.0, 0.3, 3.0):
        generator = torch.Generator().manual_seed(1)
        for name, tensor in weights.tensors.items():
            weights.tensors[name] = tensor + size * torch.randn(tensor.shape, generator=generator)
        weights.save(tmp_path / f"{size}.safetensors")
        words = arguments({**paths, "weights": tmp_path / f"{size}.safetensors"}, tmp_path / f"out{size}")
        found.append(run(capsys, words)["scores"])
    for name, sign in (("attention_error", 1), ("prediction_error", 1), ("psnr", -1), ("ssim", -1)):
        values = [sign * scores[name] for scores in found]
        assert values[0] < values[1] < values[2], name


def test_teacher_and_student_draw_in_turns_the_student_with_edit(
    teachers: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any, int]] = []
    original, handles = Sampler.draw, []

    def apply(*args: Any) -> Any:
        handles.append(apply_edit(*args))
        return handles[-1]

    def draw(self: Sampler, condition: Any, negative: Any, seeds: Any, *args: Any) -> Any:
        seen.append((handles[0].tap, list(seeds), args[2]))
        return original(self, condition, negative, seeds, *args)

    distances = []

    def distance(transformer: Any, handle: Any, backbone: Any, batches: Any, seed: int) -> Any:
        distances.append(seed)
        return teacher_distance(transformer, handle, backbone, batches, seed)

    monkeypatch.setattr("edit_core.commands.eval.apply_edit", apply)
    monkeypatch.setattr(Sampler, "draw", draw)
    monkeypatch.setattr(evaluate, "teacher_distance", distance)
    report = run(capsys, arguments(teachers("pixart_sigma"), tmp_path / "out", "--batch", "1"))
    assert seen[:2] == [(dense_tap, [0], 1), (None, [0], 1)], "the first calls are not timed"
    assert seen[2:] == [(dense_tap, [0], 2), (None, [0], 2), (dense_tap, [1], 2), (None, [1], 2)]
    assert len(report["seconds"]["teacher"]) == len(report["seconds"]["student"]) == 2
    assert all(seed + i > 1 for seed in distances for i in range(2)), "latents noised with what they were drawn from"


def test_attentions_are_compared_on_what_the_teacher_drew(teachers: Any, tmp_path: Path, capsys: Any) -> None:
    paths = teachers("pixart_sigma")
    report = run(capsys, arguments(paths, tmp_path / "out", "--seed", "9", "--guidance", "2", "--samples", "1"))
    encoded, negative = conditions(paths["model"], PROMPTS[:1]), conditions(paths["model"], [""])
    transformer = load_teacher(paths["model"], torch.float32, CPU)
    latent = Sampler(paths["model"], transformer).draw(encoded, negative, [9], 8, 8, steps=2, guidance=2.0)
    with apply_edit(transformer, EDiTWeights.load(paths["weights"])) as handle:
        expected = teacher_distance(
            transformer, handle, BACKBONES["pixart_sigma"], [{"latent": latent, **encoded}], seed=(1 << 32) + 9
        )
    assert report["scores"]["attentions"] == pytest.approx(expected.attentions, rel=1e-5)
    assert report["scores"]["prediction_error"] == pytest.approx(expected.prediction, rel=1e-5)


def test_a_damaged_real_image_is_named_before_anything_is_drawn(
    teachers: Any, clip_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "cut.png").write_bytes(b"\x89PNG\r\n")
    more = ["--clip", str(clip_folder), "--images", str(tmp_path / "real")]
    assert main(arguments(teachers("pixart_sigma"), tmp_path / "out", *more)) == 2
    assert "cut.png: this image cannot be read" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_attentions_are_compared_on_a_caches_latents(teachers: Any, tmp_path: Path, capsys: Any) -> None:
    paths = teachers("pixart_sigma")
    encoder = PipelineEncoder(paths["model"], CPU, torch.float32)
    source = FolderSource(training.draw_images(tmp_path / "images", 6))
    build_cache(source, encoder, tmp_path / "cache", [64], bucket_step=16)
    data = CachedLatents(tmp_path / "cache", 64)
    assert len(data.buckets) == 2
    batches = cached_batches(data, 4, 2)
    spans = [[batch["latent"].shape[2:] for batch in batches], [len(batch["latent"]) for batch in batches]]
    assert sum(spans[1]) == 4 and set(spans[0]) == set(data.buckets) and max(spans[1]) <= 2
    more = ["--cache", str(tmp_path / "cache"), "--samples", "4", "--layers", "1"]
    report = run(capsys, arguments(paths, tmp_path / "out", *more))
    transformer = load_teacher(paths["model"], torch.float32, CPU)
    with apply_edit(transformer, EDiTWeights.load(paths["weights"]), "1") as handle:
        expected = teacher_distance(transformer, handle, BACKBONES["pixart_sigma"], batches, seed=1 << 32)
    assert report["scores"]["attentions"] == pytest.approx(expected.attentions)
    assert report["scores"]["prediction_error"] == pytest.approx(expected.prediction)
    assert report["settings"]["resolution"] == 64
    assert report["data"]["cache"] == CachedLatents.describe(tmp_path / "cache")
    words = arguments(teachers("sd35_medium"), tmp_path / "other", "--cache", str(tmp_path / "cache"))
    assert main(words) == 2 and "was made for pixart_sigma" in capsys.readouterr().err


def test_ctrl_c_leaves_whole_pictures_and_no_scores_and_the_folder_can_be_used_again(
    teachers: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(teachers("pixart_sigma"), tmp_path / "out", "--batch", "1")
    decode, calls = Sampler.decode, []

    def interrupted(self: Sampler, latents: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second student's
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "decode", interrupted)
        assert main(words) == 130
    files = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == ["00000_difference.png", "00000_student.png", "00000_teacher.png"]
    capsys.readouterr()
    run(capsys, words)
    assert main(words) == 2
    assert "holds an eval.json already" in capsys.readouterr().err


def test_a_student_whose_numbers_overflow_is_named(teachers: Any, tmp_path: Path, capsys: Any) -> None:
    paths = teachers("pixart_sigma")
    weights = EDiTWeights.load(paths["weights"])
    for name in weights.tensors:
        weights.tensors[name] = weights.tensors[name] * math.inf
    weights.save(tmp_path / "inf.safetensors")
    assert main(arguments({**paths, "weights": tmp_path / "inf.safetensors"}, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "student's picture of 'a red fox in the snow' (seed 0) is not finite in float32" in message
    assert not (tmp_path / "out" / "eval.json").exists()


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"weights": "missing.safetensors"}, [], "there is no such file"),
        ({}, ["--preset", "piecewise"], "give either --weights FILE or --preset piecewise, which needs no weights"),
        ({}, ["--quality", "fast"], "--quality is of --preset piecewise"),
        ({"weights": "OTHER"}, [], "these EDiT weights are for PixArt-Σ, but the model is Stable Diffusion 3.5"),
        ({"model": "missing"}, [], "there is no such file, nor a diffusers folder"),
        ({"prompts": "missing.txt"}, [], "there is no such file of prompts"),
        ({"prompts": "EMPTY"}, [], "holds no prompt"),
        ({"clip": "missing"}, [], "not a CLIP's folder"),
        ({"cache": "missing"}, [], "not a cache"),
        ({"inception": "missing.pth"}, [], "there is no such file of Inception weights"),
        ({"images": "missing", "clip": "CLIP"}, [], "there is no such folder of images"),
        ({"images": "missing"}, [], "--images is compared in the features"),
        ({}, ["--size", "72"], "must be multiples of 16"),
        ({}, ["--size", "784"], "at most 768 pixels"),
        ({}, ["--steps", "0"], "--steps must be at least 1"),
        ({}, ["--guidance", "-2"], "--guidance must be a number from 0 on, not -2.0"),
        ({}, ["--guidance", "nan"], "--guidance must be a number from 0 on, not nan"),
        ({}, ["--seed", "-1"], "--seed must be from 0"),
        ({}, ["--resolution", "64"], "give --cache too"),
        ({}, ["--layers", "7"], "block 7 does not exist"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_is_drawn(
    changes: dict[str, str], words: list[str], message: str, teachers: Any, clip_folder: Path, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").write_text(" \n\n")
    special = {
        "OTHER": teachers("pixart_sigma")["weights"],
        "EMPTY": tmp_path / "empty.txt",
        "CLIP": clip_folder,
    }
    paths = {name: special.get(value, tmp_path / value) for name, value in changes.items()}
    assert main(arguments({**teachers("sd35_medium"), **paths}, tmp_path / "out", *words)) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors and "\n" not in errors
    assert not (tmp_path / "out").exists()


def test_inception_weights_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"weight": Hostile()}, tmp_path / "hostile.pth")
    find = picture_features.importlib.util.find_spec
    monkeypatch.setattr(
        picture_features.importlib.util, "find_spec", lambda name: name if name == "torch_fidelity" else find(name)
    )
    with pytest.raises(ValueError, match="not torch-fidelity's Inception weights"):
        picture_features.InceptionFeatures(tmp_path / "hostile.pth", CPU)
    assert not (tmp_path / "ran").exists()


def test_inception_without_torch_fidelity_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_features.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "inception.pth").touch()
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        picture_features.InceptionFeatures(tmp_path / "inception.pth", CPU)


def test_the_chart_has_a_bar_per_attention_as_long_as_its_error() -> None:
    root = xml.etree.ElementTree.fromstring(chart({"10.self": 0.5, "2.joint": 0.25, "2.self": 0.1}))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{space}rect")]
    labels = [text.text for text in root.iter(f"{space}text")]
    assert labels == ["2.joint", "0.25", "2.self", "0.1", "10.self", "0.5"]
    assert [width / widths[2] for width in widths] == pytest.approx([0.5, 0.2, 1.0], abs=1e-3)
