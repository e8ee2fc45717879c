"""What the speed rests on, held without timing anything: no copies of image tokens, one qkv call, whole graphs."""

from __future__ import annotations

import shutil
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from edit_core import EDiTConfig, EDiTWeights, apply_edit
from edit_core.attention import SITES, EDiTAttention, HybridAttention, Projections
from edit_core.backbones import BACKBONES as KNOWN
from edit_core.backbones import HostCall, identify_module
from edit_core.bench.timing import peak_memory
from edit_core.config import PRESETS

GRID, DIM, HEADS, PROMPT = (8, 7), 48, 4, 5  # no two sizes alike, which a compiler might take for one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Copies(TorchDispatchMode):
    """Counts what copies `least` elements or more, by operator and the dtype of the copy.

    A convolution copies an input that is dense in neither layout, before it begins. What kernels do inside is theirs:
    it differs from one processor to the next.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        copied = output if name in ("clone", "_to_copy", "copy_", "cat", "constant_pad_nd") else None
        if name == "convolution" and not any(
            args[0].is_contiguous(memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last)
        ):
            copied = args[0]
        if copied is not None and copied.numel() >= self.least:
            self.found[f"{name} {str(copied.dtype).removeprefix('torch.')}"] += 1
        return output


def sample(batch: int, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Projections, Projections]:
    """Image tokens, a base's projections of them, and a prompt's."""
    tokens = GRID[0] * GRID[1]
    x = torch.randn(batch, tokens, DIM, dtype=dtype)
    together = torch.randn(batch, tokens, 3 * DIM, dtype=dtype).chunk(3, -1)
    base = together if fused else [t.contiguous() for t in together]
    return x, Projections(*base), Projections(*torch.randn(3, batch, PROMPT, DIM, dtype=dtype))


def run(site: str, module: Any, x: Tensor, base: Projections, prompt: Projections) -> tuple[Tensor, ...]:
    if site == "self":
        return (module(x, base, GRID, HEADS),)
    return module(x, base, prompt, GRID, HEADS)


def known(preset: str, site: str, dtype: torch.dtype, fused: bool, batch: int, sliced: bool) -> Counter[str]:
    """The full-size copies that there are today: an improvement takes some away, and nothing else may add any."""
    short, found = str(dtype).removeprefix("torch."), Counter[str]()
    if preset == "local" and site == "joint":  # the prompt's rows see keys and values of both
        found[f"cat {short}"] += 1 if sliced else 2  # by slices, keys are written where they are needed
    if sliced:  # the rest is copied by slices of the tokens, which stay in the cache
        return found
    if fused:  # depthwise convolutions of thirds of a qkv: k and v, or the local branch's v
        found[f"convolution {short}"] += {"paper": 2, "local": 1}[preset]
    if dtype == torch.float16:  # its products are taken in float32: of the queries, and back
        found["_to_copy float32"] += 1
        found["_to_copy float16"] += 1
    if preset == "local" and dtype != torch.float32:  # keys are as many as tokens, for sums in float32: v and k
        found["_to_copy float32"] += 2
    if batch > 1:  # matmul makes one batch of pictures and heads: of q, and where they are as many of k and v
        inner = "bfloat16" if dtype == torch.bfloat16 else "float32"
        found[f"clone {inner}"] += 1
        if preset == "local":
            found["clone float32"] += 2
    return found


@pytest.mark.parametrize("sliced", [True, False], ids=["by-slices", "at-once"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("preset", ["paper", "local"])
def test_image_tokens_are_copied_only_where_it_is_known(
    preset: str, site: str, dtype: torch.dtype, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By slices on a CPU; at once where gradients are wanted, while compiling, and on every other device."""
    monkeypatch.setattr("edit_core.attention.slices.SLICE", 16)
    module = SITES[site](DIM, EDiTConfig.preset(preset), dtype=dtype).requires_grad_(False)
    for fused in (False, True):
        for batch in (1, 2):
            inputs = sample(batch, dtype, fused)
            with torch.set_grad_enabled(not sliced), Copies(inputs[0].numel()) as copies:
                run(site, module, *inputs)
            assert copies.found == known(preset, site, dtype, fused, batch, sliced), (fused, batch)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("site", SITES)
def test_slices_of_the_tokens_give_what_all_at_once_give(
    site: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SITES[site](DIM, EDiTConfig.preset(preset), dtype=torch.float64).requires_grad_(False)
    for fused in (False, True):
        for batch in (1, 2):
            inputs = sample(batch, torch.float64, fused)
            kept = [t.clone() for t in inputs[1]]
            wanted = run(site, module, *inputs)
            for length in (7, 16, 50):  # none divides the tokens, and no slice or band ends with a row
                monkeypatch.setattr("edit_core.attention.slices.SLICE", length)
                with torch.inference_mode():
                    found = run(site, module, *inputs)
                for y, z in zip(found, wanted, strict=True):
                    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
            assert all(torch.equal(t, u) for t, u in zip(kept, inputs[1], strict=True))  # the base's stay as they are


@pytest.mark.parametrize("preset", ["paper", "local"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_layer_never_holds_more_than_the_teachers(backbone: str, preset: str) -> None:
    """With the base's projections, at 4096 tokens, where the model's own attention holds no square of them either."""
    model = models.make(backbone).requires_grad_(False)
    weights = EDiTWeights.init(model, EDiTConfig.preset(preset))
    for fused in (False, True):
        if fused and backbone == "sd35_medium":
            continue  # diffusers' own processor cannot run a fused attn2
        if fused:
            model.fuse_qkv_projections()
        for batch in (1, 2):
            teacher = _peaks(model, backbone, batch)
            with apply_edit(model, weights) as handle:
                # An attention called alone has no transformer to tell it of the call.
                student = _peaks(model, backbone, batch, edit_call=handle.call((64, 64)))
            for own, bases in zip(student, teacher, strict=True):
                assert own < 1.02 * bases, (fused, batch, student, teacher)


def _peaks(model: Any, backbone: str, batch: int, **more: Any) -> list[int]:
    """Of each of the first block's replaced attentions, called alone."""
    base, found = identify_module(model), []
    for site in base.sites[0]:
        attention = model.get_submodule(base.backbone.diffusers_path(0, site))
        x = torch.randn(batch, 4096, attention.inner_dim)
        prompt = (torch.randn(batch, 5, attention.inner_dim),) if site == "joint" else ()
        with torch.inference_mode():
            found.append(peak_memory(lambda: attention(x, *prompt, **more), torch.device("cpu")))  # noqa: B023 - called here
    return found


def test_copies_are_seen() -> None:
    x = torch.randn(2, 3, 4)
    strided = torch.randn(1, 4, 4, 8)[..., :4].permute(0, 3, 1, 2)
    with torch.no_grad(), Copies(24) as copies:
        x.transpose(0, 1).contiguous()
        x.double()
        x.transpose(0, 2).reshape(-1)
        torch.cat([x, x])
        x[0].clone()  # too small
        F.conv2d(strided, torch.randn(4, 1, 3, 3), groups=4)
    assert copies.found == {"clone float32": 2, "_to_copy float64": 1, "cat float32": 1, "convolution float32": 1}


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_layer_calls_each_of_its_bases_linears_once(backbone: str, fused: bool) -> None:
    model = models.make(backbone)
    if fused:
        model.fuse_qkv_projections()
    weights, calls = models.trained_like(model), Counter[str]()
    with apply_edit(model, weights) as handle:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".edit." not in path:
                module.register_forward_hook(lambda *_, path=path: calls.update([path]))
        models.forward(model)
        sides = [(block, site) for block in handle.blocks for site in handle.sides[str(block)]]
    for block, site in sides:
        path = KNOWN[backbone].diffusers_path(block, site)
        once = ("to_qkv", "to_out.0") if fused else ("to_q", "to_k", "to_v", "to_out.0")
        never = ("to_q", "to_k", "to_v") if fused else ()
        assert [calls[f"{path}.{name}"] for name in once] == [1] * len(once), path
        assert [calls[f"{path}.{name}"] for name in never] == [0] * len(never), path


def test_a_layer_in_comfyui_calls_its_bases_qkv_once() -> None:
    calls: Counter[str] = Counter()
    module = SimpleNamespace(qkv=nn.Linear(DIM, 3 * DIM), proj=nn.Linear(DIM, DIM), num_heads=HEADS)
    for name in ("qkv", "proj"):
        getattr(module, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    x = torch.randn(1, GRID[0] * GRID[1], DIM)
    side = EDiTAttention(DIM, EDiTConfig())
    KNOWN["pixart_sigma"].comfy_forward(module, {"self": side}, HostCall(GRID, F.scaled_dot_product_attention), x)
    assert calls == {"qkv": 1, "proj": 1}


@pytest.mark.parametrize("preset", [pytest.param("paper", marks=pytest.mark.slow), "local"])
@pytest.mark.parametrize("site", [pytest.param("self", marks=pytest.mark.slow), "joint"])
def test_attentions_compile_to_one_graph_for_all_sizes(site: str, preset: str) -> None:
    torch._dynamo.reset()
    module = SITES[site](DIM, EDiTConfig.preset(preset)).requires_grad_(False)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for height, width in (GRID, (5, 10), (16, 12)):
        x, base = torch.randn(2, height * width, 4 * DIM).split((DIM, 3 * DIM), -1)
        arguments: list[Any] = [x.contiguous(), Projections(*base.chunk(3, -1)), (height, width), HEADS]
        if isinstance(module, HybridAttention):
            arguments.insert(2, Projections(*torch.randn(3, 2, PROMPT, DIM)))
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    assert len(graphs) == 1


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True], ids=["as-needed", "dynamic"])
@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_patched_transformers_compile_to_whole_graphs_with_one_recompile_at_most(
    backbone: str, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    model = models.make(backbone).requires_grad_(False)
    counter, compiled = CompileCounterWithBackend("eager"), []
    with apply_edit(model, models.trained_like(model)):
        model.compile(fullgraph=True, dynamic=dynamic, backend=counter)
        for height, width in ((34, 40), (20, 24), (28, 36)):
            with torch.no_grad():
                found = models.forward(model, height, width)
                with torch.compiler.set_stance("force_eager"):
                    torch.testing.assert_close(found, models.forward(model, height, width))
            compiled.append(counter.frame_count)
    first = compiled[0]  # the transformer, and the hook that tells the grid
    assert first <= 2
    assert compiled == ([first] * 3 if dynamic else [first, 2 * first, 2 * first])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("site", SITES)
def test_inductors_code_gives_what_the_formulas_give_at_several_sizes(site: str) -> None:
    torch._dynamo.reset()
    module = SITES[site](DIM, EDiTConfig.preset()).requires_grad_(False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for height, width in (GRID, (16, 12)):
        x, q, k, v = torch.randn(4, 2, height * width, DIM)
        arguments: list[Any] = [x, Projections(q, k, v), (height, width), HEADS]
        if isinstance(module, HybridAttention):
            arguments.insert(2, Projections(*torch.randn(3, 2, PROMPT, DIM)))
        torch.testing.assert_close(compiled(*arguments), module(*arguments), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
