"""What the pack brings into a ComfyUI: nothing that runs a file's content, another program or the network."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support import comfy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

RUNS = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "code", "codeop", "runpy",
    "subprocess", "pty", "multiprocessing", "ctypes", "cffi", "webbrowser", "antigravity",
}  # fmt: skip
"""Modules that run what a file or a message holds, or another program."""
NETWORK = {
    "socket", "socketserver", "ssl", "http", "urllib", "urllib3", "requests", "aiohttp", "httpx", "ftplib", "smtplib",
    "telnetlib", "xmlrpc", "websockets", "huggingface_hub", "fsspec", "s3fs", "gcsfs", "datasets", "torch.hub",
}  # fmt: skip
BUILT_IN = {"eval", "exec", "compile", "__import__"}
OF_OS = {"system", "popen", "startfile", "fork", "forkpty", "posix_spawn", "posix_spawnp"}  # and exec*, spawn*
FETCHES = {"edit_core.distill.remote", "edit_core.distill.sources"}
"""What reads a URL or a data set that a training's configuration names; nothing in ComfyUI leads there."""


def shipped() -> dict[str, ast.Module]:
    """The Python files of the archive, by module name: what git holds but .comfyignore leaves out."""
    left_out = [line.rstrip("/") for line in (ROOT / ".comfyignore").read_text().splitlines() if line]
    found = {}
    for path in sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "edit_core").rglob("*.py")]):
        relative = path.relative_to(ROOT)
        assert not any(fnmatch.fnmatch(str(relative), f"{pattern}*") for pattern in left_out), relative
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


SHIPPED = shipped()


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Absolute names of all that a module imports, within functions too; of a `from` import the parts as well."""
    package = name.split(".") if (ROOT / Path(*name.split("."))).is_dir() else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_nothing_that_ships_can_run_a_files_content_or_another_program() -> None:
    for name, tree in SHIPPED.items():
        assert not (bad := [module for module in imports(name, tree) if within(module, RUNS)]), (name, bad)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            what, options = called(node), {option.arg: ast.unparse(option.value) for option in node.keywords}
            where = f"{name}:{node.lineno}: {what}"
            assert what not in BUILT_IN, where
            last = what.removeprefix("os.")
            assert not (what.startswith("os.") and (last in OF_OS or last.startswith(("exec", "spawn")))), where
            assert not what.startswith("torch.hub.") or what == "torch.hub.get_dir", where
            if what == "torch.load":
                assert options.get("weights_only") == "True", where
            if what.endswith("load_torch_file"):  # ComfyUI's own; safetensors but where it says so
                assert options.get("safe_load", "True") == "True", where
            if what.endswith("from_pretrained") and what != "AutoTokenizer.from_pretrained":
                assert options.get("local_files_only") == "True", where
            assert options.get("trust_remote_code", "False") == "False", where
            assert options.get("allow_pickle", "False") == "False", where
            assert not re.fullmatch(r"yaml\.(load|load_all|full_load|unsafe_load)", what), where


def test_the_network_is_touched_only_where_a_training_is_given_an_address() -> None:
    touching = {name for name, tree in SHIPPED.items() if any(within(m, NETWORK) for m in imports(name, tree))}
    assert touching == FETCHES


def test_nothing_in_comfyui_leads_to_what_touches_the_network() -> None:
    """The closure of all imports from the pack's entry, also of those that only functions make."""
    reached, waiting = set[str](), ["__init__"]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in SHIPPED:
            continue
        reached.add(name)
        found = [*imports(name, SHIPPED[name])]
        waiting += found
        waiting += [".".join(m.split(".")[:end]) for m in found for end in range(1, m.count(".") + 1)]
    assert {"nodes.calibrate", "edit_core.weights", "edit_core.distill.transfer"} <= reached
    assert not reached & FETCHES


def test_the_walk_sees_what_it_looks_for() -> None:
    tree = ast.parse("def f():\n    from ..distill import remote\n    import os.path, urllib.request as u\n")
    found = set(imports("edit_core.commands.cache", tree))
    assert {"edit_core.distill", "edit_core.distill.remote", "urllib.request"} <= found
    assert within("urllib.request", NETWORK) and not within("urllibx", NETWORK)


def test_pages_scripts_fetch_and_evaluate_nothing() -> None:
    scripts = [*(ROOT / "web").rglob("*.js")]
    assert scripts
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\beval\(|new Function|importScripts|https?://|innerHTML|document\.write", text), path


def test_bandit_finds_nothing() -> None:
    command = [sys.executable, "-m", "bandit", "-q", "-r", "-f", "json", "-c", "pyproject.toml"]
    child = subprocess.run([*command, "edit_core", "nodes", "__init__.py"], cwd=ROOT, capture_output=True, text=True)
    report = json.loads(child.stdout)
    assert report["errors"] == []
    assert [(r["filename"], r["line_number"], r["issue_text"]) for r in report["results"]] == []
    assert report["metrics"]["_totals"]["loc"] > 5000
    assert report["metrics"]["_totals"]["nosec"] == report["metrics"]["_totals"]["skipped_tests"] == 0


def project() -> dict[str, Requirement]:
    """What the pack installs inside a ComfyUI."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {r.name.lower(): r for r in map(Requirement, data["project"]["dependencies"])}


def versions(specifiers: SpecifierSet) -> Iterator[str]:
    """The versions that a range names, and one far above."""
    yield from (specifier.version.removesuffix(".*") for specifier in specifiers)
    yield "99"


def test_dependencies_are_few_and_bounded_only_from_below() -> None:
    found = project()
    assert set(found) == {"safetensors", "einops"}
    for requirement in found.values():
        assert {specifier.operator for specifier in requirement.specifier} == {">="}, requirement


@pytest.mark.skipif(not comfy.checkouts(), reason=comfy.NO_COMFYUI)
def test_dependencies_allow_what_comfyui_allows() -> None:
    """Of each of ours that ComfyUI asks for as well, its lowest version will do; so nothing installed is replaced."""
    for checkout in comfy.checkouts():
        lines = (checkout / "requirements.txt").read_text(encoding="utf-8").splitlines()
        theirs = {r.name.lower(): r for r in map(Requirement, filter(re.compile("[A-Za-z]").match, lines))}
        for name, ours in project().items():
            assert name in theirs, f"{checkout.name} does not bring {name}"
            low = [s.version for s in theirs[name].specifier if s.operator == ">="]
            assert all(ours.specifier.contains(version) for version in low), (checkout.name, str(theirs[name]))


def test_the_lock_pins_every_package_with_its_digests() -> None:
    """`requirements.lock` is what development installs; `make lock` writes it anew from pyproject.toml."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    assert len(pinned) > 60
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *data["project"]["dependencies"],
        *(r for e in data["project"]["optional-dependencies"].values() for r in e),
    ]
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned}
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "edit-attention":
            assert requirement.specifier.contains(names[name]), requirement
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]
