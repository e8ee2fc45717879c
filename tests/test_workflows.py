"""The workflows that the pack ships, run on a real ComfyUI server with small stand-ins for the models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import cli, comfy, models, workflows
from support.server import PACK_NAME, Server, ServerError
from support.tools import tool
from support.workflows import (
    GUIDED,
    HEIGHT,
    NAMES,
    TEXT_LOADERS,
    WIDTH,
    WORKFLOWS,
    Prompt,
    api_file,
    draw,
    only,
    read_api,
    saves,
    small,
    write_stand_ins,
)

from edit_core import EDiTWeights, crossover
from edit_core.world.files import FOLDERS

server = workflows.server
comfy_cli = cli.comfy_cli
NOTES = ("MarkdownNote", "Note")
COSTLY = ("pixart_sigma_ab", "pixart_sigma_ab_2048", "pixart_sigma_4096", "pixart_sigma_calibrate", "pixart_alpha_ab",
          "pixart_alpha_ab_2048", "pixart_alpha_4096", "sd35_medium_ab_2048", "sd35_large_ab_2048")  # fmt: skip
"""PixArts at the one width that ComfyUI accepts, of which `make test` has time for the small world's alone; and what
differs from another in a size that the tests change."""
DRAWN = [pytest.param(name, marks=pytest.mark.slow if name in COSTLY else ()) for name in NAMES]


def read_template(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stand_ins(tmp_path_factory.mktemp("workflows"))


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict[str, Any]:
    return server.get_json("/object_info")


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_api_workflow_draws_its_pictures(server: Server, name: str) -> None:
    pictures = draw(server, name, NAMES.index(name))  # else some would have drawn a part of others' pictures
    assert len(pictures) == (2 if "_ab" in name else 1)
    for image in pictures.values():
        assert image.shape == ((540, 960, 3) if name.endswith("_benchmark") else (HEIGHT, WIDTH, 3))
        assert image.std() > 10
    assert len({image.tobytes() for image in pictures.values()}) == len(pictures)


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_base_picture_is_bit_equal_beside_and_after_edit(server: Server, backbone: str) -> None:
    (plain,) = draw(server, backbone).values()
    both = draw(server, f"{backbone}_ab")
    base, edit = both[f"EDiT/{backbone}_base"], both[f"EDiT/{backbone}_edit"]
    (alone,) = draw(server, f"{backbone}_edit").values()
    (after,) = draw(server, backbone).values()
    assert np.array_equal(base, plain)
    assert np.array_equal(after, plain)
    assert np.array_equal(edit, alone)
    assert not np.array_equal(edit, base)


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_the_seed_decides_the_picture(server: Server, backbone: str) -> None:
    first, other, again = (next(iter(draw(server, f"{backbone}_edit", seed).values())) for seed in (1, 2, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_crossover_measured_later_is_used_without_a_change_of_the_graph(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(server.base / "cache"))
    prompt = small(read_api("sd35_medium_edit"), seed=1)
    save, apply = only(prompt, "SaveImage"), only(prompt, "EDiTApply")
    prompt[apply]["inputs"]["min_tokens"] = -1

    def measure(tokens: int) -> None:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            crossover.save({crossover.key("sd35_medium", dtype, torch.device("cpu")): tokens})

    measure(0)
    linear = workflows.picture(server, server.run(prompt), save)
    assert apply in server.run(prompt).cached
    measure(1 << 20)
    dense = workflows.picture(server, server.run(prompt), save)
    assert np.array_equal(dense, next(iter(draw(server, "sd35_medium", 1).values())))
    assert not np.array_equal(dense, linear)


@pytest.mark.parametrize("backbone", models.SD35_FIRST)
def test_calibrated_weights_are_saved_and_can_be_applied(server: Server, model_files: Path, backbone: str) -> None:
    prompt = small(read_api(f"small_world_{backbone}_calibrate"), seed=3)
    save = only(prompt, "EDiTSaveWeights")
    (saved,) = server.run(prompt).outputs[save]["text"]
    weights = EDiTWeights.load(model_files.parent / saved)
    assert weights.training["steps"] == 2
    draw(server, f"small_world_{backbone}_ab", edit_name=Path(saved).name)


@pytest.mark.slow
def test_lora_controlnet_and_skip_layer_guidance_each_change_the_picture_beside_edit(server: Server) -> None:
    prompt = small(read_api(GUIDED), seed=1)
    save, apply = only(prompt, "SaveImage"), only(prompt, "EDiTApply")
    prompt[only(prompt, "KSampler")]["inputs"]["cfg"] = 4.5  # as in the other templates; this LoRA wants less

    def drawn(changes: dict[str, dict[str, Any]]) -> np.ndarray[Any, Any]:
        changed = json.loads(json.dumps(prompt))
        for node in changed.values():
            node["inputs"] |= changes.get(node["class_type"], {})
        result = server.run(changed)
        if apply not in result.cached:  # which says nothing
            assert result.outputs[apply]["edit_blocks"] == [0 if changes.get("EDiTApply") else 3, 3]
        return workflows.picture(server, result, save).astype(float)

    off: dict[str, dict[str, Any]] = {
        "LoraLoaderModelOnly": {"strength_model": 0.0},
        "ControlNetApplyAdvanced": {"strength": 0.0},
        "SkipLayerGuidanceSD3": {"scale": 0.0},
        "EDiTApply": {"layers": "none"},
    }
    everything, base = drawn({}), drawn(off)
    (plain,) = draw(server, "sd35_medium").values()
    assert np.array_equal(base, plain)
    differences = {kind: np.abs(drawn({kind: change}) - everything).mean() for kind, change in off.items()}
    alone = {
        kind: np.abs(drawn({other: change for other, change in off.items() if other != kind}) - base).mean()
        for kind in off
    }
    print(differences, alone)
    assert min(differences.values()) > 0.5, differences  # of 255
    assert min(alone.values()) > 0.5, alone
    assert np.array_equal(drawn({}), everything)


def test_the_script_of_the_docs_and_comfy_cli_draw_the_same_pictures(
    server: Server, tmp_path: Path, comfy_cli: Callable[..., str]
) -> None:
    guide = (comfy.PACK / "docs" / "headless.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "queue_workflow.py").write_text(script, encoding="utf-8")
    name = "small_world_sd35_medium_ab"
    prompt = small(read_api(name), seed=5)
    for node in saves(prompt).values():
        node["inputs"]["filename_prefix"] = node["inputs"]["filename_prefix"].replace("EDiT/", "EDiT/headless_")
    (tmp_path / "api.json").write_text(json.dumps(prompt), encoding="utf-8")

    command = [sys.executable, "queue_workflow.py", "api.json", f"http://127.0.0.1:{server.port}"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    by_script = [np.asarray(Image.open(tmp_path / line)) for line in process.stdout.split()]
    draw(server, name, seed=6)  # else nothing would be left to draw
    comfy_cli("run", "--workflow", str(tmp_path / "api.json"), "--wait", "--host", "127.0.0.1", "--port",
              str(server.port))  # fmt: skip
    files = sorted((server.base / "output" / "EDiT").glob("headless_*_00002_.png"))
    by_cli = [np.asarray(Image.open(path)) for path in files]
    assert len(by_script) == len(by_cli) == 2
    assert {image.tobytes() for image in by_script} == {image.tobytes() for image in by_cli}
    assert len({image.tobytes() for image in by_cli}) == 2


# --- what the server says of the pack ---------------------------------------------------------------------------------


def pack_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"}


def test_every_node_is_served_and_every_input_has_a_tooltip(object_info: dict[str, Any]) -> None:
    served = pack_nodes(object_info)
    written = {
        match
        for file in (comfy.PACK / "nodes").glob("*.py")
        for match in re.findall(r"^class (EDiT\w+)\(io\.ComfyNode\)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert served.keys() == written
    assert written
    bare = [
        f"{name}.{key}"
        for name, node in served.items()
        for section in ("required", "optional")
        for key, spec in node["input"].get(section, {}).items()
        if not spec[1].get("tooltip")
    ]
    assert bare == []


def test_english_names_and_tooltips_are_those_of_the_schemas(server: Server, object_info: dict[str, Any]) -> None:
    make = tool("make_locales")
    written = make.ENGLISH.read_text(encoding="utf-8")
    assert make.text_of(object_info) == written
    english = json.loads(written)
    served = server.get_json("/i18n")
    assert served["en"]["nodeDefs"] == english
    assert served["zh"]["nodeDefs"].keys() == english.keys()


def test_the_workflows_are_what_their_tool_writes(object_info: dict[str, Any]) -> None:
    make = tool("make_workflows")
    names = []
    for model in make.MODELS:
        note = make.small_note_of if model.text_loader == "EDiTSmallWorldText" else make.note_of
        for kind in model.kinds:
            names.append(model.name + kind)
            groups = make.groups_of(model, kind)
            assert make.api_of(groups) == read_api(names[-1])
            # Newer servers name outputs that older ones lack.
            made, kept = (comparable(t) for t in (make.ui_of(groups, note(model, kind), object_info),
                                                  read_template(names[-1])))  # fmt: skip
            assert made == kept
    assert sorted(names) == sorted(NAMES)


def comparable(template: dict[str, Any]) -> dict[str, Any]:
    """A template without the outputs that nothing is linked to."""
    template = json.loads(json.dumps(template))
    for node in template["nodes"]:
        node["outputs"] = [output for output in node["outputs"] if output["links"]]
    return template


def test_model_lists_offer_the_files_of_their_folders_and_the_shipped_ones(
    object_info: dict[str, Any], model_files: Path
) -> None:
    inputs = object_info["EDiTLoadModel"]["input"]["required"]
    folders = [model_files / "diffusion_models", model_files / "checkpoints", FOLDERS["diffusion_models"]]
    files = {f"{folder.name}/{path.name}" for folder in folders for path in folder.glob("*.safetensors")}
    weights = {path.name for folder in (model_files / "edit", FOLDERS["edit"]) for path in folder.glob("*.safetensors")}
    assert len(list(FOLDERS["edit"].glob("*.safetensors"))) == 2
    assert set(inputs["model_name"][1]["options"]) == files
    assert inputs["edit_weights"][1]["options"][0] == "none"
    assert set(inputs["edit_weights"][1]["options"]) == {"none", "piecewise (no weights)", *weights}


def test_templates_are_offered_with_their_pictures(server: Server) -> None:
    assert set(server.get_json("/workflow_templates")[PACK_NAME]) == set(NAMES)
    for name in NAMES:
        place = f"/api/workflow_templates/{PACK_NAME}/{name}"
        assert server.get_json(f"{place}.json") == read_template(name)
        assert server.get(f"{place}.jpg") == (WORKFLOWS / f"{name}.jpg").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_comfy_cli_accepts_the_api_workflow(
    object_info: dict[str, Any], name: str, tmp_path: Path, comfy_cli: Callable[..., str]
) -> None:
    info = tmp_path / "object_info.json"
    info.write_text(json.dumps(object_info))
    comfy_cli("workflow", "validate", "--workflow", str(api_file(name)), "--input", str(info))


def test_server_log_has_no_complaint_about_the_pack(server: Server) -> None:
    ours = [line for line in server.log_text().splitlines() if re.search(rf"{PACK_NAME}|edit_core|\bEDiT", line)]
    assert ours, "the log does not mention the pack at all"
    assert [
        line
        for line in ours
        if re.search(r'(?<!mean relative )error|fail|warn|exception|^\s*File "', line, re.IGNORECASE)
        and "EDiT: stays dense: 320 tokens are fewer than min_tokens" not in line  # as asked
    ] == []


@pytest.mark.parametrize(
    ("node", "values", "part"),
    [
        ("EDiTLoadWeights", {"edit_name": "absent.safetensors"}, "'absent.safetensors' is not in models/edit"),
        ("EDiTLoadModel", {"model_name": "diffusion_models/absent.sft"}, "is not in models/diffusion_models"),
        ("EDiTLoadModel", {"model_name": "vae/absent.sft"}, "must begin with diffusion_models/ or checkpoints/"),
        ("EDiTLoadModel", {"weight_dtype": "fp64"}, "'fp64' is not one of default, fp32"),
        ("EDiTLoadModel", {"edit_weights": "absent.safetensors"}, "'absent.safetensors' is not in models/edit"),
        ("EDiTApply", {"layers": "first"}, "'first' in 'first' is not a block or a range"),
        ("EDiTApply", {"start_percent": 2.0}, "2.0 is not between 0.0 and 1.0"),
        ("EDiTApply", {"start_percent": 0.9, "end_percent": 0.5}, "start_percent 0.9 is after end_percent 0.5"),
        ("EDiTApply", {"min_tokens": -2}, "smaller than min"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(
    server: Server, node: str, values: dict[str, Any], part: str
) -> None:
    prompt = small(read_api("small_world_pixart_sigma_benchmark"), seed=1)
    for entry in prompt.values():
        if entry["class_type"] == node:
            entry["inputs"] |= values
    with pytest.raises(ServerError, match=r"^/prompt: 400") as caught:
        server.run(prompt)
    refusal = str(caught.value)
    assert part in refusal or "not in list" in refusal  # newer cores check lists themselves


# --- the files themselves ---------------------------------------------------------------------------------------------


def prompt_of(template: dict[str, Any]) -> Prompt:
    """The API prompt that a template stands for, as the frontend makes it from nodes, widgets and links."""
    links = {link[0]: [str(link[1]), link[2]] for link in template["links"]}
    prompt: Prompt = {}
    for node in template["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for socket in node["inputs"]:
            if "widget" in socket:
                inputs[socket["name"]] = next(values)
                if socket["name"] == "seed" or node["type"] == "PrimitiveInt":
                    assert next(values) in ("fixed", "randomize")  # the widget that changes a seed after each run
            if socket["link"] is not None:
                inputs[socket["name"]] = links[socket["link"]]
        assert list(values) == []
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": node["title"]}}
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_template_and_api_file_are_the_same_graph(name: str) -> None:
    assert prompt_of(read_template(name)) == read_api(name)


@pytest.mark.parametrize("name", NAMES)
def test_template_links_agree_at_both_ends(name: str) -> None:
    template = read_template(name)
    nodes = {node["id"]: node for node in template["nodes"]}
    for number, source, output, target, slot, kind in template["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == number


@pytest.mark.parametrize("name", NAMES)
def test_template_layers_can_be_picked_and_unlinked_at_once(name: str) -> None:
    """The picker would show PixArt-Σ's blocks before a run; what a link hides comes to light when it is taken off."""
    depths = {"small_world_pixart_sigma": 6, "small_world_sd35_medium": 3, "pixart_sigma": 28, "sd35_medium": 24,
              "sd35_large": 38, "pixart_alpha": 28}  # fmt: skip
    depth = next(depth for model, depth in depths.items() if name.startswith(model))
    for node in read_template(name)["nodes"]:
        if (place := {"EDiTApply": 0, "EDiTInit": 1}.get(node["type"])) is not None:
            assert (node["widgets_values"][place], node["properties"]["edit_blocks"]) == ("all", depth)


@pytest.mark.parametrize("name", NAMES)
def test_template_nodes_do_not_overlap_and_lie_in_a_group(name: str) -> None:
    template = read_template(name)
    title = 30  # drawn above a node's position
    boxes = {
        node["id"]: (x, y - title, x + node["size"][0], y + node["size"][1])
        for node in template["nodes"]
        for x, y in [node["pos"]]
    }
    for (a, one), (b, two) in combinations(boxes.items(), 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, f"nodes {a} and {b} overlap"
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in template["groups"])]
    for node in template["nodes"]:
        left, top, right, bottom = boxes[node["id"]]
        inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(inside) == (0 if node["type"] in NOTES else 1), node["title"]


@pytest.mark.parametrize("name", NAMES)
def test_template_is_no_wider_than_a_screen(name: str) -> None:
    boxes = [(node["pos"][0], node["pos"][0] + node["size"][0]) for node in read_template(name)["nodes"]]
    assert max(right for _, right in boxes) - min(left for left, _ in boxes) <= 2070


@pytest.mark.parametrize("name", NAMES)
def test_template_asks_for_no_weights_that_nobody_published(name: str) -> None:
    nodes = [node for node in read_api(name).values() if node["class_type"] == "EDiTLoadWeights"]
    shipped = {path.name for path in FOLDERS["edit"].glob("*.safetensors")}
    assert {node["inputs"]["edit_name"] for node in nodes} <= shipped


@pytest.mark.parametrize("name", NAMES)
def test_template_note_names_every_file_and_its_folder(name: str) -> None:
    (note,) = (node["widgets_values"][0] for node in read_template(name)["nodes"] if node["type"] in NOTES)
    for node in read_api(name).values():
        for value in node["inputs"].values():
            if isinstance(value, str) and value.endswith(".safetensors"):
                assert f"`{value.rpartition('/')[2]}`" in note
    folders = {"EDiTLoadModel": "diffusion_models", "VAELoader": "vae"}
    folders |= {"EDiTLoadWeights": "edit", "EDiTSaveWeights": "edit"}
    folders |= {"LoraLoaderModelOnly": "loras", "ControlNetLoader": "controlnet"}
    folders |= dict.fromkeys(TEXT_LOADERS, "text_encoders")
    for folder in {folders[node["class_type"]] for node in read_api(name).values() if node["class_type"] in folders}:
        assert f"models/{folder}" in note


@pytest.mark.parametrize("name", NAMES)
def test_template_has_a_small_picture(name: str) -> None:
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path, formats=["JPEG"]) as image:
        assert min(image.size) >= 256


@pytest.mark.parametrize("path", [api_file(name) for name in NAMES] + [WORKFLOWS / f"{name}.json" for name in NAMES],
                         ids=lambda path: str(path.relative_to(WORKFLOWS)))  # fmt: skip
def test_workflow_holds_nothing_of_the_machine_it_was_made_on(path: Path) -> None:
    assert (
        re.findall(r"/home/|/root|/tmp|/work\b|[A-Z]:\\|localhost|127\.0\.0\.1", path.read_text(encoding="utf-8")) == []
    )
