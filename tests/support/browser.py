"""A browser's page with ComfyUI's own frontend in it, used as a person uses it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import workflows
from .server import PACK_NAME, Run, Server

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PAGE_MS, RUN_MS = 180_000, 300_000
QUEUE_BUTTON = '[data-testid="queue-button"] button, button[data-testid="queue-button"]'


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


def template(name: str) -> Path:
    return workflows.WORKFLOWS / f"{name}.json"


class Tab:
    """A page with ComfyUI in it, and what it complained about."""

    def __init__(self, browser: Any, server: Server, vue: bool = False, settings: dict[str, Any] | None = None) -> None:
        self.server, self.complaints = server, []
        url = f"http://127.0.0.1:{server.port}"
        self.outside: set[str] = set()
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(PAGE_MS)
        self.page.route("**/*", lambda route: self._local_only(route, url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self._complain(error.stack or str(error)))
        defaults = {"Comfy.TutorialCompleted": True, "Comfy.Extension.Disabled": [], "Comfy.ColorPalette": "dark"}
        server.post("/settings", defaults | {"Comfy.VueNodes.Enabled": vue} | (settings or {}))
        self.page.goto(url)
        self.page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types.EDiTCompare)")

    def close(self) -> None:
        self.page.close()

    @property
    def frontend(self) -> tuple[int, ...]:
        version = self.page.evaluate("() => globalThis.__COMFYUI_FRONTEND_VERSION__ ?? '0.0'")
        return tuple(map(int, version.split(".")[:2]))

    def _local_only(self, route: Any, url: str) -> None:
        if route.request.url.startswith((url, "data:", "blob:")):
            route.continue_()
        else:
            if f"/extensions/{PACK_NAME}/" in (route.request.headers.get("referer") or ""):
                self.outside.add(route.request.url)
            route.abort()

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self._complain(f"{message.text} {message.location.get('url', '')}")

    def _complain(self, text: str) -> None:
        """Only of the pack: the frontends have errors of their own, and look first for help pages in a language."""
        if (f"/extensions/{PACK_NAME}/" in text or "EDiT" in text) and "/en.md" not in text:
            self.complaints.append(text)

    # --- graphs ---------------------------------------------------------------------------------------------------

    def open_template(self, name: str) -> None:
        """From the menu."""
        self.page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
        menu = self.page.get_by_role("dialog")  # the pack's name is on its nodes as well
        menu.get_by_text(PACK_NAME, exact=True).first.click()
        menu.get_by_placeholder("Search").fill(name)  # the list grows only as it is scrolled
        menu.get_by_text(name, exact=True).first.click()
        menu.wait_for(state="hidden")  # else the next one may be opened in this one's stead, and go with it
        self._wait_for(name)

    def load(self, name: str) -> None:
        """As a file that is opened is."""
        graph = json.loads(template(name).read_text(encoding="utf-8"))
        self.page.evaluate("async graph => { await app.loadGraphData(graph); }", graph)
        self._wait_for(name)

    def drop(self, name: str) -> None:
        """As somebody drops a file on the canvas."""
        self.page.evaluate(
            """([name, text]) => {
              const data = new DataTransfer();
              data.items.add(new File([text], name, { type: "application/json" }));
              const canvas = document.querySelector("#graph-canvas");
              for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind,
                { dataTransfer: data, bubbles: true, cancelable: true, clientX: 800, clientY: 500 }));
            }""",
            [f"{name}.json", template(name).read_text(encoding="utf-8")],
        )
        self._wait_for(name)

    def clear(self) -> None:
        self.page.evaluate("() => { app.graph.clear(); }")

    def _wait_for(self, name: str) -> None:
        wanted = sorted(node["type"] for node in json.loads(template(name).read_text(encoding="utf-8"))["nodes"])
        self.page.wait_for_function(
            "wanted => JSON.stringify(app.graph._nodes.map(node => node.type).sort()) === JSON.stringify(wanted)",
            arg=wanted,
        )

    def set(self, widget: str, value: Any, kind: str | None = None) -> None:
        """On every node that has such a widget, or those of one kind."""
        self.page.evaluate(
            """([name, value, kind]) => {
              for (const node of app.graph._nodes) for (const widget of node.widgets ?? [])
                if (widget.name === name && (!kind || node.type === kind)) {
                  widget.value = value;
                  widget.callback?.(value);
                }
            }""",
            [widget, value, kind],
        )

    def select(self, kind: str) -> None:
        self.page.evaluate(
            """kind => { const node = app.graph._nodes.find(node => node.type === kind);
              app.canvas.deselectAll(); app.canvas.select(node); app.canvas.onSelectionChange?.(
                app.canvas.selected_nodes); app.canvas.setDirty(true, true); }""",
            kind,
        )

    def command(self, name: str) -> None:
        self.page.evaluate("async name => { await app.extensionManager.command.execute(name); }", name)

    def look_at(self, kind: str, scale: float = 1.0) -> None:
        self.page.evaluate(
            """([kind, scale]) => {
              const { pos } = app.graph._nodes.find(node => node.type === kind);
              app.canvas.ds.scale = scale;
              app.canvas.ds.offset = [500 / scale - pos[0], 250 / scale - pos[1]];
              app.canvas.setDirty(true, true);
            }""",
            [kind, scale],
        )

    def node_id(self, kind: str) -> str:
        return str(self.page.evaluate("kind => app.graph._nodes.find(node => node.type === kind).id", kind))

    def badges(self, kind: str) -> list[str]:
        """Of a node on the classic canvas."""
        return self.page.evaluate(
            "kind => app.graph._nodes.find(node => node.type === kind).badges"
            ".map(badge => (typeof badge === 'function' ? badge() : badge).text)",
            kind,
        )

    # --- runs -----------------------------------------------------------------------------------------------------

    def queue(self) -> None:
        """With the button; `finish` waits for it."""
        self.page.evaluate(
            """() => { window.finished = new Promise((resolve) => {
              const listen = (kind, say) => app.api.addEventListener(kind, say, { once: true });
              listen("execution_success", () => resolve("success"));
              listen("execution_interrupted", () => resolve("interrupted"));
              listen("execution_error", ({ detail }) => resolve(JSON.stringify(detail)));
            }); }"""
        )
        self.page.locator(QUEUE_BUTTON).first.click()

    def finish(self) -> str:
        return self.page.evaluate(
            f"() => Promise.race([window.finished, new Promise(r => setTimeout(r, {RUN_MS}, 'no answer'))])"
        )

    def run(self) -> dict[str, Any]:
        """Queues with the button; the outputs by node id."""
        self.queue()
        assert self.finish() == "success"
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs))")

    def draw(self) -> dict[str, np.ndarray[Any, Any]]:
        """The pictures that a run saves, by the end of their file name's prefix."""
        outputs, saves = self.run(), workflows.saves(self.prompt())
        return {
            node["inputs"]["filename_prefix"].rpartition("_")[2]: workflows.picture(
                self.server, Run(outputs, set()), key
            )
            for key, node in saves.items()
        }

    def prompt(self) -> dict[str, Any]:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def layers(self) -> str:
        (node,) = (node for node in self.prompt().values() if node["class_type"] == "EDiTApply")
        return node["inputs"]["layers"]

    # --- the page -------------------------------------------------------------------------------------------------

    def settle(self, selector: str) -> None:
        """Waits until an element is there and has stopped moving."""
        self.page.locator(selector).first.wait_for()
        self.page.evaluate(
            """async selector => {
              for (let last = "", same = 0, frames = 0; same < 4 && frames < 600; frames++) {
                await new Promise(requestAnimationFrame);
                const { x, y, width, height } = document.querySelector(selector).getBoundingClientRect();
                const now = `${x} ${y} ${width} ${height}`;
                same = now === last ? same + 1 : 0;
                last = now;
              }
            }""",
            selector,
        )

    def drag(self, selector: str, start: float, end: float) -> None:
        """Across an element, from and to shares of its width."""
        self.settle(selector)
        box = self.page.locator(selector).first.bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + start * box["width"], y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + end * box["width"], y, steps=6)
        self.page.mouse.up()
