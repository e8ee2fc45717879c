"""The command line as people and scripts use it."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import comfy, models

from edit_core.backbones import BACKBONES
from edit_core.cli import main
from edit_core.commands import COMMANDS
from edit_core.commands.common import read_prompts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small PixArt-Σ as a file and as a diffusers pipeline's folder, an SD3.5 and files of others."""
    folder = tmp_path_factory.mktemp("bases")
    pixart = models.pixart()
    save_file(pixart.state_dict(), folder / "pixart.safetensors")
    pixart.save_pretrained(folder / "pipeline" / "transformer", max_shard_size="200KB")
    assert len(list((folder / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    prefixed = {f"model.diffusion_model.{key}": value for key, value in models.sd35().state_dict().items()}
    save_file(prefixed, folder / "sd35.safetensors")
    comfy.write_foreign_models(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_command_has_help_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "--json" in out
        assert name == "info" or "(default:" in out
        assert "default: None" not in " ".join(out.split()), name


@pytest.mark.parametrize("source", ["pixart.safetensors", "pipeline", "pipeline/transformer"])
def test_init_then_info_on_a_file_and_on_folders(
    source: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "w.safetensors"
    status, out, _ = run(capsys, "init", base / source, output, "--compression", "2", "--layers", "1", "--json")
    assert status == 0
    made = json.loads(out)
    assert made["backbone"] == "pixart_sigma"
    status, out, _ = run(capsys, "info", output, "--base", base / "pixart.safetensors", "--json")
    data = json.loads(out)
    assert status == 0
    assert (data["blocks"], data["parameters"], data["warning"]) == ("1", made["parameters"], None)
    assert data["config"]["compression"] == 2
    status, out, _ = run(capsys, "info", output, "--base", base / "pixart.safetensors")
    assert "these are untrained" in out
    assert "its own base" in out


def test_info_recognises_base_models_and_their_prefixes(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", base / "sd35.safetensors", "--json")
    data = json.loads(out)
    assert (status, data["backbone"], data["blocks"], data["dim"]) == (0, "sd35_medium", 3, 192)
    _, file, _ = run(capsys, "info", base / "pixart.safetensors", "--json")
    _, folder, _ = run(capsys, "info", base / "pipeline", "--json")
    assert json.loads(file)["base_hash"] == json.loads(folder)["base_hash"]


def test_mistakes_are_one_line_with_status_two(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.safetensors"
    assert run(capsys, "init", base / "pixart.safetensors", weights)[0] == 0
    before = weights.read_bytes()
    other = tmp_path / "o.safetensors"
    cut = tmp_path / "cut.safetensors"
    comfy.cut(weights, cut)
    unmarked, latin = "a fox\n".encode("utf-16-le"), "un caf\xe9\n".encode("cp1252")
    for name, text in (("utf16", unmarked), ("latin", latin), ("blank", b"\n \n"), ("prompts", b"a fox\n")):
        (tmp_path / name).write_bytes(text)
    damaged = tmp_path / "damaged"
    (damaged / "transformer").mkdir(parents=True)
    (damaged / "transformer" / "config.json").write_text("{")
    calibrate = ("calibrate", "--model", damaged, "--output", other, "--prompts")
    for arguments, part in (
        (("init", base / "pixart_normed.safetensors", other), "is a PixArt variant with query/key norms"),
        (("init", base / "flux.safetensors", other), "is FLUX"),
        (("init", base / "none.safetensors", other), "there is no such file"),
        (("init", weights, other), "EDiT weights"),
        (("init", base / "pixart.safetensors", other, "--layers", "0, 9"), "block 9 does not exist"),
        (("init", base / "pixart.safetensors", other, "--layers", "none"), "no weights to make"),
        (("init", base / "pixart.safetensors", other, "--compression", "7"), "does not divide"),
        (("init", base / "pixart.safetensors", weights), "exists already"),
        (("init", base / "pixart.safetensors", other, "--preset", "piecewise"), "kernel=piecewise needs no weights"),
        (("init", base / "pixart.safetensors", tmp_path / "no" / "w.safetensors"), "is not a folder"),
        (("info", weights, "--base", base / "sd35.safetensors"), "but the model is"),
        (("info", cut), "not a complete safetensors file"),
        (("info", base / "flux.safetensors"), "is FLUX"),
        (("bench", "--sizes", "1000"), "multiples of 16"),
        (("bench", "--level", "transformer", "--blocks", "99"), "1 to 28 blocks"),
        (("bench", "--repeats", "0"), "at least 1"),
        (("bench", "--device", "cuda:77"), "cannot be used here"),
        (("bench", "--device", "abacus"), "; choose cpu"),
        (("bench", "--level", "transformer", "--blocks", "1", "--sizes", "64", "--layers", "3-"), "is not a block"),
        (("demo", "--size", "1000"), "multiples of 16"),
        (("demo", "--steps", "0"), "at least 1"),
        ((*calibrate, tmp_path / "none"), "there is no such file of prompts"),
        ((*calibrate, tmp_path / "utf16"), "cannot be read as text (it holds zero bytes"),
        ((*calibrate, tmp_path / "latin"), "cannot be read as text (byte 6 is not UTF-8; save it as UTF-8)"),
        ((*calibrate, tmp_path / "blank"), "holds no prompt"),
        ((*calibrate, tmp_path / "prompts", "--lr", "-1"), "--lr must be a number above 0"),
        ((*calibrate, tmp_path / "prompts", "--lr", "inf"), "--lr must be a number above 0, not inf"),
        ((*calibrate, tmp_path / "prompts", "--guidance", "-2"), "--guidance must be a number above 0, not -2.0"),
        ((*calibrate, tmp_path / "prompts", "--guidance", "nan"), "--guidance must be a number above 0, not nan"),
        ((*calibrate, tmp_path / "prompts"), "config.json: cannot be read"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, ""), (arguments, err)
        lines = [line for line in err.splitlines() if line.startswith("edit_core: ")]
        assert len(lines) == 1, err
        assert part in lines[0]
        assert "Traceback" not in err
    assert weights.read_bytes() == before
    assert not other.exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437"])
def test_output_that_is_not_utf8_loses_no_command(encoding: str, base: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    made = tmp_path / "w.safetensors"
    for arguments in (
        ["info", str(base / "pixart.safetensors")],
        ["init", str(base / "pixart.safetensors"), str(made)],
        ["distill", "--help"],
        ["info", str(tmp_path / "Σ.safetensors")],  # to stderr
    ):
        command = [sys.executable, "-m", "edit_core", *arguments]
        process = subprocess.run(command, capture_output=True, env=environment, cwd=comfy.PACK)
        wrong = arguments[-1].endswith("Σ.safetensors")
        assert process.returncode == (2 if wrong else 0), process.stderr
        assert b"Traceback" not in process.stderr
        text = (process.stderr if wrong else process.stdout).decode(encoding)
        assert len(text) > 20
        if "pixart" in arguments[1]:
            assert ("PixArt-Σ" if encoding == "cp437" else "PixArt-\\u03a3") in text  # of the three, one has a sigma
    assert made.exists()


def test_prompts_are_read_by_their_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes("ein F\xfcchslein\nein B\xe4r\n".encode(encoding))
        assert read_prompts(str(path)) == ("ein F\xfcchslein", "ein B\xe4r"), encoding
    path.write_bytes(codecs.BOM_UTF16_BE + "狐".encode("utf-16-be"))
    assert read_prompts(str(path)) == ("狐",)


def test_bad_usage_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["distill", "--config", "debug", "seed=1", "--resume", "latest", "--colour"]
    for arguments in ([], ["dream"], ["init"], ["bench", "--dtype", "int4"], ["info", "a", "b"], bad):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_fields_may_stand_before_and_behind_any_option(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "seed=1", "--config", "debug", "ema=0.5", "--estimate", "model=/nowhere", "ema=0.6"]
    status, _, err = run(capsys, *command)
    assert (status, "/nowhere: there is no such file" in err) == (2, True), err
    assert run(capsys, *command, "ema=7")[2].startswith("edit_core: debug: ema: ")


@pytest.mark.slow
def test_bench_measures_both_models_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "bench.json"
    status, out, _ = run(
        capsys, "bench", "--level", "transformer", "--contenders", "teacher", "paper", "--blocks", 1, "--sizes", 128,
        "--repeats", 2, "--dtype", "bfloat16", "--save", saved,
    )  # fmt: skip
    assert status == 0
    assert "| PixArt-Σ, 1 block | 128² | 64 |" in out
    measured = json.loads(saved.read_text())
    assert [m["backbone"] for m in measured] == [*BACKBONES]
    for m in measured:
        assert len(m["seconds"]["teacher"]) == len(m["seconds"]["paper"]) == 2
        assert m["dtype"] == "bfloat16"
        assert m["speed"]["paper"] > 0


def test_demo_draws_with_teacher_and_student_and_restores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    options = ("--size", 128, "--pictures", 2, "--steps", 2, "--output", tmp_path / "out", "--json")
    status, out, _ = run(capsys, "demo", *options)
    assert status == 0
    for row in json.loads(out):
        assert row["restored"] is True
        for who in ("teacher", "student", "piecewise"):
            assert min(row[name][who] for name in ("picture", "call", "large")) > 0
            assert 0 <= row["right"][who] <= 1
        assert Image.open(row["sheet"]).size == (260, 524)


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    assert run(capsys, "info", "x") == (130, "", "edit_core: stopped\n")


def test_memory_that_does_not_suffice_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more")

    monkeypatch.setattr(COMMANDS["info"], "run", too_large)
    status, out, err = run(capsys, "info", "x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "memory does not suffice (CUDA out of memory. Tried to allocate 20.00 GiB." in err


def test_the_package_needs_only_torch_safetensors_and_einops(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('diffusers', 'transformers', 'accelerate', 'comfy', 'PIL', 'tqdm'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from edit_core.cli import main\n"
        "import edit_core.attention.naive\n"
        "raise SystemExit(main(['bench']))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert "this needs diffusers and accelerate" in process.stderr
