"""How the code is laid out: who may name a backbone, who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = re.compile(r"pixart|sd_?3|mmdit", re.IGNORECASE)
NAMING = ("edit_core/backbones/", "edit_core/configs/", "edit_core/world/", "nodes/small_world.py")
"""Where a backbone may be named: its description, the shipped configurations, and the small world."""
COMFYUI = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "nodes",
    "server",
}  # fmt: skip
LONGEST = 600
"""Lines of a file."""


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- names ---


def texts(module: ast.Module) -> set[ast.AST]:
    """The strings that stand alone, which are docstrings."""
    return {node.value for node in ast.walk(module) if isinstance(node, ast.Expr)}


def named(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and what stands in them: identifiers, and strings that are not for people, which hold a space."""
    aside = texts(module)
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node not in aside and not re.search(r"\s", node.value):
                yield line, node.value
        elif isinstance(node, ast.alias):
            yield line, f"{node.name} {node.asname or ''}"
        elif isinstance(node, ast.ImportFrom):
            yield line, node.module or ""
        else:
            fields = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
            yield from ((line, field) for field in fields if isinstance(field, str))


def test_strings_for_people_and_docstrings_are_told_from_names() -> None:
    code = '"""sd3"""\nx = "a PixArt file"\ny: int = 1\n"""Of sd35."""\nis_pixart(name == "sd3", SD3Model, pixart=1)'
    found = {text for _, text in named(ast.parse(code)) if NAMES.search(text)}
    assert found == {"sd3", "is_pixart", "SD3Model", "pixart"}


def test_no_backbone_is_named_outside_its_description() -> None:
    found = [
        f"{place(path)}:{line}: {text}"
        for path in (ROOT / "__init__.py", *files("edit_core", "nodes"))
        if not place(path).startswith(NAMING)
        for line, text in named(tree(path))
        if NAMES.search(text)
    ]
    assert not found, "\n".join(found)


# --- imports ---


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """Modules that a file imports as it is loaded, or anywhere; those for type checkers alone do not count."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[str] = set()
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found


def modules() -> dict[str, Path]:
    """The package's modules by name."""
    found = {}
    for path in files("edit_core"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(everywhere: bool = False) -> dict[str, set[str]]:
    """Modules of the package -> those that they import; that a module's packages are loaded first does not count."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        wanted = (full if full in known else full.rpartition(".")[0] for full in imports(path, everywhere))
        found[name] = {other for other in wanted if other in known and other != name}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One of the circles, or nothing."""
    done: set[str] = set()
    way: list[str] = []

    def walk(node: str) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        way.append(node)
        for other in sorted(edges.get(node, ())):
            if found := walk(other):
                return found
        done.add(way.pop())
        return []

    return next(filter(None, map(walk, sorted(edges))), [])


def rooms(everywhere: bool = False) -> dict[str, set[str]]:
    """The same between the package's folders."""
    found: dict[str, set[str]] = {}
    for name, others in graph(everywhere).items():
        folders = {part.split(".")[1] for part in others if part.count(".")}
        if name.count("."):
            room = name.split(".")[1]
            found.setdefault(room, set()).update(folders - {room})
    return {
        room: {other for other in others if (ROOT / "edit_core" / other).is_dir()} for room, others in found.items()
    }


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_one_that_imports_it() -> None:
    edges = graph()
    assert edges["edit_core.attention.linear"] <= edges.keys() and edges["edit_core.cli"]
    assert not (found := circle(edges)), " -> ".join(found)


def test_the_kernels_stand_below_attention_and_without_the_benchmark() -> None:
    """Wherever an import stands: one that waits in a function is a circle all the same."""
    found = rooms(everywhere=True)
    assert "bench" not in found["kernels"]
    assert not ("attention" in found["kernels"] and "kernels" in found["attention"])


@pytest.mark.parametrize("path", files("edit_core"), ids=place)
def test_the_core_never_imports_comfyui(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, everywhere=True)} & COMFYUI


# --- sizes, and the map ---


def test_no_file_is_long() -> None:
    lengths = {
        place(path): len(path.read_text("utf-8").splitlines()) for path in files("edit_core", "nodes", "tests", "tools")
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_the_map_names_what_there_is() -> None:
    """Every path that ARCHITECTURE.md sets in code type, from the root or from `edit_core`."""
    paths = re.findall(r"`([\w./]+(?:\.py|\.md|/))`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(paths) > 20
    assert not [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "edit_core"))]
