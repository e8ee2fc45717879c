"""What the README says is what was measured, and what there is."""

from __future__ import annotations

import re

from support import comfy
from support.tools import tool

from edit_core.commands import COMMANDS

README = (comfy.PACK / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_measurements() -> None:
    fill = tool("fill_readme")
    assert fill.filled(README) == README
    guide = (comfy.PACK / "docs" / "training.md").read_text(encoding="utf-8")
    assert fill.filled_training(guide) == guide
    world = (comfy.PACK / "docs" / "world.md").read_text(encoding="utf-8")
    assert fill.filled_world(world) == world


def test_every_node_and_command_is_named() -> None:
    nodes = {
        match
        for file in (comfy.PACK / "nodes").glob("*.py")
        for match in re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert nodes
    for name in (*nodes, *COMMANDS):
        assert f"`{name}`" in README, name


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (comfy.PACK / link).exists(), link
