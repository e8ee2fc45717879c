"""Configurations and layer lists: what they accept, and what they say otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_core import EDiTConfig, EDiTConfigError, EDiTError
from edit_core.config import PRESETS
from edit_core.layers import check_layers, format_layers, parse_layers


@pytest.mark.parametrize(
    "fields",
    [
        {"compression": 0},
        {"compression": 4.0},
        {"compression": True},
        {"kv_stride": 5},
        {"groups": -1},
        {"normaliser": "softmax"},
        {"softmax_features": None},
        {"eps": 0.0},
        {"eps": float("nan")},
        {"eps": "1e-6"},
        {"kernel": "gelu"},
        {"query": True},
        {"key": "softmax"},
        {"joint": None},
        {"kernel": "softmax", "key": "plain"},
        {"joint": "linear", "kernel": "softmax"},
        {"normaliser": "exact", "kernel": "softmax"},
        {"softmax_features": "post", "kernel": "softmax"},
        {"eps": 1e-4, "kernel": "softmax"},
        {"normaliser": "exact", "joint": "linear"},
        {"softmax_features": "post", "joint": "linear"},
        {"kv_stride": 1, "key": "mlp"},
        {"local": 1},
        {"softmax_features": "post", "kernel": "squared_relu"},
        {"groups": 8, "query": "mlp"},
        {"compression": 2, "query": "plain"},
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(EDiTConfigError, match=next(iter(fields))) as caught:
        EDiTConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"compresion": 4}', "[" * 100_000])
def test_damaged_json_is_a_config_error(text: str) -> None:
    with pytest.raises(EDiTConfigError):
        EDiTConfig.from_json(text)


def test_json_round_trip() -> None:
    config = EDiTConfig(compression=2, normaliser="exact", softmax_features="post", kv_stride=1, groups=8, eps=1e-4)
    assert EDiTConfig.from_json(config.to_json()) == config


def test_presets_differ_from_the_defaults_as_published() -> None:
    assert EDiTConfig.preset("paper") == EDiTConfig()
    for name in PRESETS:
        config = EDiTConfig.preset(name)
        assert EDiTConfig.from_json(config.to_json()) == config
        assert config.side_weights is (name not in ("sana", "piecewise"))
        assert config.needs_weights is (name != "piecewise")
    assert EDiTConfig.preset("sana", joint="hybrid") == EDiTConfig(query="plain", key="plain")
    with pytest.raises(EDiTConfigError, match=r"preset must be one of paper, .*, not 'edit'"):
        EDiTConfig.preset("edit")
    with pytest.raises(EDiTConfigError, match="kernel=softmax needs key=compressor, not plain"):
        EDiTConfig.preset("sana", kernel="softmax")


def test_compression_must_divide_the_width() -> None:
    assert EDiTConfig(compression=4).hidden(1152) == 288
    with pytest.raises(EDiTConfigError, match="1152"):
        EDiTConfig(compression=7).hidden(1152)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("all", range(28)),
        (" None ", []),
        ("0, 3-9, 27", [0, *range(3, 10), 27]),
        ("5,5,4-6", [4, 5, 6]),
        ("2 - 3", [2, 3]),
    ],
)
def test_layer_lists_are_read(text: str, blocks: Any) -> None:
    assert parse_layers(text, 28) == tuple(blocks)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a block"),
        ("0;3", "0;3"),
        ("-1", "-1"),
        ("1,", "not a block"),
        ("28", "0-27"),
        ("9-3", "3-9"),
        ("0x1", "0x1"),
        ("9" * 5000, "not a block"),
        ("¹", "not a block"),
    ],
)
def test_a_bad_layer_list_says_what_is_wrong(text: str, part: str) -> None:
    with pytest.raises(EDiTError, match=part):
        parse_layers(text, 28)


@given(st.sets(st.integers(0, 39)))
def test_formatted_layers_read_back(blocks: set[int]) -> None:
    assert parse_layers(format_layers(blocks), 40) == tuple(sorted(blocks))


def test_the_form_of_a_list_is_checked_without_writing_out_its_ranges() -> None:
    check_layers("0-999999, " * 2000 + "7")  # seconds, and gigabytes, if they were
    check_layers(" None ")
    with pytest.raises(EDiTError, match="not a block or a range") as caught:
        check_layers("x" * 9000 + "\n")
    assert len(str(caught.value)) < 300
    with pytest.raises(EDiTError, match="runs backwards; write 2-5"):
        check_layers("0, 5-2")
