"""The pack in a real browser: headless Chromium on every ComfyUI that is found, with that ComfyUI's own frontend."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import workflows
from support.server import PACK_NAME, Server

from edit_core.errors import EDiTError
from edit_core.layers import parse_layers

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright; the browser tests are skipped"
)

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TEMPLATE = "small_world_pixart_sigma_ab"
BLOCKS = 6  # of the small world's models
PAGE_MS, RUN_MS = 120_000, 120_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium found: install it or set CHROMIUM; the browser tests are skipped"
    ),
]
server = workflows.server


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty models folder: the small world's files come with the pack."""
    folder = tmp_path_factory.mktemp("browser") / "models"
    for name in ("diffusion_models", "checkpoints", "vae", "text_encoders", "edit"):
        (folder / name).mkdir(parents=True)
    return folder


class Tab:
    """A page with ComfyUI in it, and what it complained about."""

    def __init__(self, browser: Any, server: Server, vue: bool = False) -> None:
        self.server, self.complaints = server, []
        url = f"http://127.0.0.1:{server.port}"
        self.outside: set[str] = set()
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(PAGE_MS)
        self.page.route("**/*", lambda route: self._local_only(route, url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self._complain(error.stack or str(error)))
        server._request("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue})
        self.page.goto(url)
        self.page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types.EDiTCompare)")

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
        """Only of the pack: the frontends have errors of their own."""
        if f"/extensions/{PACK_NAME}/" in text or "EDiT" in text:
            self.complaints.append(text)

    def open_template(self, name: str) -> None:
        """From the menu, and makes its samplers quick."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(PACK_NAME, exact=True).first.click()
        self.page.get_by_text(name, exact=True).first.click()
        self._quicken()

    def load(self, name: str) -> None:
        """As a dropped file is."""
        graph = json.loads((workflows.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)
        self._quicken()

    def _quicken(self) -> None:
        self.page.wait_for_function("app.graph._nodes.some(node => node.type === 'EDiTApply')")
        self.page.evaluate(
            "() => { for (const node of app.graph._nodes) for (const widget of node.widgets ?? [])"
            " if (widget.name === 'steps') widget.value = 1; }"
        )

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
        self.page.wait_for_timeout(500)

    def run(self) -> dict[str, Any]:
        """Queues with the button; the outputs by node id."""
        self.page.evaluate(
            """() => { window.finished = new Promise((resolve) => {
              app.api.addEventListener("execution_success", () => resolve("success"), { once: true });
              app.api.addEventListener("execution_error", ({ detail }) => resolve(JSON.stringify(detail)),
                { once: true });
            }); }"""
        )
        self.page.locator('[data-testid="queue-button"] button, button[data-testid="queue-button"]').first.click()
        waited = self.page.evaluate(
            f"Promise.race([window.finished, new Promise(r => setTimeout(r, {RUN_MS}, 'no answer'))])"
        )
        assert waited == "success"
        self.page.wait_for_timeout(500)
        return self.page.evaluate("JSON.parse(JSON.stringify(app.nodeOutputs))")

    def prompt(self) -> dict[str, Any]:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def layers(self) -> str:
        (node,) = (node for node in self.prompt().values() if node["class_type"] == "EDiTApply")
        return node["inputs"]["layers"]

    def drag(self, selector: str, start: float, end: float) -> None:
        """Across an element, from and to shares of its width."""
        box = self.page.locator(selector).first.bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + start * box["width"], y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + end * box["width"], y, steps=12)
        self.page.mouse.up()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def tab(server: Server, browser: Any) -> Iterator[Tab]:
    opened = Tab(browser, server)
    yield opened
    opened.page.close()


def check_drawing(tab: Tab) -> None:
    outputs = tab.run()
    prompt = tab.prompt()
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert len(saved) == 2 and all(outputs[key]["images"] for key in saved)
    (compare,) = (key for key, node in prompt.items() if node["class_type"] == "EDiTCompare")
    assert outputs[compare]["a_images"] and outputs[compare]["b_images"]


def check_picker(tab: Tab) -> None:
    strip = ".edit-picker-strip"
    tab.look_at("EDiTApply", 1.5)
    assert tab.page.locator(f"{strip} > span").count() == BLOCKS
    assert tab.layers() == "all"
    tab.drag(strip, 1.5 / BLOCKS, 3.5 / BLOCKS)
    assert tab.layers() == "0, 4-5"
    assert tab.page.locator(f"{strip} > .edit-linear").count() == 3
    tab.drag(strip, 2.5 / BLOCKS, 2.5 / BLOCKS)
    assert tab.layers() == "0, 2, 4-5"
    tab.drag(strip, 3.5 / BLOCKS, 0.5 / BLOCKS)
    assert tab.layers() == "all"
    tab.drag(strip, 0.5 / BLOCKS, 1.5)  # past its end
    assert tab.layers() == "none"
    # As typing does.
    tab.page.evaluate(
        """() => { const widget = app.graph._nodes.find(node => node.type === "EDiTApply").widgets
          .find(widget => widget.name === "layers"); widget.value = "1, 3-4"; widget.callback?.(widget.value); }"""
    )
    chosen = tab.page.locator(f"{strip} > span").evaluate_all("cells => cells.map(c => c.ariaSelected)")
    assert chosen == ["false", "true", "false", "true", "true", "false"]


def check_report_colours(tab: Tab) -> None:
    """What an EDiTLayerReport sends, given to one by hand."""
    tab.page.evaluate(
        """() => { const node = LiteGraph.createNode("EDiTLayerReport"); app.graph.add(node);
          node.onExecuted({ block_errors: [0.001, 0.1, 2, null, 0.5, 0.3], text: ["layers: 0-1"] });
          app.graph.remove(node); }"""
    )
    cells = tab.page.locator(".edit-picker-strip > span")
    titles = cells.evaluate_all("cells => cells.map(cell => cell.title)")
    assert "error 0.10" in titles[1] and "error" not in titles[3]
    colours = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).borderTopColor)")
    assert len(set(colours)) == BLOCKS


def check_slider(tab: Tab) -> None:
    slider = ".edit-slider"
    tab.look_at("EDiTCompare")
    pictures = tab.page.locator(f"{slider} img")
    for picture in pictures.all():
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => image.naturalWidth") > 0
    assert len(set(pictures.evaluate_all("images => images.map(image => image.src)"))) == 2
    tab.drag(slider, 0.5, 0.25)
    assert abs(int(tab.page.locator(slider).get_attribute("aria-valuenow")) - 25) <= 1
    tab.page.keyboard.press("ArrowRight")
    assert abs(int(tab.page.locator(slider).get_attribute("aria-valuenow")) - 30) <= 1


def test_picker_slider_and_badge_after_a_run(tab: Tab) -> None:
    tab.open_template(TEMPLATE)
    check_drawing(tab)
    check_slider(tab)
    badges = tab.page.evaluate(
        "() => app.graph._nodes.find(node => node.type === 'EDiTApply').badges"
        ".map(badge => (typeof badge === 'function' ? badge() : badge).text)"
    )
    assert f"{BLOCKS}/{BLOCKS} linear" in badges
    check_picker(tab)
    check_report_colours(tab)
    tab.run()
    assert tab.complaints == []
    assert tab.outside == set()


def test_picker_text_is_read_as_the_pack_reads_it(tab: Tab) -> None:
    texts = ["all", " None ", "0, 3-9, 27", "3-9,0", "5", "2 - 4", "1,,2", "", "first", "4-2", "-1", "0-27", "27-27, 0"]
    found = tab.page.evaluate(
        """async ([pack, texts]) => {
          const { parseLayers, formatLayers } = await import(`/extensions/${pack}/layers.js`);
          return texts.map(text => parseLayers(text, 28))
            .map(set => set && [[...set].sort((a, b) => a - b), formatLayers(set, 28)]);
        }""",
        [PACK_NAME, texts],
    )
    for text, read in zip(texts, found, strict=True):
        try:
            wanted = parse_layers(text, 28)
        except EDiTError:
            assert read is None, text
        else:
            assert tuple(read[0]) == wanted == parse_layers(read[1], 28), text


def test_the_workflow_file_is_the_same_with_and_without_the_extension(tab: Tab) -> None:
    tab.load(TEMPLATE)
    values = tab.page.evaluate(
        "() => Object.fromEntries(app.graph.serialize().nodes.map(node => [node.id, node.widgets_values]))"
    )
    template = json.loads((workflows.WORKFLOWS / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    for node in template["nodes"]:
        if node["type"].startswith("EDiT"):
            assert (values[str(node["id"])] or []) == node["widgets_values"]
    inputs = {key: node["inputs"].keys() for key, node in workflows.read_api(TEMPLATE).items()}
    assert {key: node["inputs"].keys() for key, node in tab.prompt().items()} == inputs


def test_vue_nodes_show_picker_and_slider(server: Server, browser: Any) -> None:
    tab = Tab(browser, server, vue=True)
    try:
        version = tab.page.evaluate("() => globalThis.__COMFYUI_FRONTEND_VERSION__ ?? '0.0'")
        if tuple(map(int, version.split(".")[:2])) < (1, 40):
            pytest.skip(f"the Vue nodes of frontend {version} are an early experiment")
        tab.load(TEMPLATE)
        check_drawing(tab)
        check_slider(tab)
        check_picker(tab)
        assert tab.complaints == []
    finally:
        tab.page.close()
