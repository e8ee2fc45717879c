"""Triton kernels against the specification: in Triton's interpreter, on the CPU; and on a GPU, where there is one."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from edit_core import kernels
from edit_core.attention import EDiTAttention, Projections
from edit_core.config import EDiTConfig
from edit_core.kernels import choice
from support import interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
Call = Callable[..., Any]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CLOSE = {F32: 5e-7, F16: 4e-4, BF16: 8e-3}  # the interpreter cuts bfloat16 off where a GPU rounds it


@pytest.fixture(scope="module")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Calls a function of support.interpreted in a process where Triton interprets."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpreted.start) as pool:
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "kernel", "tokens", "heads", "d"),
    [(F32, "squared_relu", 77, 2, 72), (F16, "elu", 64, 3, 64), (BF16, "relu", 130, 2, 72), (F32, "elu", 5, 2, 20)],
)
def test_the_keys_state_is_the_specifications(
    interpret: Call, dtype: torch.dtype, kernel: str, tokens: int, heads: int, d: int
) -> None:
    assert interpret(interpreted.state, dtype, kernel, tokens, heads, d) < CLOSE[dtype]


@needs_triton
def test_a_state_is_summed_over_chunks_of_several_blocks(interpret: Call) -> None:
    assert interpret(interpreted.state, F32, "relu", 330, 1, 16, chunks=2) < CLOSE[F32]


@needs_triton
def test_squares_of_float16_do_not_overflow(interpret: Call) -> None:
    """300² is within float16, a thousand of its like are not, nor are their sums."""
    assert interpret(interpreted.state, F16, "squared_relu", 100, 2, 72, scale=300.0) < CLOSE[F16]
    assert interpret(interpreted.linear, F16, "squared_relu", (10, 10), 2, 72, scale=300.0) < CLOSE[F16]


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "kernel", "grid", "heads", "d", "added"),
    [
        (F32, "squared_relu", (7, 11), 2, 72, {"soft": True, "local": True}),
        (F16, "elu", (9, 15), 3, 64, {"local": True}),
        (BF16, "relu", (3, 5), 2, 72, {"soft": True}),
        (BF16, "squared_relu", (1, 150), 2, 20, {}),
        (F32, "elu", (70, 1), 2, 16, {"local": True}),
    ],
)
def test_queries_rows_are_the_specifications(
    interpret: Call, dtype: torch.dtype, kernel: str, grid: tuple[int, int], heads: int, d: int, added: dict[str, bool]
) -> None:
    assert interpret(interpreted.linear, dtype, kernel, grid, heads, d, **added) < CLOSE[dtype]


@needs_triton
@pytest.mark.parametrize(("dtype", "grid", "stride"), [(F32, (7, 10), 1), (F16, (7, 10), 2), (BF16, (5, 4), 3)])
def test_depthwise_convolutions_are_the_specifications(
    interpret: Call, dtype: torch.dtype, grid: tuple[int, int], stride: int
) -> None:
    assert interpret(interpreted.depthwise, dtype, grid, 144, stride) < CLOSE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_conv_fusions_tail_is_the_specifications(interpret: Call, dtype: torch.dtype) -> None:
    assert interpret(interpreted.conv_fusion, dtype, (13, 11), 144) < CLOSE[dtype]


@needs_triton
def test_group_norm_keeps_its_precision_far_from_zero(interpret: Call) -> None:
    """A difference of mean squares would lose the deviation of numbers near a thousand times as large."""
    assert interpret(interpreted.conv_fusion, F32, (13, 11), 64, offset=1000.0) < 1e-3


@needs_triton
@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {}),
        ("local", {}),
        ("paper", {"query": "separable"}),
        ("sana", {}),
        ("linfusion", {"softmax_features": "post"}),
        ("paper", {"normaliser": "exact", "key": "conv_fusion"}),
    ],
    ids=["paper", "local", "separable", "sana", "linfusion", "exact"],
)
def test_attentions_by_kernels_are_the_specifications(
    interpret: Call, preset: str, changes: dict[str, Any], joint: bool
) -> None:
    if changes.get("normaliser") == "exact" and not joint:
        pytest.skip("reads no normaliser")
    assert interpret(interpreted.attention, preset, changes, joint) < 3e-6


@needs_triton
def test_what_is_measured_is_remembered_and_losers_are_not_chosen(interpret: Call) -> None:
    found = interpret(interpreted.measured, kernels.PARTS)  # on the CPU every kernel is slower
    assert set(found) == set(kernels.PARTS)
    for outcome in found.values():
        assert outcome["error"] < 1e-5 and 0 < outcome["speed"]["20"] < 1
        assert not outcome["chosen"] and outcome["message"] == "slower at 20 tokens"
    (entry,) = json.loads(choice._path().read_text("utf-8")).items()
    assert entry[1] == found and "32 channels" in entry[0] and "Triton" in entry[0]


@needs_triton
@pytest.mark.parametrize(
    ("broken", "message"), [("raises", "RuntimeError: out of resources"), ("wrong", "off its spec")]
)
def test_a_kernel_that_fails_or_is_wrong_is_not_chosen_and_says_why(interpret: Call, broken: str, message: str) -> None:
    found = interpret(interpreted.measured, ("depthwise",), broken)
    assert not found["depthwise"]["chosen"] and found["depthwise"]["message"].startswith(message)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "available", lambda: True)
    choice._measured.cache_clear()
    return tmp_path / "edit-attention" / "kernels.json"


@needs_triton
def test_only_winners_of_this_device_dtype_and_width_are_chosen(cache: Path) -> None:
    device = torch.device("cpu")
    assert choice._measured(device, F16, 64) == frozenset()
    choice.remember(device, F16, 64, {"linear": {"chosen": True}, "depthwise": {"chosen": False}})
    assert choice._measured(device, F16, 64) == {"linear"}
    assert choice._measured(device, F16, 32) == choice._measured(device, BF16, 64) == frozenset()


@needs_triton
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}'])
def test_a_damaged_cache_means_nothing_was_measured(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text, "utf-8")
    assert choice._measured(torch.device("cpu"), F16, 64) == frozenset()


def test_kernels_are_for_inference_and_tensors_of_one_kind() -> None:
    x = torch.ones(1, 4, 8)
    assert not kernels.chosen("linear", x)
    with kernels.using(["linear"]):
        assert kernels.chosen("linear", x, x) and not kernels.chosen("depthwise", x)
        assert not kernels.chosen("linear", x, x.half())
        assert not kernels.chosen("linear", x, torch.empty(1, device="meta"))
        wanting = torch.ones(1, 4, 8, requires_grad=True)
        assert not kernels.chosen("linear", x, wanting)
        with torch.no_grad():
            assert kernels.chosen("linear", x, wanting)
        with torch.autocast("cpu", torch.bfloat16):
            assert not kernels.chosen("linear", x)
    assert not kernels.chosen("linear", x)


def test_compiled_attention_traces_the_eager_path() -> None:
    side = EDiTAttention(16, EDiTConfig.preset("local")).requires_grad_(False)
    x, base = torch.randn(1, 6, 16), Projections(*torch.randn(3, 1, 6, 16))
    wanted = side(x, base, (2, 3), 2)
    with kernels.using(kernels.PARTS):
        compiled = torch.compile(side, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, base, (2, 3), 2), wanted)


def test_nothing_here_needs_triton() -> None:
    """A host without it, such as ComfyUI on Windows, imports and runs as ever."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from edit_core import EDiTConfig, kernels
        from edit_core.attention import EDiTAttention, Projections
        x = torch.randn(1, 6, 16)
        EDiTAttention(16, EDiTConfig())(x, Projections(x, x, x), (2, 3), 2)
        assert not kernels.available()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measuring_without_a_device_says_what_it_takes() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", "edit_core.bench.kernels"], env=hidden, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "kernels cannot be measured here: that takes a CUDA device and Triton\n"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "backbone"), [("80", "pixart_sigma"), ("90", "pixart_sigma"), ("90", "sd35_medium")]
)
def test_kernels_compile_for_gpus_within_their_registers(capability: str, backbone: str, tmp_path: Path) -> None:
    """The shared memory is the least that devices from sm_80 on give a block."""
    command = [sys.executable, "-m", "support.compiled", capability, "bfloat16", backbone]
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 7
    for kernel in found:
        assert kernel["stack"] == 0 and kernel["shared"] <= 101376, kernel


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("backbone", ["pixart_sigma", "sd35_medium"])
def test_kernels_are_right_on_this_gpu(
    backbone: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_core.bench.kernels import measure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for part, outcome in measure(torch.device("cuda"), dtype, backbone, ((32, 32),)).items():
        assert outcome.chosen or outcome.message.startswith("slower"), (part, outcome)
