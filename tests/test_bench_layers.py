"""The benchmark: contenders, tables, plots, files and checks, at sizes that say nothing about speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from torch import Tensor

from edit_core import EDiTConfig, apply_edit, crossover
from edit_core.attention import EDiTAttention
from edit_core.backbones import BACKBONES, Backbone
from edit_core.bench import CONTENDERS, Measurement, draw, measure, table, verify
from edit_core.bench import contenders as contenders_module
from edit_core.bench.contenders import SoftmaxProcessor, contender, install, processors
from edit_core.bench.report import series
from edit_core.bench.subjects import layer, transformer
from edit_core.bench.timing import peak_memory
from edit_core.cli import main
from edit_core.errors import EDiTConfigError, EDiTError, EDiTResultError
from edit_core.kernels import choice

CPU = torch.device("cpu")
PIXART_HERE = crossover.key("pixart_sigma", torch.float32, CPU)
HERE = [name for name in CONTENDERS if name not in ("sage", "flash_attn")]
SMALL = ("--backbone", "pixart_sigma", "--sizes", "64", "--repeats", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def measured(tokens: int = 64, **seconds: list[float]) -> Measurement:
    return Measurement(
        level="layer", backbone="pixart_sigma", side=16 * int(tokens**0.5), tokens=tokens, batch=1, blocks=1,
        dtype="float32", device="an abacus", backend="beads", versions={"PyTorch": "0"}, seconds=seconds,
    )  # fmt: skip


@pytest.mark.parametrize("backbone", models.PIXART_FIRST)
def test_a_layers_contenders_are_timed_weighed_and_named(backbone: str) -> None:
    *_, last = measure("layer", BACKBONES[backbone], 64, 2, torch.float32, CPU, 2, CONTENDERS, optional=True)
    assert set(last.seconds) | set(last.missing) == set(CONTENDERS)
    assert set(HERE) <= set(last.seconds)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in last.seconds.values())
    assert all(last.peak[name] > 4 * 2 * 16 * 1152 for name in last.seconds)  # at least one output
    text = table([last])
    for part in ("flash_attention", "float32", f"PyTorch {torch.__version__}", "| 64² | 16 | 2 |", "threads"):
        assert part in text
    for title in ("teacher", "EDiT", "EDiT, local", "SANA-style", "LinFusion", "KV compression", "the limit"):
        assert f"| {title} |" in text
    for reason in last.missing.values():
        assert f"Left out: {reason}." in text


def test_a_transformers_contenders_are_timed_on_as_many_blocks_as_asked_for() -> None:
    names = ["teacher", "paper:compression=8", "limit"]
    *_, last = measure("transformer", BACKBONES["sd35_medium"], 64, 1, torch.float32, CPU, 1, names, blocks=1)
    assert (last.blocks, list(last.seconds)) == (1, names)
    assert "| EDiT:compression=8 |" in table([last])


def test_the_command_saves_plots_verifies_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    saved, plotted = tmp_path / "b.json", tmp_path / "b.png"
    status, out, _ = run(
        capsys, "--backbone", "pixart_sigma", "--sizes", 64, 128, "--repeats", 2, "--contenders", "teacher", "paper",
        "limit", "--save", saved, "--plot", plotted, "--verify",
    )  # fmt: skip
    assert status == 0
    data = json.loads(saved.read_text())
    read = [Measurement.from_json(m) for m in data]
    assert [m.to_json() for m in read] == data
    assert table(read) == out.rstrip("\n")
    assert [m.tokens for m in read] == [16, 64]
    assert 0 < read[0].errors["paper"] < 1e-4
    for column in ("exponent", "of the limit", "memory of a call, GB", "error"):
        assert column in out
    image = Image.open(plotted)
    assert image.format == "PNG"
    assert len(image.getcolors(1 << 20) or ()) > 4


def test_the_readmes_preset_measures_layers_up_to_65536_tokens_and_transformers_at_two_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []

    def stand_in(level: str, backbone: Backbone, side: int, batch: int, dtype: torch.dtype, device: torch.device,
                 repeats: int, names: list[str], optional: bool, **part: Any) -> Any:  # fmt: skip
        assert not optional
        asked.append((level, backbone.name, side, batch, dtype, repeats, *part.values()))
        seconds = {name: [side / 1000 * len(name)] for name in names}
        yield dataclasses.replace(measured(side * side // 256, **seconds), backbone=backbone.name, level=level)

    monkeypatch.setattr("edit_core.commands.bench.measure", stand_in)
    saved, plotted = tmp_path / "b.json", tmp_path / "b.png"
    status, out, _ = run(capsys, "--preset", "readme", "--save", saved, "--plot", plotted)
    assert status == 0
    assert asked == [
        *(("layer", name, side, 1, torch.float32, 3) for name in models.SHIPPED for side in (1024, 2048)),
        *(("layer", name, 4096, 1, torch.float32, 2) for name in models.SHIPPED),
        *(("transformer", name, 1024, 1, torch.float32, 3, 2, "all") for name in models.SHIPPED),
        *(("transformer", name, 2048, 1, torch.float32, 2, 1, "all") for name in models.SHIPPED),
    ]
    assert len(json.loads(saved.read_text())) == 5 * len(models.SHIPPED)
    assert plotted.read_bytes().startswith(b"\x89PNG")
    for title, sizes in (("teacher", 4), ("EDiT, local", 5), ("piecewise", 5), ("LinFusion", 2), ("the limit", 5)):
        assert out.count(f"| {title} |") == sizes * len(models.SHIPPED)
    asked.clear()
    assert run(capsys, "--preset", "readme", "--blocks", 28)[0] == 0
    assert asked[-1][-2:] == (28, "all")


def test_crossovers_are_measured_kept_and_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, caplog: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = models.make("pixart_sigma")
    weights = models.trained_like(model)
    crossover._say.cache_clear()
    for _ in range(2):
        with apply_edit(model, weights, min_tokens="auto") as handle:
            assert handle.min_tokens == 0
    assert [record.message for record in caplog.records if "bench --crossover" in record.message] == [
        f"EDiT: min_tokens=auto: always linear, since no crossover was measured for {PIXART_HERE}; "
        "python -m edit_core bench --crossover does"
    ]

    def stand_in(level: str, backbone: Backbone, side: int, *args: Any, **part: Any) -> Any:
        tokens = side * side // 256
        yield dataclasses.replace(
            measured(tokens, teacher=[tokens / 1000], local=[1.0 if backbone.name == "pixart_sigma" else 99.0]),
            backbone=backbone.name,
        )

    monkeypatch.setattr("edit_core.commands.bench.measure", stand_in)
    status, out, _ = run(capsys, "--crossover")
    assert status == 0
    kept = json.loads((tmp_path / "edit-attention" / "crossover.json").read_text())
    others = {PIXART_HERE.replace("pixart_sigma", name): 16385 for name in models.BACKBONES if name != "pixart_sigma"}
    assert kept == {PIXART_HERE: 1024, **others}
    assert all(f"{name}: {tokens} tokens" in out for name, tokens in kept.items())
    with torch.no_grad():
        dense = [models.forward(model, 34, 40), models.forward(model, 64, 64)]
        with apply_edit(model, weights, min_tokens="auto"):
            found = [models.forward(model, 34, 40), models.forward(model, 64, 64)]
    assert torch.equal(found[0], dense[0])  # 340 tokens
    assert not torch.equal(found[1], dense[1])  # 1024
    assert run(capsys, "--crossover", "--backbone", "pixart_sigma", "--sizes", 1024)[0] == 0
    kept = json.loads((tmp_path / "edit-attention" / "crossover.json").read_text())
    assert kept == {PIXART_HERE: 4096, **others}, "the others' stay"


def test_a_damaged_cache_of_crossovers_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "edit-attention" / "crossover.json"
    path.parent.mkdir()
    model = models.make("pixart_sigma")
    for text in ("{", "[1]", '{"a": -1}', '{"a": "b"}'):
        path.write_text(text)
        status, out, err = run(capsys, "--crossover")
        assert (status, out) == (2, "")
        assert str(path) in err
        assert err.count("\n") == 1
        with pytest.raises(EDiTError, match="crossover"):
            apply_edit(model, models.trained_like(model), min_tokens="auto")
        with apply_edit(model, models.trained_like(model), min_tokens=5):  # needs no cache
            pass
    for bad in (-1, 1.5, "always", True):
        with pytest.raises(EDiTError, match="min_tokens must be"):
            apply_edit(model, models.trained_like(model), min_tokens=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("home", ["none", "of no use"])
def test_a_user_without_a_home_has_measured_nothing(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in containers that run under some other user's number, or with another user's home."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    if home == "none":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / ("n" * 300)))
    model = models.make("pixart_sigma")
    with apply_edit(model, models.trained_like(model), min_tokens="auto") as handle:
        assert handle.min_tokens == 0
    assert choice._load() == {}


def test_crossovers_are_where_the_student_stays_ahead() -> None:
    assert crossover.crossover_of({256: 0.5, 1024: 1.1, 4096: 2.0}) == 1024
    assert crossover.crossover_of({256: 1.2, 1024: 0.9, 4096: 2.0}) == 4096
    assert crossover.crossover_of({256: 1.2, 1024: 1.3}) == 256
    assert crossover.crossover_of({256: 0.2, 1024: 0.9}) == 1025


def test_the_limit_and_other_kernels_compute_what_they_say() -> None:
    """With a softmax of our own between the base's linears, a layer gives what the base's processors give."""

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for backbone in models.BACKBONES:
        subject = layer(BACKBONES[backbone], (3, 4), 2, torch.float32, CPU, prompt=5)
        own = [attention.processor for attention in subject.attentions]
        with torch.inference_mode():
            wanted = subject.call()
            install(subject.attentions, [SoftmaxProcessor(softmax)] * len(own))
            for actual, expected in zip(subject.call(), wanted, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            install(subject.attentions, [SoftmaxProcessor(None)] * len(own))
            x, rows = subject.inputs["x"], subject.call()  # the image's of a joint attention come first
            for attention, actual in zip(subject.attentions, (rows[0], rows[-1]), strict=False):
                torch.testing.assert_close(actual, attention.to_out[0](attention.to_v(x)))


def test_students_are_exchanged_without_a_trace() -> None:
    subject = transformer(BACKBONES["pixart_sigma"], 64, 1, torch.float32, CPU, blocks=2, layers="1")
    assert len(subject.attentions) == 1
    own = [attention.processor for attention in subject.attentions]
    with torch.inference_mode():
        before = subject.call()[0]
        student = processors(subject, contender("sana", CPU, torch.float32, 16, 72))
        assert not list(student[0].func.site.differences.parameters())
        install(subject.attentions, student)
        assert not torch.equal(subject.call()[0], before)
        install(subject.attentions, own)
        assert torch.equal(subject.call()[0], before)


def test_verify_holds_every_student_and_passes_others_over() -> None:
    found = verify(BACKBONES["sd35_medium"], CONTENDERS, torch.float32, CPU)
    assert set(found) == {"paper", "sana", "linfusion", "kv_compression", "local", "piecewise"}
    assert all(0 < error < 1e-5 for error in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_allows_for_rounding_in_half_precision(dtype: torch.dtype) -> None:
    assert verify(BACKBONES["pixart_sigma"], ["sana"], dtype, CPU)["sana"] > 1e-5
    found = verify(BACKBONES["sd35_medium"], ["piecewise", "piecewise:quality=fast"], dtype, CPU)
    assert all(error > 1e-5 for error in found.values()), "which tokens are exact must not be another's choice"


def test_a_wrong_student_ends_the_bench_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = EDiTAttention.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return right(self, *args, **kwargs) * 1.05

    monkeypatch.setattr(EDiTAttention, "forward", wrong)
    status, out, err = run(capsys, *SMALL, "--verify")
    assert (status, out) == (1, "")
    assert err.startswith("edit_core: paper on pixart_sigma is off its specification by 0.0")
    assert err.count("\n") == 1
    with pytest.raises(EDiTResultError, match="sana on pixart_sigma"):
        verify(BACKBONES["pixart_sigma"], ["teacher", "sana"], torch.float32, CPU)


def test_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EDiTAttention, "forward", lambda self, x, *args, **kwargs: x * float("nan"))
    with pytest.raises(EDiTResultError, match="off its specification by nan"):
        verify(BACKBONES["pixart_sigma"], ["paper"], torch.float32, CPU)


def test_mistakes_are_one_sentence_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, part in (
        (("--sizes", 64, 1000), "multiples of 16"),
        (("--repeats", 0), "must be at least 1"),
        (("--batch", 1, 0), "must be at least 1"),
        (("--contenders", "teacher", "mamba"), "no contender 'mamba'"),
        (("--contenders", "limit:compression=2"), "no contender 'limit:compression=2'"),
        (("--contenders", "paper:width=2"), "'width' is none of the fields"),
        (("--contenders", "paper:compression=two"), "compression=two cannot be read as int"),
        (("--contenders", "paper:local=yes"), "local=yes cannot be read as bool"),
        (("--contenders", "paper:compression=7"), "does not divide"),
        (("--contenders", "sana:kv_stride=3"), "has no meaning"),
        (("--blocks", 1), "are of --level transformer"),
        (("--layers", "0"), "are of --level transformer"),
        (("--level", "transformer", "--blocks", 1, "--layers", "1"), "block 1 does not exist"),
        (("--crossover", "--contenders", "teacher", "paper"), "without other contenders"),
        (("--plot", tmp_path / "b.png"), "at least two --sizes"),
        (("--save", tmp_path / "no" / "b.json"), "there is no such folder"),
        (("--sizes", 64, 128, "--plot", tmp_path / "no" / "b.png"), "there is no such folder"),
    ):
        status, out, err = run(capsys, *SMALL, *arguments)
        assert (status, out) == (2, ""), (arguments, err)
        assert err.startswith("edit_core: ")
        assert err.count("\n") == 1, err
        assert part in err
    for name in ("sage", "flash_attn"):
        monkeypatch.setitem(contenders_module._KERNELS, name, ("no-such-package", _absent))
        status, _, err = run(capsys, *SMALL, "--contenders", "teacher", name)
        assert (status, err) == (2, f"edit_core: {name} cannot run here: no no-such-package is installed that works\n")


def _absent() -> Any:
    raise ImportError


def test_a_kernel_that_refuses_the_shape_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("heads of 64 only\nand a trace")

    monkeypatch.setitem(contenders_module._KERNELS, "sage", ("torch", lambda: refuse))
    with pytest.raises(EDiTError, match=r"sage cannot run here with heads of 72 channels: heads of 64 only$"):
        contender("sage", CPU, torch.float32, 16, 72)
    monkeypatch.setitem(contenders_module._KERNELS, "sage", ("torch", lambda: lambda q, k, v: v))
    *_, last = measure("layer", BACKBONES["pixart_sigma"], 64, 1, torch.float32, CPU, 1, ["sage"])
    assert last.versions["torch"] == torch.__version__.split("+")[0] or last.versions["torch"] == torch.__version__
    assert last.speed("sage") is None  # there was no teacher


def test_a_contenders_fields_change_its_preset() -> None:
    one = contender("local:compression=8,local=false,eps=1e-3", CPU, torch.float32, 16, 72)
    assert one.config == EDiTConfig.preset("local", compression=8, local=False, eps=1e-3)
    with pytest.raises(EDiTConfigError):
        contender("paper:", CPU, torch.float32, 16, 72).config.preset("none")  # type: ignore[union-attr]


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.ones(1000)

    def call() -> Tensor:
        a = x + 1
        b = a + 1
        del a
        return (b + 1).sum()

    assert 8000 <= peak_memory(call, CPU) < 9000  # two of three, never all
    assert 4000 <= peak_memory(lambda: x + 1, CPU) < 5000


def test_speeds_and_exponents_are_of_medians() -> None:
    sizes = [
        measured(1024, teacher=[1.0, 4.0, 2.0], paper=[1.0, 1.0, 4.0], limit=[0.5, 0.5, 0.5]),
        measured(4096, teacher=[32.0, 32.0, 32.0], paper=[4.0, 4.0, 4.0], limit=[2.0, 2.0, 2.0]),
    ]
    assert sizes[0].speed("paper") == 1.0  # of 1, 4 and 0.5
    assert sizes[0].speed("paper", "limit") == 0.5
    (group,) = series(sizes)
    assert group.exponent("teacher") == pytest.approx(2.0)
    assert group.exponent("paper") == pytest.approx(1.0)
    text = table(sizes)
    assert "| teacher | 2 (1–4) | 1.00× | 25% | 2.00 |" in text
    assert "memory" not in text  # nobody measured it
    assert len(series([*sizes, dataclasses.replace(sizes[0], batch=2)])) == 2
    assert group.exponent("sana") is None


def test_a_plot_needs_two_sizes_and_has_a_panel_for_each_series() -> None:
    one, two = measured(1024, teacher=[1.0], limit=[0.1]), measured(4096, teacher=[16.0], limit=[0.4])
    with pytest.raises(EDiTError, match="at least two sizes"):
        draw([one])
    single = draw([one, two])
    both = draw([one, two, *(dataclasses.replace(m, batch=2) for m in (one, two))])
    assert both.size == (single.width, 2 * single.height)
    drawn = set(single.get_flattened_data() if hasattr(single, "get_flattened_data") else single.getdata())
    assert {(0x1F, 0x77, 0xB4), (0x7F, 0x7F, 0x7F)} <= drawn  # the teacher's line and the limit's
