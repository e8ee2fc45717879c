"""The translations: every node, input and output in every language, and English as the schemas have it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support import comfy

LOCALES = comfy.PACK / "locales"
LANGUAGES = ("en", "zh")


def read(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(tree: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every text by the keys that lead to it; an empty dictionary is one as well."""
    found: dict[tuple[str, ...], str] = {}
    for key, value in tree.items():
        path = (*above, key)
        found |= texts(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def test_languages_are_those_that_are_checked() -> None:
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)


def test_chinese_has_exactly_the_keys_of_english() -> None:
    assert texts(read("zh")).keys() == texts(read("en")).keys()


def test_every_node_of_the_source_is_translated() -> None:
    written = {
        match
        for file in (comfy.PACK / "nodes").glob("*.py")
        for match in re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert read("en").keys() == written


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_there_and_mean_nothing_to_the_pages_message_syntax(language: str) -> None:
    for path, text in texts(read(language)).items():
        if text == {}:  # a node without outputs
            continue
        assert text.strip(), path
        assert re.search(r"[{}@|$]", text) is None, path


def test_chinese_descriptions_and_tooltips_are_chinese() -> None:
    for path, text in texts(read("zh")).items():
        if path[-1] in ("description", "tooltip", "display_name"):
            assert re.search(r"[\u4e00-\u9fff]", text), path


def test_figures_and_file_names_are_the_same_in_both_languages() -> None:
    chinese = texts(read("zh"))
    for path, text in texts(read("en")).items():
        if path[-1] in ("description", "tooltip"):
            figures = r"\d+(?:[.x]\d+)*|models/\w+|`[^`]+`|\.safetensors"
            assert sorted(re.findall(figures, chinese[path])) == sorted(re.findall(figures, text)), path
