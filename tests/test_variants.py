"""A variant is one class: every name of a choice has its own, and what is to be known of it is known there."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from test_attention import close, randomised, sample
from torch import Tensor

from edit_core import EDiTConfig, EDiTConfigError, EDiTModelError, EDiTWeights, config
from edit_core.attention import SITES, VARIANTS, Form, Grid, Image, PlacedNorm, Projections
from edit_core.attention.call import Places
from edit_core.attention.forms import KERNELS
from edit_core.attention.keys import KEYS
from edit_core.attention.modules import LocalBranch
from edit_core.attention.queries import QUERIES
from edit_core.backbones import identify, identify_module
from edit_core.config import CHOICES
from edit_core.weights import fingerprint, fingerprint_distance

GRID, DIM, HEADS = (5, 6), 32, 2
FIELDS = {field.name: field.default for field in dataclasses.fields(EDiTConfig)}


def rows(config: EDiTConfig, site: str, grid: Grid = GRID, **norms: Any) -> Tensor:
    """Of an attention whose side weights and inputs are the same for all configs that have them."""
    torch.manual_seed(0)
    x, base, prompt = sample(1, grid, DIM, 4)
    module = SITES[site](DIM, config)
    for name, parameter in module.named_parameters():
        torch.manual_seed(len(name))
        parameter.data = 0.3 * torch.randn_like(parameter)
    if site == "self":
        return module(x, Projections(*base), grid, HEADS, **norms)
    return torch.cat(module(x, Projections(*base), Projections(*prompt), grid, HEADS, **norms), 1)


def test_every_name_of_a_choice_has_a_class_that_reads_fields() -> None:
    assert {field: tuple(variants) for field, variants in VARIANTS.items()} == CHOICES
    for field, variants in VARIANTS.items():
        assert FIELDS[field] in variants
        for name, variant in variants.items():
            assert variant.name == name and variant.reads <= FIELDS.keys()


@pytest.mark.parametrize("names", [("compressor", "plain"), ("compressor", "conv_fusion", "mlp", "plain", "new")])
def test_a_name_without_a_class_or_a_class_without_a_name_is_refused(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHOICES, "key", names)
    with pytest.raises(TypeError, match="key may be one of"):
        config._check_classes()


@pytest.mark.parametrize("field", VARIANTS)
def test_every_name_of_a_choice_computes_something_of_its_own(field: str) -> None:
    found = {}
    for name in CHOICES[field]:
        chosen = {field: name} if field != "quality" else {field: name, "kernel": "piecewise"}
        key = {"key": "plain"} if "piecewise" in chosen.values() else {}  # which takes no other
        found[name] = rows(EDiTConfig(**{**chosen, **key}), "joint", (12, 10))
    for a, b in itertools.combinations(found, 2):
        assert float((found[a] - found[b]).detach().norm() / found[a].detach().norm()) > 1e-3, (a, b)


@pytest.mark.parametrize(("query", "key"), list(itertools.product(QUERIES, KEYS)))
def test_weights_of_every_variant_are_made_known_and_told_from_bases(query: str, key: str, tmp_path: Path) -> None:
    model, path = models.pixart(), tmp_path / "w.safetensors"
    student = EDiTConfig.from_json(f'{{"query": "{query}", "key": "{key}"}}')
    weights = EDiTWeights.init(model, student, trainable="low_rank", rank=1)
    parts = {**QUERIES[query].parts, **KEYS[key].parts}
    assert {name.split(".")[2] for name in weights.tensors if not name.startswith("base.")} == set(parts)
    weights.save(path)
    loaded = EDiTWeights.load(path)
    assert loaded.dim == identify_module(model).dim and loaded.config == student
    for part, kind in parts.items():
        with pytest.raises(EDiTModelError, match="EDiT weights"):
            identify({f"0.self.{part}.{kind.tells}": (72, 18)}, "this")


def test_a_field_that_no_chosen_variant_reads_is_said_to_have_no_meaning() -> None:
    for fields, why in (
        ({"groups": 8, "query": "mlp"}, "groups=8 has no meaning with query=mlp and key=compressor"),
        ({"kv_stride": 1, "key": "plain"}, "kv_stride=1 has no meaning with key=plain"),
        ({"normaliser": "exact", "joint": "linear"}, "normaliser=exact has no meaning with joint=linear"),
        ({"normaliser": "exact", "kernel": "softmax"}, "normaliser=exact has no meaning with kernel=softmax"),
    ):
        with pytest.raises(EDiTConfigError, match=why):
            EDiTConfig(**fields)


class Mean(Form):
    """A form without side weights."""

    name = "mean"
    reads = frozenset({"eps"})

    def self_rows(self, sides: Any, image: Image) -> Tensor:
        return image.base.v.mean(1, keepdim=True).expand_as(image.base.v) + self.config.eps

    def joint_rows(
        self, sides: Any, image: Image, prompt: Projections, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.self_rows(sides, image), prompt.v if prompt_rows else None


def test_a_form_decides_what_is_read_whether_there_are_side_weights_and_what_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(KERNELS, "mean", Mean)
    monkeypatch.setitem(CHOICES, "kernel", tuple(KERNELS))
    student: Any = {"kernel": "mean", "eps": 0.5}
    assert not EDiTConfig(**student).side_weights
    for field, value in {"query": "mlp", "local": True, "kv_stride": 1}.items():
        with pytest.raises(EDiTConfigError, match=f"{field}={value} has no meaning with kernel=mean"):
            EDiTConfig(**student, **{field: value})
    for site, kind in SITES.items():
        assert not list(kind(DIM, EDiTConfig(**student)).parameters())
        _, base, prompt = (torch.manual_seed(0), *sample(1, GRID, DIM, 4))[1:]
        wanted = base[2].mean(1, keepdim=True).expand_as(base[2]) + 0.5
        got = rows(EDiTConfig(**student), site)
        assert torch.equal(got, wanted if site == "self" else torch.cat([wanted, prompt[2]], 1))


class Rotary(PlacedNorm):
    """Turns pairs of channels by a token's row and column."""

    def placed(self, tokens: Tensor, places: Tensor) -> Tensor:
        angle = (places.to(tokens.dtype) @ torch.tensor([0.3, 0.7], dtype=tokens.dtype))[:, None, None]
        a, b = tokens.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@pytest.mark.parametrize("fields", [{}, {"key": "plain"}, {"query": "mlp", "key": "conv_fusion"}])
@pytest.mark.parametrize("site", SITES)
def test_norms_that_ask_for_places_are_told_them_by_slices_too(
    site: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = EDiTConfig(**fields)
    stride = student.kv_stride if student.key == "compressor" else 1
    turn = Rotary()

    def everywhere(stride: int) -> Any:
        grid = tuple(range(0, side, stride) for side in GRID)
        places = torch.tensor(list(itertools.product(*grid)))
        return lambda tokens: turn.placed(tokens, places)

    wanted = rows(student, site, norm_q=everywhere(1), norm_k=everywhere(stride))
    close(rows(student, site, norm_q=turn, norm_k=turn), wanted, 1e-6)
    monkeypatch.setattr("edit_core.attention.slices.SLICE", 7)
    with torch.inference_mode():
        close(rows(student, site, norm_q=turn, norm_k=turn), wanted, 1e-5)
    assert Places((2, 3), 2).of(slice(2, 5), torch.device("cpu")).tolist() == [[0, 4], [2, 0], [2, 2]]


def test_a_local_branch_is_a_part_like_the_others() -> None:
    student = EDiTConfig.preset("local")
    assert list(student.parts) == ["conv_fusion", "local"] and student.parts["local"] is LocalBranch
    assert randomised(SITES["self"](DIM, student)).local.groups == DIM


def test_a_fingerprint_may_be_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a base whose linears have no biases."""
    model, other = models.pixart(), models.pixart(seed=7)
    base = identify_module(model)
    linears = base.backbone.linears
    monkeypatch.setattr(
        type(base.backbone), "linears", lambda _, *args: tuple(each._replace(bias=False) for each in linears(*args))
    )
    assert base.sampled(1) == "transformer_blocks.1.attn1.to_out.0.weight"
    own, half = (fingerprint(base, m.state_dict().__getitem__) for m in (model, models.pixart().half()))
    assert fingerprint_distance(own, half) < 0.05
    assert fingerprint_distance(own, fingerprint(base, other.state_dict().__getitem__)) > 1
    weights = EDiTWeights.init_for(base, model.state_dict().__getitem__, trainable="full")
    assert weights.warning(base, model.state_dict().__getitem__) is None
    for name, tensor in weights.tensors.items():
        if name.endswith("to_out.0.weight"):
            tensor.copy_(0.02 * torch.randn_like(tensor))
    state = {
        name: tensor + weights.tensors.get(f"base.{name}", torch.zeros(1))
        for name, tensor in model.state_dict().items()
    }
    assert "already" in str(weights.warning(base, state.__getitem__))
