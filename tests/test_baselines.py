"""What EDiT is compared with: other choices of the same parts, as functions, in files, in training and in a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import models
from test_attention import HeadNorm, batches, close, compare_gradients, double, grids, head_dims, randomised, sample
from test_differences import merged_by_hand
from test_weights import metadata_of
from torch import Tensor, nn

from edit_core import EDiTConfig, EDiTConfigError, EDiTError, EDiTModelError, EDiTWeights, EDiTWeightsError, apply_edit
from edit_core.attention import EDiTAttention, HybridAttention, Projections, merge_heads, naive, split_heads
from edit_core.attention.forms import KERNELS, StudentForm, one_plus_elu
from edit_core.attention.joint import JOINTS, NORMALISERS, SOFTMAX_FEATURES
from edit_core.attention.keys import KEYS
from edit_core.attention.linear import read, state
from edit_core.attention.modules import MLPFusion
from edit_core.attention.plans import QUALITIES
from edit_core.attention.queries import QUERIES
from edit_core.backbones import identify, identify_module
from edit_core.cli import main
from edit_core.config import PRESETS
from edit_core.weights.convert import merge
from edit_core.distill.losses import TransferTap

EXACT = 1e-9  # float64 on both sides
head_counts = st.integers(1, 6)


@st.composite
def configs(draw: st.DrawFn) -> EDiTConfig:
    """Any that is allowed."""

    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    fields = {
        "kernel": one_of(*(name for name, form in KERNELS.items() if issubclass(form, StudentForm))),
        "query": one_of(*QUERIES),
        "local": draw(st.booleans()),
    }  # fmt: skip
    if fields["kernel"] == "softmax":
        fields["key"] = "compressor"
    elif fields["kernel"] == "piecewise":
        fields.update(key="plain", quality=one_of(*QUALITIES))
    else:
        fields.update(key=one_of(*KEYS), joint=one_of(*JOINTS))
        fields["eps"] = 0.1  # a query that is nearly rectified away would divide rounding by rounding
        if fields["joint"] == "hybrid":
            features = ("pre",) if fields["kernel"] == "squared_relu" else SOFTMAX_FEATURES
            fields.update(normaliser=one_of(*NORMALISERS), softmax_features=one_of(*features))
    if fields["key"] == "compressor":
        fields["kv_stride"] = one_of(1, 2, 3)
    if "compression" in QUERIES[fields["query"]].reads | KEYS[fields.get("key", "compressor")].reads:
        fields["compression"] = one_of(1, 2, 4)
    return EDiTConfig(**fields)


def trained(model: Any, preset: str, **kwargs: Any) -> EDiTWeights:
    """A student of a preset with differences, all of whose parts matter."""
    return models.trained_like(model, config=EDiTConfig.preset(preset), trainable="low_rank", rank=3, **kwargs)


# --- what they compute ---


@settings(max_examples=200)  # there are 200 combinations of kernel, query, key, joint and local
@given(batches, head_counts, head_dims, grids, configs(), st.booleans())
def test_every_self_attention_equals_its_formula_in_values_and_gradients(
    b: int, h: int, d: int, grid: tuple[int, int], config: EDiTConfig, normed: bool
) -> None:
    module = randomised(EDiTAttention(h * d, config)).double()
    norms = (HeadNorm(d), HeadNorm(d)) if normed else (None, None)
    x, base, _ = sample(b, grid, h * d, 1)
    inputs, references = double([x, *base]), double([x, *base])
    state = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    fast = module(inputs[0], Projections(*inputs[1:]), grid, h, *norms)
    slow = naive.edit_attention(references[0], tuple(references[1:]), state, grid, h, config, *norms)
    close(fast, slow, EXACT)
    compare_gradients([fast], [*inputs, *module.parameters()], [slow], [*references, *state.values()], EXACT)


@settings(max_examples=200)  # there are 200 combinations of kernel, query, key, joint and local
@given(batches, head_counts, head_dims, grids, configs(), st.integers(1, 12), st.booleans())
def test_every_joint_attention_equals_its_formula_in_values_and_gradients(
    b: int, h: int, d: int, grid: tuple[int, int], config: EDiTConfig, p: int, normed: bool
) -> None:
    module = randomised(HybridAttention(h * d, config)).double()
    norms = (HeadNorm(d), HeadNorm(d)) if normed else (None, None)
    x, base, prompt = sample(b, grid, h * d, p)
    inputs, references = double([x, *base, *prompt]), double([x, *base, *prompt])
    state = {name: t.detach().clone().requires_grad_() for name, t in module.named_parameters()}
    parts = Projections(*inputs[1:4]), Projections(*inputs[4:])
    fast = module(inputs[0], *parts, grid, h, *norms)
    slow = naive.hybrid_attention(
        references[0], tuple(references[1:4]), tuple(references[4:]), state, grid, h, config, *norms
    )
    for y, z in zip(fast, slow, strict=True):
        close(y, z, EXACT)
    compare_gradients(
        list(fast), [*inputs, *module.parameters()], list(slow), [*references, *state.values()], EXACT
    )  # fmt: skip
    image, none = module(inputs[0], *parts, grid, h, *norms, prompt_rows=False)
    assert none is None
    assert torch.equal(image, fast[0])


@given(batches, st.integers(1, 6), st.integers(1, 40))
def test_linfusions_literal_query_equals_the_built_one(b: int, h: int, n: int) -> None:
    """`Linear(X + MLP(X))` is `q + MLP'(X)` with the last linears multiplied, and 1 + ELU is taken of it."""
    dim, config = h * 8, EDiTConfig.preset("linfusion", compression=2)
    module = randomised(MLPFusion(dim, config)).double()
    weight, bias, x = torch.randn(dim, dim).double(), torch.randn(dim).double(), torch.randn(b, n, dim).double()
    state = {f"mlp_q.{name}": p for name, p in module.named_parameters()}
    literal = naive.literal_mlp(x, weight, bias, state)
    folded = {f"up.{part}": weight @ state[f"mlp_q.up.{part}"] for part in ("weight", "bias")}
    module.load_state_dict({**module.state_dict(), **folded})
    close(one_plus_elu(module(x, F.linear(x, weight, bias))), literal, EXACT)


@given(batches, st.integers(1, 8), grids)
def test_sana_in_self_attention_is_diffusers_own(b: int, h: int, grid: tuple[int, int]) -> None:
    attention = Attention(h * 8, heads=h, dim_head=8, bias=True, processor=SanaLinearAttnProcessor2_0())
    x = torch.randn(b, grid[0] * grid[1], h * 8)
    module = EDiTAttention(h * 8, EDiTConfig.preset("sana", eps=1e-15))
    assert not list(module.parameters())
    base = Projections(attention.to_q(x), attention.to_k(x), attention.to_v(x))
    close(attention.to_out[0](module(x, base, grid, h)), attention(x))


def test_kv_compression_without_compression_is_the_teachers_attention() -> None:
    module = EDiTAttention(32, EDiTConfig.preset("kv_compression", kv_stride=1))
    for compressor in (module.compress_k, module.compress_v):
        torch.nn.init.dirac_(compressor.conv.weight, groups=32)
        torch.nn.init.zeros_(compressor.conv.bias)
    x, base, _ = sample(2, (5, 6), 32, 1)
    expected = F.scaled_dot_product_attention(*(split_heads(t, 4) for t in base))
    close(module(x, Projections(*base), (5, 6), 4), merge_heads(expected))


def test_plain_projections_are_used_where_they_lie() -> None:
    module = HybridAttention(32, EDiTConfig.preset("sana"))
    qkv = torch.randn(2, 30, 96)
    got = module.features(qkv, Projections(*qkv.chunk(3, -1)), (5, 6), 4, None, None)
    assert [t.data_ptr() for t in got] == [t.data_ptr() for t in qkv.chunk(3, -1)]


def test_rows_of_several_kinds_of_tokens_lie_ready_for_the_output_projections() -> None:
    image, prompt = ([split_heads(torch.rand(2, n, 24), 3) for _ in range(3)] for n in (30, 7))
    of_keys = state([image[1:], prompt[1:]])
    rows = [read(q, of_keys, 1e-6, q.dtype)[0] for q in (image[0], prompt[0])]
    together = [torch.cat(pair, 2) for pair in zip(image, prompt, strict=True)]
    close(torch.cat(rows, 2), naive.linear_attention(*together))
    assert all(merge_heads(y).data_ptr() == y.data_ptr() for y in rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_one_plus_elu_keeps_small_features_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.linspace(-30, 8, 1000).to(dtype)
    y = one_plus_elu(x)
    assert y.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    wanted = 1 + F.elu(x.double())
    assert float(((y.double() - wanted) / wanted).abs().max()) < tolerance


def test_squared_features_do_not_overflow_in_float16() -> None:
    module = randomised(EDiTAttention(32, EDiTConfig.preset("local")))
    x, base, _ = sample(1, (24, 24), 32, 1)
    projections = [300 * t for t in base[:2]] + [base[2]]
    wanted = module.double()(x.double(), Projections(*(t.double() for t in projections)), (24, 24), 4)
    got = module.half()(x.half(), Projections(*(t.half() for t in projections)), (24, 24), 4)
    assert float(projections[0].detach().max()) ** 2 > 65504
    assert got.dtype == torch.float16
    close(got, wanted, 2e-2)


@pytest.mark.parametrize("normaliser", ["token_ratio", "exact"])
@pytest.mark.parametrize("kernel", ["relu", "squared_relu", "elu"])
def test_hybrid_attention_runs_under_autocast_as_a_training_calls_it(kernel: Any, normaliser: Any) -> None:
    module = randomised(HybridAttention(48, EDiTConfig(kernel=kernel, normaliser=normaliser)))
    x, base, prompt = sample(2, (6, 7), 48, 5)
    wanted, _ = module(x, Projections(*base), Projections(*prompt), (6, 7), 4)
    half = [Projections(*(t.bfloat16() for t in part)) for part in (base, prompt)]  # as linears make them there
    with torch.autocast("cpu", torch.bfloat16):
        got, rows = module(x.bfloat16(), *half, (6, 7), 4)
    assert got.dtype == torch.bfloat16
    close(got, wanted, 0.1)
    (got.float().sum() + rows.float().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


# --- in a model ---


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_an_attention_of_a_model_computes_what_the_specification_says(backbone: str, preset: str) -> None:
    """From the base's own linears, changed as the student says, through `naive`; then the base is what it was."""
    model, other = models.make(backbone), models.make(backbone)
    weights = trained(model, preset)
    merged_by_hand(other, weights)
    site = "self" if backbone.startswith("pixart") else "joint"
    path = identify_module(model).backbone.diffusers_path(1, site)
    attn, caught = other.get_submodule(path), {}
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, a, kwargs, y: caught.update(kwargs, y=y, x=a[0] if a else kwargs["hidden_states"]), with_kwargs=True
    )
    before = models.forward(model)
    with apply_edit(model, weights):
        assert models.relative_error(models.forward(model), before) > 1e-3
    hook.remove()
    assert torch.equal(models.forward(model), before)
    x, grid, heads = caught["x"], (17, 20), attn.heads
    p = {name.removeprefix(f"1.{site}."): t for name, t in weights.tensors.items() if name.startswith("1.")}
    base = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    if site == "self":
        y = naive.edit_attention(x, base, p, grid, heads, weights.config)
        assert models.relative_error(caught["y"], attn.to_out[0](y)) < 1e-5
        return
    context = caught["encoder_hidden_states"]
    prompt = attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context)
    norms = [norm or torch.nn.Identity() for norm in (attn.norm_added_q, attn.norm_added_k, None)]
    normed = tuple(f(t.unflatten(-1, (heads, -1))).flatten(2) for f, t in zip(norms, prompt, strict=True))
    rows = naive.hybrid_attention(x, base, normed, p, grid, heads, weights.config, attn.norm_q, attn.norm_k)
    for y, linear, got in zip(rows, (attn.to_out[0], attn.to_add_out), caught["y"], strict=True):
        assert models.relative_error(got, linear(y)) < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_step_against_the_gradient_brings_it_nearer_to_the_teacher(backbone: str, preset: str) -> None:
    model = models.make(backbone).requires_grad_(False)
    weights = EDiTWeights.init(model, EDiTConfig.preset(preset), trainable="low_rank", rank=3)
    with apply_edit(model, weights) as handle:
        for module in (handle.sides, handle.differences):
            module.requires_grad_(True)
        parameters = handle.trainable()
        assert list(parameters) == list(weights.tensors)
        losses = []
        for _ in range(2):
            handle.tap = TransferTap(torch.Tensor.backward)
            models.forward(model)
            losses.append(torch.stack(list(handle.tap.losses.values())).mean())
            assert handle.tap.losses.keys() == {f"{b}.{s}" for b, sites in weights.sites.items() for s in sites}
            with torch.no_grad():
                for p in parameters.values():
                    p -= 1e-2 * p.grad / p.grad.norm().clamp(min=1e-12)
                    p.grad = None
    assert losses[1] < 0.999 * losses[0], losses


@pytest.mark.parametrize("kind", [EDiTAttention, HybridAttention])
@given(configs())
def test_all_layers_are_made_by_the_factory_on_the_device_and_in_the_dtype_asked_for(
    kind: type[EDiTAttention], config: EDiTConfig
) -> None:
    module = kind(72, config, OwnLayers, torch.device("meta"), torch.float16)
    made = {(p.device.type, p.dtype) for p in module.parameters()}
    assert made <= {("meta", torch.float16)}
    leaves = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    assert all(type(m).__qualname__.startswith("OwnLayers.") for m in leaves), leaves


class OwnLayers:
    """A host's own kinds of layers."""

    class Linear(nn.Linear): ...

    class Conv2d(nn.Conv2d): ...

    class GroupNorm(nn.GroupNorm): ...

    class LayerNorm(nn.LayerNorm): ...


def test_new_ones_start_at_the_teachers_queries_and_keys() -> None:
    weights = EDiTWeights.init(models.pixart(), EDiTConfig.preset("linfusion"))
    state = {name.removeprefix("0.self."): t for name, t in weights.tensors.items() if name.startswith("0.self.")}
    parts = {"down.bias", "down.weight", "norm.bias", "norm.weight", "up.bias", "up.weight"}
    assert state.keys() == {f"{name}.{part}" for name in ("mlp_q", "mlp_k") for part in parts}
    x, q = torch.randn(2, 30, 72), torch.randn(2, 30, 72)
    assert torch.equal(naive.mlp_fusion(x, q, state), q)
    assert (state["mlp_k.norm.weight"] == 1).all()
    assert float(state["mlp_k.down.weight"].std()) > 0.1
    assert not torch.equal(state["mlp_k.down.weight"], state["mlp_q.down.weight"])
    keys = EDiTWeights.init(models.pixart(), EDiTConfig(key="conv_fusion"))
    assert not keys.tensors["0.self.conv_fusion_k.up.weight"].any()
    assert keys.tensors["0.self.conv_fusion_k.down.weight"].any()
    assert not any("compress" in name for name in keys.tensors)


def test_a_local_branch_starts_without_an_effect_and_may_be_all_that_there_is(tmp_path: Path) -> None:
    model = models.pixart()
    config = EDiTConfig(query="plain", key="plain", local=True)
    weights = EDiTWeights.init(model, config)
    assert {name.split(".", 2)[2] for name in weights.tensors} == {"local.weight", "local.bias"}
    with apply_edit(model, weights):
        started = models.forward(model)
    with apply_edit(model, EDiTWeights.init(model, EDiTConfig.preset("sana"), trainable="full")):
        assert torch.equal(models.forward(model), started)
    weights.save(tmp_path / "w.safetensors")
    assert EDiTWeights.load(tmp_path / "w.safetensors").dim == identify_module(model).dim


# --- in files ---


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_a_saved_file_loads_equal(backbone: str, preset: str, tmp_path: Path) -> None:
    model = models.make(backbone)
    weights = trained(model, preset)
    weights.save(tmp_path / "w.safetensors")
    loaded, report = EDiTWeights.load_with_report(tmp_path / "w.safetensors")
    assert not report.unexpected
    assert loaded.config == weights.config == EDiTConfig.preset(preset)
    assert loaded.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in weights.tensors.items())
    base = identify_module(model)
    assert loaded.sites == {block: tuple(sorted(sites)) for block, sites in enumerate(base.sites)}
    assert loaded.dim == base.dim
    assert loaded.choose("all", base) == tuple(range(base.depth))


@pytest.mark.parametrize("trainable", ["low_rank", "full"])
@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_a_student_without_side_weights_is_its_differences(backbone: str, trainable: Any) -> None:
    model = models.make(backbone)
    weights = EDiTWeights.init(model, EDiTConfig.preset("sana"), layers="1", trainable=trainable, rank=1)
    assert all(name.startswith("base.transformer_blocks.1.") for name in weights.tensors)
    assert weights.sites == {1: identify_module(model).sites[1]}
    assert weights.dim == identify_module(model).dim
    before = models.forward(model)
    with apply_edit(model, weights) as handle:
        assert handle.blocks == (1,)
        assert not list(handle.sides.parameters())
        assert models.relative_error(models.forward(model), before) > 1e-3
    assert torch.equal(models.forward(model), before)
    with pytest.raises(EDiTWeightsError, match="hold no block 0; they hold 1"):
        apply_edit(model, weights, layers="0")
    with pytest.raises(EDiTWeightsError, match="channels, but this one has"):
        apply_edit(models.make(backbone, heads=2), weights)


def test_a_student_without_anything_to_train_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EDiTError, match="no side weights, and with trainable=side nothing else is trained"):
        EDiTWeights.init(models.pixart(), EDiTConfig.preset("sana"))
    arguments = ["model=m", "cache=c", f"output={tmp_path / 'out'}", "student={preset: sana}", "trainable=side"]
    assert main(["distill", "--config", "debug", *arguments]) == 2
    assert "nothing else is trained" in capsys.readouterr().err


def test_baking_in_all_that_there_is_is_refused(tmp_path: Path) -> None:
    model = models.pixart()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(EDiTError, match="their differences alone"):
        merge(trained(model, "sana"), tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {**metadata_of(path), **metadata})


def without(*parts: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def with_tensor(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


Q = "base.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("preset", "change", "part"),
    [
        ("linfusion", without("1.self.mlp_k.norm.weight"), "1 tensors are missing, 1.self.mlp_k.norm.weight"),
        ("linfusion", without("mlp_q"), "holds no <block>.<site>.mlp_q.up.weight"),
        ("linfusion", with_tensor("0.self.mlp_q.up.weight", 72, 9), "is 72x9, but compression=4 asks for 72x18"),
        ("linfusion", with_tensor("0.self.mlp_q.norm.weight", 9), "mlp_q.norm.weight is 9, but the config asks for 18"),
        ("kv_compression", without("1.self.compress_v"), "2 tensors are missing, 1.self.compress_v.conv.bias"),
        ("kv_compression", without("compress_k"), "holds no <block>.<site>.compress_k.conv.weight"),
        ("kv_compression", with_tensor("0.self.compress_k.conv.weight"), "holds no <block>"),
        ("kv_compression", with_tensor("0.self.compress_k.conv.weight", 0, 1, 3, 3), "0 channels, not for 1 to 65536"),
        (
            "kv_compression",
            with_tensor("0.self.compress_k.conv.weight", 9, 1, 3, 3),
            "is 72, but the config asks for 9",
        ),
        ("sana", without("base."), "holds no base.<linear>.weight or .lora_B.weight"),
        ("sana", without(f"{Q}.lora_A"), "to_q.lora_B.weight is not a whole difference"),
        ("sana", with_tensor(f"{Q}.lora_A.weight", 3, 71), "lora_A.weight is 3x71"),
        ("paper", without(".self."), "holds no <block>.<site>.conv_fusion.up.weight"),
    ],
)
def test_wrong_tensors_are_named_with_their_numbers(tmp_path: Path, preset: str, change: Any, part: str) -> None:
    path = tmp_path / "w.safetensors"
    trained(models.pixart(), preset).save(path)
    # safetensors has no empty file, as a weights file without any tensor would be
    rewrite(path, lambda tensors: (change(tensors), tensors.update(other=torch.zeros(1))))
    with pytest.raises(EDiTWeightsError, match=part) as caught:
        EDiTWeights.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_a_config_does_not_ask_for_are_reported_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    trained(models.pixart(), "sana").save(path)
    strange = {"0.self.conv_fusion.up.weight": (72, 18), "base.transformer_blocks.0.attn2.to_q.weight": (72, 72)}
    rewrite(path, lambda tensors: [with_tensor(name, *shape)(tensors) for name, shape in strange.items()])
    weights, report = EDiTWeights.load_with_report(path)
    assert set(report.unexpected) == set(strange)
    assert weights.sites == {0: ("self",), 1: ("self",)}


@pytest.mark.parametrize("backbone", models.BACKBONES)
@torch.no_grad()
def test_files_from_before_these_choices_load_and_compute_the_same(backbone: str, tmp_path: Path) -> None:
    model, path = models.make(backbone), tmp_path / "w.safetensors"
    weights = models.trained_like(model, config=EDiTConfig.preset("paper"))
    weights.save(path)
    old = {"compression": 4, "kv_stride": 2, "normaliser": "token_ratio", "softmax_features": "pre", "groups": 32}
    rewrite(path, lambda tensors: None, config=json.dumps({**old, "eps": 1e-6}))
    loaded = EDiTWeights.load(path)
    assert loaded.config == EDiTConfig() == EDiTConfig.preset("paper")
    with apply_edit(model, weights):
        expected = models.forward(model)
    with apply_edit(model, loaded):
        assert torch.equal(models.forward(model), expected)


@pytest.mark.parametrize(
    "name",
    [
        "0.self.compress_k.conv.weight",
        "0.self.mlp_q.up.weight",
        "0.joint.mlp_k.up.weight",
        "0.joint.conv_fusion_k.up.weight",
        f"{Q}.lora_A.weight",
    ],
)
def test_students_are_known_for_what_they_are_in_place_of_a_base(name: str) -> None:
    with pytest.raises(EDiTModelError, match="EDiT weights"):
        identify({name: (72, 72)}, "file")


# --- on the command line and in a training's configuration ---


def test_init_takes_a_preset_and_changes_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.safetensors"
    save_file(models.pixart().state_dict(), base)
    for i, (flags, config) in enumerate(
        (
            ([], EDiTConfig.preset("local")),
            (["--preset", "paper"], EDiTConfig()),
            (["--preset", "sana", "--trainable", "low_rank"], EDiTConfig.preset("sana")),
            (["--preset", "linfusion", "--compression", "2"], EDiTConfig.preset("linfusion", compression=2)),
            (["--preset", "linfusion", "--kernel", "relu", "--joint", "linear"],
             EDiTConfig(query="mlp", key="mlp", joint="linear")),
            (["--preset", "paper", "--query", "plain"], EDiTConfig(query="plain")),
            (["--no-local"], EDiTConfig(query="separable", key="plain", kernel="squared_relu")),
        )
    ):  # fmt: skip
        path = tmp_path / f"{i}.safetensors"
        assert main(["init", str(base), str(path), *flags]) == 0
        assert EDiTWeights.load(path).config == config
        assert main(["info", str(path), "--base", str(base)]) == 0
        assert "EDiT weights for pixart_sigma, blocks 0-1" in capsys.readouterr().out
    for flags, part in (
        (["--preset", "sana"], "trainable=side"),
        (["--preset", "sana", "--compression", "2"], "compression=2 has no meaning with query=plain and key=plain"),
        (["--preset", "paper", "--kernel", "softmax", "--joint", "linear"], "no meaning with kernel=softmax"),
    ):
        assert main(["init", str(base), str(tmp_path / "no.safetensors"), *flags]) == 2
        assert part in capsys.readouterr().err


def test_a_training_takes_a_preset_and_changes_to_it() -> None:
    from edit_core.distill.config import load_config

    made = load_config("debug", ["student={preset: linfusion, compression: 2}"])
    assert made.edit_config() == EDiTConfig.preset("linfusion", compression=2)
    assert load_config("debug").edit_config() == EDiTConfig.preset("local")
    assert load_config("debug", ["student={query: plain}"]).edit_config() == EDiTConfig.preset("local", query="plain")
    for student, part in (
        (
            "{preset: linear}",
            "preset must be one of paper, sana, linfusion, kv_compression, local, piecewise, not 'linear'",
        ),
        ("{preset: sana, kv_stride: 1}", "kv_stride=1 has no meaning with key=plain"),
    ):
        with pytest.raises(EDiTConfigError, match=part):
            load_config("debug", [f"student={student}"])
