"""What the README says is what was measured, and what there is."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from support import comfy
from support.tools import tool

from edit_core.commands import COMMANDS
from edit_core.config import CHOICES, PRESETS

DOCS = comfy.PACK / "docs"
SOURCES = [path for folder in ("nodes", "edit_core") for path in (comfy.PACK / folder).rglob("*.py")]
EXPLAINED = (
    "nodes/", "edit_core/backbones/", "edit_core/hosts/", "edit_core/layers.py", "edit_core/weights/file.py",
    "edit_core/weights/fingerprint.py", "edit_core/weights/weights.py",
)  # fmt: skip
"""Where whatever is raised or warned of must be explained."""
README = (comfy.PACK / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_measurements() -> None:
    fill = tool("fill_readme")
    for path, filled in fill.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert filled(page) == page, path.name


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
    for page in (comfy.PACK / "README.md", *DOCS.glob("*.md"), *(comfy.PACK / "web" / "docs").glob("*.md")):
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
        for link in links:
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_help_pages_name_every_input_and_output_and_have_a_picture() -> None:
    nodes = json.loads((comfy.PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, node in nodes.items():
        page = (comfy.PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n"), name
        assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(node["inputs"]), name
        given = re.findall(r"^(?:- )?`(\w+)`[:,]", page, re.MULTILINE)
        assert given == [output["name"] for output in node["outputs"].values()], name
        assert f"](pictures/{name}.jpg)" in page


def test_the_readme_is_read_in_one_sitting() -> None:
    assert README.count("\n") < 200


def test_how_it_works_names_every_preset_and_what_the_paper_leaves_open() -> None:
    page = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"| `{name}`" in page
    for field in ("normaliser=exact", "softmax_features=post"):
        name, _, value = field.partition("=")
        assert value in CHOICES[name]
        assert f"`{field}`" in page


# --- troubleshooting --------------------------------------------------------------------------------------------------


def message(node: ast.AST) -> str:
    """A string of a source file, with `…` for what is filled in; of anything else, nothing."""
    if isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore
        return re.sub("…+", "…", text)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub("%[sd]", "…", node.value)
    return ""


def messages(path: Path) -> set[str]:
    return {text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if (text := message(node))}


def raised(path: Path) -> set[str]:
    """What a source file raises as an error of ours or warns of; not what only hands another text on."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "dense_reason":
            found |= {message(each.value) for each in ast.walk(node) if isinstance(each, ast.Return) and each.value}
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if re.fullmatch(r"EDiT\w*Error|warning", name):
                found.add(message(node.args[0]))
    return {text for text in found if len(re.findall(r"\w{2,}", text)) > 3}


def explained() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    there = set().union(*map(messages, SOURCES))
    quoted = explained()
    assert len(quoted) > 40
    assert len(set(quoted)) == len(quoted)
    assert [text for text in quoted if text not in there and f"EDiT: {text}" not in there] == []


def test_troubleshooting_explains_all_that_a_user_of_the_nodes_may_be_told() -> None:
    sources = [path for path in SOURCES if str(path.relative_to(comfy.PACK)).startswith(EXPLAINED)]
    told = set().union(*map(raised, sources))
    assert len(told) > 30
    assert sorted(told - set(explained())) == []


def test_help_pages_quote_messages_that_there_are() -> None:
    there = {text for text in set().union(*map(messages, SOURCES)) if "\n" not in text}
    for page in sorted((comfy.PACK / "web" / "docs").glob("*.md")):
        wrong = page.read_text(encoding="utf-8").partition("## If something goes wrong")[2]
        for quote in re.findall(r'\*"([^"]+)"\*', wrong):
            assert any(quote.strip("… ") in text for text in there), f"{page.name}: {quote}"


def test_a_message_that_is_gone_is_missed(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        """raise EDiTError(f"{path}: {count} tensors are missing, " f"{first} among them")\n"""
        """logger.warning("EDiT: another node patched %s", path)\nlogger.info("EDiT: all is well here")\n""",
        encoding="utf-8",
    )
    told = {"…: … tensors are missing, … among them", "EDiT: another node patched …"}
    assert raised(source) == told
    assert messages(source) >= told | {"EDiT: all is well here"}
