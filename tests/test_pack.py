"""The pack as it is published: the registry's archive, in a clean ComfyUI, and what publishing it rests on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support import cli, comfy
from support.server import PACK_NAME, Server
from support.tools import tool
from support.workflows import NAMES, Prompt, picture, read_api, saves

WORKFLOW = comfy.PACK / ".github" / "workflows" / "publish_action.yml"
PYPROJECT = (comfy.PACK / "pyproject.toml").read_text(encoding="utf-8")
CHANGELOG = (comfy.PACK / "CHANGELOG.md").read_text(encoding="utf-8")
MOST_BYTES = 25 * 10**6
comfy_cli = cli.comfy_cli
DRAWN = "small_world_pixart_sigma_ab"
(VERSION,) = re.findall(r'^version = "(\d+\.\d+\.\d+)"$', PYPROJECT, re.MULTILINE)
RELEASED = CHANGELOG.replace(f"## [{VERSION}] - Unreleased", f"## [{VERSION}] - 2026-01-02")


def copy_of_the_pack(folder: Path) -> Path:
    """What git tracks and what it would, as a repository: comfy-cli packs tracked files, and writes into the folder."""
    if not (comfy.PACK / ".git").exists():
        pytest.skip("not a git repository, of which comfy-cli makes an archive; its checks are skipped")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=comfy.PACK, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listing.split("\0")):
        if (source := comfy.PACK / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, comfy_cli: Callable[..., str]) -> Path:
    folder = copy_of_the_pack(tmp_path_factory.mktemp("packed"))
    comfy_cli("node", "pack", folder=folder)
    return folder / "node.zip"


# --- the archive ------------------------------------------------------------------------------------------------------


def test_archive_holds_what_the_pack_needs_and_nothing_of_its_making(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"docs", "edit_core", "locales", "nodes", "web", "workflows"}
    files = {name for name in names if "/" not in name}
    assert files == {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} | (
        files & {"SECURITY.md"}
    )
    assert not [name for name in names if re.search(r"docs/(training|world|bench|screens)|configs/", name)]
    for name in NAMES:
        assert {f"workflows/{name}.json", f"workflows/{name}.jpg", f"workflows/api/{name}.json"} <= names
    assert len([name for name in names if re.search(r"world/models/\w+/.+\.safetensors$", name)]) == 6
    assert archive.stat().st_size < MOST_BYTES


def test_archive_names_no_torch_to_install_and_holds_no_pickle(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        pyproject = packed.read("pyproject.toml").decode()
        begins = {name: packed.read(name)[:8] for name in names}
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r'"([\w-]+)', dependencies)) == ["einops", "safetensors"]
    assert "requirements.txt" not in names
    assert {Path(name).suffix for name in names if "." in Path(name).name} <= {
        ".css", ".jpg", ".js", ".json", ".md", ".png", ".py", ".safetensors", ".toml", ".typed"
    }  # fmt: skip
    # Of protocol 2 and later, and the zip of torch.save.
    assert [name for name, begin in begins.items() if begin.startswith((b"\x80", b"PK"))] == []


def test_comfy_cli_finds_nothing_wrong_with_the_pack(comfy_cli: Callable[..., str]) -> None:
    said = comfy_cli("node", "validate")
    assert "All validation checks passed" in said
    assert "arning" not in said


@pytest.fixture(scope="module", params=comfy.checkouts() or [Path("none")], ids=lambda path: path.name)
def installed(
    request: pytest.FixtureRequest, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A ComfyUI with no models and no other pack, and the archive unpacked in its custom_nodes."""
    if not comfy.checkouts():
        pytest.skip(comfy.NO_COMFYUI)
    with Server(request.param, tmp_path_factory.mktemp(request.param.name), archive) as running:
        yield running


def pictures_of(server: Server, prompt: Prompt) -> dict[str, np.ndarray[Any, Any]]:
    result = server.run(prompt)
    return {node["inputs"]["filename_prefix"]: picture(server, result, key) for key, node in saves(prompt).items()}


@pytest.fixture(scope="module")
def drawn(installed: Server) -> dict[str, np.ndarray[Any, Any]]:
    return pictures_of(installed, read_api(DRAWN))


@pytest.mark.slow
def test_archive_runs_in_a_clean_comfyui(installed: Server, drawn: dict[str, np.ndarray[Any, Any]]) -> None:
    pack = installed.base / "custom_nodes" / PACK_NAME
    assert not pack.is_symlink()
    info = installed.get_json("/object_info")
    served = {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert len(served) == 10
    assert served == {path.stem for path in (comfy.PACK / "web" / "docs").glob("EDiT*.md")}
    for name in served:
        page = installed.get(f"/extensions/{PACK_NAME}/docs/{name}.md")
        assert page == (comfy.PACK / "web" / "docs" / f"{name}.md").read_bytes()
    scripts = [path for path in installed.get_json("/extensions") if path.startswith(f"/extensions/{PACK_NAME}/")]
    assert {Path(path).name for path in scripts} == {path.name for path in (comfy.PACK / "web").glob("*.js")}
    for path in scripts:
        assert installed.get(path) == (pack / "web" / path.removeprefix(f"/extensions/{PACK_NAME}/")).read_bytes()
    assert set(installed.get_json("/workflow_templates")[PACK_NAME]) == set(NAMES)

    assert len(drawn) == 2
    assert all(image.std() > 10 for image in drawn.values())

    log = installed.log_text()
    assert "IMPORT FAILED" not in log
    ours = [line for line in log.splitlines() if re.search(rf"{PACK_NAME}|edit_core|\bEDiT", line)]
    assert ours, "the log does not mention the pack at all"
    assert [line for line in ours if re.search(r"error|fail|warn|exception|^\s*File \"", line, re.IGNORECASE)] == []


@pytest.mark.slow
def test_a_renamed_node_is_replaced_where_comfyui_can(
    installed: Server, drawn: dict[str, np.ndarray[Any, Any]], archive: Path, tmp_path: Path
) -> None:
    """With an entry in the table of renames. Where ComfyUI cannot, the pack loads nonetheless: that is tested above."""
    if "class NodeReplace" not in (installed.checkout / "comfy_api" / "latest" / "_io.py").read_text(encoding="utf-8"):
        pytest.skip(f"{installed.checkout.name} replaces no nodes")
    table, renamed = "RENAMED: dict[str, str] = {", tmp_path / "node.zip"
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(renamed, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            if name == "nodes/renames.py":
                assert data.count(table.encode()) == 1
                data = data.replace(table.encode(), (table + '"EDiTOldApply": "EDiTApply", ').encode())
            after.writestr(name, data)
    prompt = read_api(DRAWN)
    for node in prompt.values():
        if node["class_type"] == "EDiTApply":
            node["class_type"] = "EDiTOldApply"
    with Server(installed.checkout, tmp_path / "base", renamed) as running:
        (entry,) = running.get_json("/node_replacements")["EDiTOldApply"]
        assert entry["new_node_id"] == "EDiTApply"
        assert entry["old_widget_ids"] == ["layers", "start_percent", "end_percent", "min_tokens", "quality"]
        assert entry["output_mapping"] == [{"old_idx": 0, "new_idx": 0}]
        again = pictures_of(running, prompt)
    assert again.keys() == drawn.keys()
    assert all(np.array_equal(again[name], drawn[name]) for name in drawn)


# --- publishing it ----------------------------------------------------------------------------------------------------


def test_the_changelog_has_an_entry_for_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\] - (?:Unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert versions[0] == VERSION
    assert len(versions) == CHANGELOG.count("\n## [")


def test_the_workflow_publishes_tags_alone_with_the_least_rights() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert "permissions" not in job
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [action.partition("@")[0] for action in actions] == ["actions/checkout", "Comfy-Org/publish-node-action"]
    for action in actions:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), f"{action} is not pinned to a commit"
    secrets = re.findall(r"\$\{\{(.*?)\}\}", WORKFLOW.read_text(encoding="utf-8"))
    assert [secret.strip() for secret in secrets] == ["secrets.REGISTRY_ACCESS_TOKEN"]


def test_the_workflow_fills_in_the_addresses_and_hands_on_the_changes(
    tmp_path: Path, comfy_cli: Callable[..., str]
) -> None:
    """Its own script, as GitHub runs it."""
    from comfy_cli.registry.config_parser import extract_node_configuration

    pack = copy_of_the_pack(tmp_path / "pack")
    (pack / "CHANGELOG.md").write_text(RELEASED, encoding="utf-8")
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    (script,) = [step["run"] for step in job["steps"] if "run" in step]
    handed = tmp_path / "env"
    environment = {"PATH": os.environ["PATH"], "GITHUB_ENV": str(handed), "GITHUB_REPOSITORY": "someone/pack"}
    for tag, status in (("v9.9.9", 1), (f"v{VERSION}", 0)):
        process = subprocess.run(
            ["bash", "-e", "-c", script], cwd=pack, env=environment | {"GITHUB_REF_NAME": tag}, capture_output=True
        )
        assert process.returncode == status, process.stderr
        assert handed.exists() == (status == 0)

    config: Any = extract_node_configuration(str(pack / "pyproject.toml"))
    assert config.project.urls.repository == "https://github.com/someone/pack"
    assert config.project.urls.issues == "https://github.com/someone/pack/issues"
    assert config.project.supported_comfyui_version == ">=0.3.64"
    assert config.project.license.text == "Apache-2.0"
    root = f"https://raw.githubusercontent.com/someone/pack/v{VERSION}/"
    for address, (ratio, most) in ((config.tool_comfy.icon, (1, 400)), (config.tool_comfy.banner_url, (21 / 9, 1280))):
        assert address.startswith(root)
        with Image.open(comfy.PACK / address.removeprefix(root), formats=["PNG"]) as picture:
            assert picture.width / picture.height == pytest.approx(ratio)
            assert picture.width <= most
    first, *changes, last = handed.read_text(encoding="utf-8").splitlines()
    assert first == f"COMFY_NODE_CHANGELOG<<{last}"
    assert "\n".join(changes) == tool("release").changes(RELEASED, VERSION)
    assert changes[0].startswith("### ")
    comfy_cli("node", "validate", folder=pack)


def test_a_version_without_a_date_is_not_released() -> None:
    release = tool("release")
    with pytest.raises(ValueError, match="put the date there"):
        release.changes("## [1.0.0] - Unreleased\n\n- This.\n", "1.0.0")
    with pytest.raises(ValueError, match=re.escape("no entry [1.0.0]")):
        release.changes("## [1.0.1] - 2026-01-02\n\n- This.\n", "1.0.0")
    text = "# Changelog\n\n## [1.1.0] - 2026-01-02\n\n- That.\n\n## [1.0.0] - 2026-01-01\n\n- This.\n"
    assert release.changes(text, "1.1.0") == "- That."
    assert release.changes(text, "1.0.0") == "- This."


def test_the_workflow_stays_out_of_the_archive(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        assert not [name for name in packed.namelist() if name.startswith(".")]
