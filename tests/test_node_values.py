"""No node answers a widget's value with a traceback: any that the page lets through, in every ComfyUI that is found.

Values are drawn from the schemas, and go through ComfyUI's own validation and execution, with small models.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import comfy, models

from edit_core.world.files import save_teacher
from edit_core.world.teachers import build

SCRIPT = Path(__file__).parent / "comfyui" / "values.py"
FOUND = comfy.checkouts()
NODES = (
    "EDiTLoadModel", "EDiTLoadWeights", "EDiTApply", "EDiTInit", "EDiTCalibrate", "EDiTSaveWeights", "EDiTLayerReport",
    "EDiTBenchmark", "EDiTCompare", "EDiTSmallWorldText",
)  # fmt: skip
EXAMPLES = 100
OURS = re.compile(r"\.edit_core\.errors\.EDiT\w*Error$")
REFUSALS = {"custom_validation_failed", "value_not_in_list", "value_smaller_than_min", "value_bigger_than_max"}
LARGEST_SIDE = 320
"""Of what is benchmarked here; a CPU needs minutes for the largest that the node takes."""
RUN_THE_MODEL = ("EDiTCalibrate", "EDiTLayerReport")
"""For every example, so that they take a minute each."""

LAYERS = ["all", "none", "0", "1", "0-1", "0, 1", " ALL ", "1-0", "0;1", "-1", "0-", "5-7", "9" * 40]
LAYERS.append("0-999999," * 500 + "0-999999")
SIZES = ["256", "288", "320, 288", " 288 ,", "512;1024", "0", "-16", "16", "99999999999", "8208", "²", "288,288"]
PATHS = [
    "a", "a/b", "edit", "../../x", "../edit/../../x", "/x", "/", "//", "a/..", ".", "..", "", " ", "a/", "./a", "~",
    "~/a", "a\\..\\..\\b", "a\nb", "a\0b", "\t", "a" * 300, "a/" * 200 + "a", "%date%", "%year%/%width%", "nan", "NaN",
    "inf", "None", "con", "file.safetensors", "file.safetensors/below", "\ud800", "é", "图", "🦊", "a:b*c?", "{}", "%s",
    "x" * 5000,
]  # fmt: skip
TEXTS = [*LAYERS, *SIZES, *PATHS, "(red:1e400)", "(((", ")))", "\\(", "(red:nan)", "embedding:x", "a red circle"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base directory some folders below one that is watched, with small models, and files that are none."""
    base = tmp_path_factory.mktemp("values") / "a" / "b" / "base"
    for folder in ("models/diffusion_models", "models/checkpoints", "models/edit", "custom_nodes", "input", "output"):
        (base / folder).mkdir(parents=True)
    bases, edits, checkpoints = (base / "models" / name for name in ("diffusion_models", "edit", "checkpoints"))
    for backbone in models.SHIPPED:
        model = build(backbone)
        if backbone == "pixart_sigma":
            model.transformer_blocks = model.transformer_blocks[:2]
        models.randomise(model, seed=1)
        save_teacher(bases / f"{backbone}.safetensors", backbone, model, {})
        models.trained_like(model.half().float()).save(edits / f"{backbone}.safetensors")
    comfy.write_foreign_models(bases)
    for folder, name in ((bases, "sd35_medium"), (edits, "pixart_sigma")):
        comfy.cut(folder / f"{name}.safetensors", folder / "cut.safetensors")
    (edits / "empty.safetensors").touch()
    (edits / "file.safetensors").write_text("no tensors")
    save_file({"a.lora_A.weight": torch.zeros(4)}, edits / "lora.safetensors")
    (checkpoints / "text.ckpt").write_text("no tensors")
    (checkpoints / "empty.pt").touch()
    torch.save({"epoch": 1}, checkpoints / "epoch.ckpt")
    torch.save([torch.zeros(2)], checkpoints / "list.pt")
    for backbone, key in (("pixart_sigma", "proj_out.weight"), ("sd35_medium", "proj_out.weight")):
        state = load_file(bases / f"{backbone}.safetensors")
        state[key] = torch.zeros(3, 5)
        save_file(state, checkpoints / f"misshapen_{backbone}.safetensors")
    return base


class Host:
    """The process inside ComfyUI."""

    def __init__(self, checkout: Path, base: Path) -> None:
        command = [comfy.interpreter(checkout), SCRIPT, checkout, base, comfy.PACK, base / "models/diffusion_models"]
        self.log = base / "log.txt"
        self.process = subprocess.Popen(
            command, cwd=base, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True
        )
        self.schema = self.ask("schema")

    def ask(self, ask: str, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ask": ask, **question}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text(errors="replace")[-3000:]
        answer: dict[str, Any] = json.loads(line)
        assert "broken" not in answer, answer["broken"] + self.log.read_text(errors="replace")[-3000:]
        return answer

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module", params=FOUND or [Path("none")], ids=lambda path: path.name)
def host(request: pytest.FixtureRequest, files: Path) -> Iterator[Host]:
    if not FOUND:
        pytest.skip(comfy.NO_COMFYUI)
    running = Host(request.param, files)
    yield running
    running.close()


def texts() -> st.SearchStrategy[str]:
    lists = st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 7)), max_size=4).map(
        lambda pairs: ", ".join(str(a) if b is None else f"{a}-{b}" for a, b in pairs)
    )
    sides = st.lists(st.integers(1, LARGEST_SIDE), max_size=3).map(lambda found: ",".join(map(str, found)))
    return st.sampled_from(TEXTS) | lists | sides | st.text(st.characters(codec=None), max_size=40)


def numbers(socket: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What the page lets through: of the range, its ends among it."""
    low, high = socket["min"], socket["max"]
    whole = socket["type"] == "INT"
    inside = st.integers(low, high) if whole else st.floats(low, high)
    few = st.integers(low, min(high, low + 9)) if whole else st.floats(low, min(high, low + 2))
    return few | inside | st.sampled_from([low, high])


def widget(socket: dict[str, Any]) -> st.SearchStrategy[Any]:
    if socket["type"] == "COMBO":  # of an older file too, whose choice is gone
        return st.sampled_from([*socket["options"], *socket["options"], "gone", "edit/gone.safetensors"])
    if socket["type"] == "STRING":
        return texts()
    return numbers(socket)


def linked(socket: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What another node hands on; ComfyUI checks nothing of it but the type."""
    kinds = {
        "INT": st.integers(-(2**63), 2**64),
        "FLOAT": st.floats(allow_nan=False, allow_infinity=False),
        "COMBO": st.sampled_from(socket.get("options") or [""]) | texts(),
    }
    return st.fixed_dictionaries({"value": kinds.get(socket["type"], texts())})


def affordable(node: str, values: dict[str, Any]) -> bool:
    sizes = values.get("sizes", "")
    sizes = sizes["value"] if isinstance(sizes, dict) else sizes
    return node != "EDiTBenchmark" or not any(LARGEST_SIDE < int(n) <= 8192 for n in re.findall(r"[0-9]{3,4}", sizes))


@st.composite
def uses(draw: st.DrawFn, node: str, schema: dict[str, Any], links: bool) -> dict[str, Any]:
    """Widgets' values and sockets' names of one node; with `links` some widgets are sockets."""
    values: dict[str, Any] = {}
    sockets: dict[str, Any] = {}
    backbone = draw(st.sampled_from(["", *models.SHIPPED, *models.BACKBONES]))  # for whatever has one; "" mixes them
    for socket in schema["nodes"][node]["inputs"]:
        if socket["type"] not in ("INT", "FLOAT", "STRING", "COMBO"):
            names = schema["given"][socket["type"]]
            sockets[socket["id"]] = draw(st.sampled_from([n for n in names if n.startswith(backbone)] or names))
        elif links and draw(st.booleans()):
            sockets[socket["id"]] = draw(linked(socket))
        else:
            # Half of them as they stand, else one bad value would nearly always hide what the others do.
            usual = "288" if socket["id"] == "sizes" else socket["default"]
            kept = usual is not None and draw(st.booleans())
            values[socket["id"]] = usual if kept else draw(widget(socket))
    if node == "EDiTSmallWorldText":
        values["text"] = draw(texts())
    return {"values": values, "linked": sockets}


def check(answer: dict[str, Any]) -> None:
    """A result, or one clear sentence of ours; files nowhere but in models/edit."""
    outside = [path for path in answer["new"] if not re.match(r"a/b/base/models/edit/", path)]
    assert not outside, outside
    said: list[str] = []
    for kind, message in answer.get("refused", []):
        assert kind in REFUSALS, (kind, message)
        said.append(message)
    if "failed" in answer:
        kind, message = answer["failed"]
        assert OURS.search(kind), answer["traceback"]
        said.append(message)
    for message in said:
        assert message and len(message) < 600, message
        assert "\n" not in message, message
    assert said or "done" in answer or "interrupted" in answer, answer


@pytest.mark.parametrize("links", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["widgets", "links"])
@pytest.mark.parametrize(
    "node", [pytest.param(node, marks=pytest.mark.slow) if node in RUN_THE_MODEL else node for node in NODES]
)
def test_any_value_gives_a_result_or_one_clear_error(host: Host, node: str, links: bool) -> None:
    outcomes: dict[str, int] = {}

    @settings(max_examples=EXAMPLES if not links else EXAMPLES // 2, suppress_health_check=list(HealthCheck))
    @given(uses(node, host.schema, links).filter(lambda use: affordable(node, {**use["values"], **use["linked"]})))
    def run(use: dict[str, Any]) -> None:
        answer = host.ask("run", node=node, **use)
        check(answer)
        outcome = next(key for key in ("refused", "failed", "interrupted", "done") if key in answer)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    run()
    print(node, outcomes)
    assert outcomes.get("done") or outcomes.get("interrupted"), outcomes
    usable = host.ask("usable")
    assert usable == {"left": [], "changed": []}


LINKED = {
    "EDiTSaveWeights": {"edit_weights": "pixart_sigma weights"},
    "EDiTApply": {"model": "pixart_sigma", "edit_weights": "pixart_sigma weights"},
    "EDiTBenchmark": {"model_a": "pixart_sigma", "model_b": "pixart_sigma"},
    "EDiTCalibrate": {
        "model": "pixart_sigma", "edit_weights": "pixart_sigma weights", "positive": "pixart_sigma text",
        "negative": "pixart_sigma text", "latent": "pixart_sigma latent",
    },
    "EDiTCompare": {"image_a": "picture", "image_b": "picture"},
}  # fmt: skip
APPLY = {"layers": "all", "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
CALIBRATE = {"steps": 1, "lr": 0.005, "seed": 0}
LOAD = {"model_name": "diffusion_models/pixart_sigma.safetensors", "weight_dtype": "fp32", "edit_weights": "none"}


@pytest.mark.parametrize(
    ("node", "values", "part"),
    [
        ("EDiTSaveWeights", {"filename_prefix": "a" * 300}, "cannot be written (File name too long)"),
        ("EDiTSaveWeights", {"filename_prefix": "\ud800"}, "has characters that no file's name can have"),
        ("EDiTSaveWeights", {"filename_prefix": "a\0b"}, "has characters that no file's name can have"),
        ("EDiTSaveWeights", {"filename_prefix": ""}, "names no file"),
        ("EDiTSaveWeights", {"filename_prefix": "../../x"}, "leads out of models/edit"),
        ("EDiTSaveWeights", {"filename_prefix": "file.safetensors/below"}, "cannot be written (Not a directory)"),
        ("EDiTLoadModel", LOAD | {"model_name": "checkpoints/text.ckpt"}, "is no file of PyTorch"),
        ("EDiTLoadModel", LOAD | {"model_name": "checkpoints/list.pt"}, "is no file of PyTorch"),
        ("EDiTLoadModel", LOAD | {"model_name": "checkpoints/misshapen_pixart_sigma.safetensors"}, "cannot load it"),
        ("EDiTLoadModel", LOAD | {"model_name": "checkpoints/misshapen_sd35_medium.safetensors"}, "cannot load it"),
        ("EDiTLoadModel", LOAD | {"weight_dtype": "fp64"}, "is not one of"),
        ("EDiTSmallWorldText", {"backbone": "flux"}, "is not one of"),
        ("EDiTApply", APPLY | {"start_percent": 0.9, "end_percent": 0.5}, "0.9 is after end_percent 0.5"),
        ("EDiTApply", APPLY | {"start_percent": 2.0}, "2.0 is not between 0.0 and 1.0"),
        ("EDiTApply", APPLY | {"layers": "0-999999," * 500 + "x"}, "is not a block or a range"),
        ("EDiTApply", APPLY | {"layers": {"value": "x" * 9000}}, "is not a block or a range"),
        ("EDiTBenchmark", {"sizes": "288", "repeats": {"value": 0}}, "0 is not between 1 and 1000"),
        ("EDiTCalibrate", CALIBRATE | {"steps": {"value": 0}}, "0 is not between 1 and 100000"),
        ("EDiTCalibrate", CALIBRATE | {"seed": {"value": -1}}, "-1 is not between 0 and"),
        ("EDiTCompare", {"gain": {"value": -3.0}}, "-3.0 is not between 1.0 and 64.0"),
        ("EDiTLoadWeights", {"edit_name": {"value": "../../x"}}, "is not in models/edit"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("EDiT") else "",
)
def test_values_that_once_gave_a_traceback_or_passed_give_one_sentence(
    host: Host, node: str, values: dict[str, Any], part: str
) -> None:
    linked = LINKED.get(node, {}) | {key: value for key, value in values.items() if isinstance(value, dict)}
    answer = host.ask("run", node=node, values={k: v for k, v in values.items() if k not in linked}, linked=linked)
    check(answer)
    # ComfyUI says a refusal once for every input, with its name before it.
    refused = {message.partition(" - ")[2] or message for _, message in answer.get("refused", [])}
    (said,) = refused or {answer["failed"][1]}
    assert part in said or ("not in list" in said and "is not one of" in part)  # newer cores check lists themselves


def test_a_prefix_below_the_folder_writes_there(host: Host) -> None:
    values = {"filename_prefix": "sub/%year%/a:b"}
    answer = host.ask("run", node="EDiTSaveWeights", values=values, linked=LINKED["EDiTSaveWeights"])
    check(answer)
    assert re.fullmatch(r"a/b/base/models/edit/sub/2\d{3}/a:b_00001_\.safetensors", answer["new"][-1]), answer
