"""Runs the pack's nodes with whatever values it is asked to, inside a real ComfyUI: `python values.py CHECKOUT ...`.

`test_node_values.py` starts it once per ComfyUI, asks a line of JSON at a time, and is answered with one. Prompts go
through ComfyUI's own validation and execution, as a server's do; what nodes get through sockets is prepared here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what anything else prints goes to the log

from pathlib import Path
from typing import Any

from host import SHIPPED, BASE, FILES, apply, load, load_nodes, logging, nodes, run, torch, weights  # first of all
import comfy.model_management
import comfy.utils
import execution
import folder_paths

LIMIT = 3
"""Progress updates, after which whatever still runs is interrupted, as its user may do."""
PATIENT = ("EDiTCalibrate", "EDiTBenchmark")
"""Nodes that are let run so long in vain; others must end by themselves."""


class Anything(str):
    """A socket's type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


GIVEN: dict[str, Any] = {}
"""What can be had through a socket, by name."""


class Given:
    """Hands on what is known by a name here, or a value as it came."""

    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    def give(self, name: str) -> tuple[Any]:
        return (GIVEN[name],)


class Take:
    """Where a graph ends; a MODEL is drawn with, and a CLIP asked for a text."""

    RETURN_TYPES = ()
    FUNCTION = "take"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"what": (Anything("*"), {})}}

    def take(self, what: Any) -> dict[str, Any]:
        if hasattr(what, "get_model_object"):
            assert torch.isfinite(draw(what)).all() or what.model.get_dtype() != torch.float32
        return {}


class Server:
    """What the executor tells a page; everything must be JSON that a page can read."""

    def __init__(self) -> None:
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: str, data: Any, client_id: str | None = None) -> None:
        if event in ("executed", "execution_error"):
            data = {key: value for key, value in data.items() if not key.startswith("current_")}
            json.dumps(data, allow_nan=False)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None  # progress, which newer ones send in more ways


def latent(backbone: str, height: int = 34, width: int = 36, batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, {"pixart_sigma": 4, "sd35_medium": 16}[backbone], height, width)}


def text(backbone: str, words: str) -> Any:
    return nodes.CLIPTextEncode().encode(run("EDiTSmallWorldText", backbone=backbone), words)[0]


def draw(model: Any) -> torch.Tensor:
    """A latent, in one step."""
    backbone = "pixart_sigma" if model.get_model_object("latent_format").latent_channels == 4 else "sd35_medium"
    conds = text(backbone, "a red circle"), text(backbone, "")
    with torch.inference_mode():
        return nodes.common_ksampler(model, 1, 1, 3.0, "euler", "simple", *conds, latent(backbone))[0]["samples"]


def prepare() -> dict[str, list[str]]:
    """Fills GIVEN; returns its names by the type of socket that they fit."""
    names: dict[str, list[str]] = {}

    def give(kind: str, name: str, value: Any) -> None:
        GIVEN[name] = value
        names.setdefault(kind, []).append(name)

    generator = torch.Generator().manual_seed(0)
    for backbone in SHIPPED:
        base = load(backbone, "fp32")
        side = weights(backbone)
        give("MODEL", backbone, base)
        give("MODEL", f"{backbone} with EDiT", apply(base, side))
        give("EDIT_WEIGHTS", f"{backbone} weights", side)
        give("EDIT_WEIGHTS", f"{backbone} block 1", run("EDiTInit", model=base, compression=4, layers="1"))
        give("CONDITIONING", f"{backbone} text", text(backbone, "a red circle"))
        give("LATENT", f"{backbone} latent", latent(backbone))
    give("LATENT", "small latent", latent("pixart_sigma", 8, 8))
    give("LATENT", "two latents", latent("sd35_medium", 34, 34, 2))
    give("LATENT", "seven channels", {"samples": torch.ones(1, 7, 34, 36)})
    give("LATENT", "a film", {"samples": torch.zeros(1, 16, 3, 34, 36)})
    for name, shape in {"picture": (1, 40, 50, 3), "pictures": (2, 40, 50, 3), "tiny": (1, 3, 3, 3)}.items():
        give("IMAGE", name, torch.rand(shape, generator=generator))
    return names


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if "temp" not in path.parts}


class Host:
    def __init__(self) -> None:
        self.executor = execution.PromptExecutor(Server())
        # Newer ones ask how much memory to keep free.
        self.executor.cache_args = {"ram": 1.0, "ram_inactive": 1.0, "lru": 0}
        self.names = prepare()
        self.plain = {backbone: draw(GIVEN[backbone]) for backbone in SHIPPED}
        self.root = BASE.parents[2]
        self.before = files(self.root)
        self.updates = 0
        self.patient = False
        comfy.utils.set_progress_bar_global_hook(self._progress)
        # Newer versions leave out steps that follow fast.
        comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = comfy.utils.PROGRESS_THROTTLE_MIN_PERCENT = 0

    def _progress(self, *_: Any, **__: Any) -> None:
        self.updates += 1
        if self.patient and self.updates == LIMIT:
            comfy.model_management.interrupt_current_processing()

    def schema(self) -> dict[str, Any]:
        """Every node's inputs, and what fits its sockets."""
        found = {}
        for name, node in nodes.NODE_CLASS_MAPPINGS.items():
            if name.startswith("EDiT"):
                schema = node.define_schema()
                found[name] = {
                    "inputs": [
                        {
                            "id": socket.id,
                            "type": socket.io_type,
                            **{
                                k: getattr(socket, k)
                                for k in ("default", "min", "max", "options")
                                if hasattr(socket, k)
                            },
                        }
                        for socket in schema.inputs
                    ],
                    "output_node": bool(schema.is_output_node),
                }
        return {"nodes": found, "given": self.names}

    def run(self, node: str, values: dict[str, Any], linked: dict[str, Any]) -> dict[str, Any]:
        """Executes one node.

        Args:
            node: its id.
            values: of its widgets.
            linked: names in GIVEN by input, or `{"value": …}`, which is handed on through a link.
        """
        prompt: dict[str, Any] = {"0": {"class_type": node, "inputs": dict(values)}}
        for number, (key, name) in enumerate(linked.items(), 1):
            if isinstance(name, dict):
                name, GIVEN["value"] = f"value {json.dumps(name)}", name["value"]
                GIVEN[name] = GIVEN.pop("value")
            prompt[str(number)] = {"class_type": "Given", "inputs": {"name": name}}
            prompt["0"]["inputs"][key] = [str(number), 0]
        if node == "EDiTSmallWorldText" and "text" in prompt["0"]["inputs"]:
            words = prompt["0"]["inputs"].pop("text")
            prompt["encode"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["0", 0], "text": words}}
            prompt["end"] = {"class_type": "Take", "inputs": {"what": ["encode", 0]}}
        elif not nodes.NODE_CLASS_MAPPINGS[node].define_schema().is_output_node:
            prompt["end"] = {"class_type": "Take", "inputs": {"what": ["0", 0]}}
        answer = self._execute(prompt)
        answer["new"] = sorted(files(self.root) - self.before)
        for path in answer["new"]:
            if (self.root / path).is_file():
                (self.root / path).unlink()
        self.before |= set(answer["new"])
        return answer

    def _execute(self, prompt: dict[str, Any]) -> dict[str, Any]:
        valid = asyncio.run(execution.validate_prompt("prompt", prompt, None))
        if not valid[0]:
            errors = [error for found in valid[3].values() for error in found["errors"]]
            return {"refused": [[e["type"], f"{e['message']}: {e['details']}"] for e in errors or [valid[1]]]}
        self.updates, self.patient = 0, prompt["0"]["class_type"] in PATIENT
        self.executor.execute(prompt, "prompt", {"client_id": "page"}, valid[2])
        messages = dict(self.executor.status_messages)
        comfy.model_management.interrupt_current_processing(False)
        if error := messages.get("execution_error"):
            return {
                "failed": [error["exception_type"], error["exception_message"].strip()],
                "node": error["node_type"],
                "traceback": "".join(error["traceback"])[-3000:],
            }
        return {"interrupted" if "execution_interrupted" in messages else "done": True}

    def usable(self) -> dict[str, Any]:
        """Whether the base models draw what they drew at first, to the bit, and nothing of ours is left in them."""
        changed = [backbone for backbone in SHIPPED if not torch.equal(draw(GIVEN[backbone]), self.plain[backbone])]
        comfy.model_management.unload_all_models()  # a model that was drawn with stays injected until then
        left = [
            type(layer).__name__
            for backbone in SHIPPED
            for layer in GIVEN[backbone].model.modules()
            if "forward" in layer.__dict__
        ]
        return {"left": left, "changed": changed}


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    folder_paths.add_model_folder_path("diffusion_models", str(FILES))
    asyncio.run(load_nodes())
    nodes.NODE_CLASS_MAPPINGS.update({"Given": Given, "Take": Take})
    with torch.inference_mode():
        host = Host()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = getattr(host, question.pop("ask"))(**question)
        except Exception as error:
            answer = {"broken": repr(error)}
            logging.exception("the host")
        ANSWERS.write(json.dumps(answer) + "\n")
        ANSWERS.flush()


main()
