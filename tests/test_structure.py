"""What the speed rests on, held without timing anything: no copies of image tokens, one qkv call, whole graphs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edit_core import EDiTConfig, apply_edit
from edit_core.attention import SITES, EDiTAttention, HybridAttention, Projections
from edit_core.backbones import BACKBONES as KNOWN
from edit_core.backbones import HostCall

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


def known(preset: str, site: str, dtype: torch.dtype, fused: bool, batch: int) -> Counter[str]:
    """The full-size copies that there are today: an improvement takes some away, and nothing else may add any."""
    short, found = str(dtype).removeprefix("torch."), Counter[str]()
    if fused:  # depthwise convolutions of thirds of a qkv: k and v, or the local branch's v
        found[f"convolution {short}"] += {"paper": 2, "local": 1}[preset]
    if dtype == torch.float16:  # its products are taken in float32: of the queries, and back
        found["_to_copy float32"] += 1
        found["_to_copy float16"] += 1
    if preset == "local":  # keys are as many as tokens
        if dtype != torch.float32:  # for sums in float32: v and k, the latter (float16: both factors) before its square
            found["_to_copy float32"] += 2
        if site == "joint":  # the prompt's rows see keys and values of both
            found[f"cat {short}"] += 2
    if batch > 1:  # matmul makes one batch of pictures and heads: of q, and where they are as many of k and v
        inner = "bfloat16" if dtype == torch.bfloat16 else "float32"
        found[f"clone {inner}"] += 1
        if preset == "local":
            found["clone float32"] += 2
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("preset", ["paper", "local"])
def test_image_tokens_are_copied_only_where_it_is_known(preset: str, site: str, dtype: torch.dtype) -> None:
    module = SITES[site](DIM, EDiTConfig.preset(preset), dtype=dtype)
    for fused in (False, True):
        for batch in (1, 2):
            inputs = sample(batch, dtype, fused)
            with torch.no_grad(), Copies(inputs[0].numel()) as copies:
                run(site, module, *inputs)
            assert copies.found == known(preset, site, dtype, fused, batch), (fused, batch)


def test_a_single_pictures_tokens_are_nowhere_copied() -> None:
    for site, kind in SITES.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = sample(1, dtype, fused=False)
            with torch.no_grad(), Copies(inputs[0].numel()) as copies:
                run(site, kind(DIM, EDiTConfig(), dtype=dtype), *inputs)
            assert not copies.found


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
            if isinstance(module, nn.Linear) and ".processor." not in path:
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


@pytest.mark.parametrize("preset", ["paper", "local"])
@pytest.mark.parametrize("site", SITES)
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


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_patched_transformers_compile_to_one_graph(backbone: str) -> None:
    torch._dynamo.reset()
    model = models.make(backbone).requires_grad_(False)
    with apply_edit(model, models.trained_like(model)):
        with torch.no_grad():
            wanted = models.forward(model)
        model.compile(fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(models.forward(model), wanted)
            models.forward(model, 20, 24)  # another grid
