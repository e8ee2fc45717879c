"""The pack in a real browser: headless Chromium on every ComfyUI that is found, with that ComfyUI's own frontend."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import workflows
from support.browser import CHROMIUM, Tab, chromium, template
from support.server import PACK_NAME, Server

from edit_core.errors import EDiTError
from edit_core.layers import parse_layers

pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright; the browser tests are skipped"
)

AB, CALIBRATE = "small_world_pixart_sigma_ab", "small_world_pixart_sigma_calibrate"
BENCHMARK = "small_world_pixart_sigma_benchmark"
BLOCKS = 6  # of the small world's models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium found: install it or set CHROMIUM; the browser tests are skipped"
    ),
]
server = workflows.server


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workflows.write_stand_ins(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def tab(server: Server, browser: Any) -> Iterator[Tab]:
    opened = Tab(browser, server)
    yield opened
    opened.close()


@pytest.fixture
def vue_tab(server: Server, browser: Any) -> Iterator[Tab]:
    # What is not executed again tells the page nothing, and a template that was drawn before is in the cache.
    server.post("/free", {"unload_models": True, "free_memory": True})
    opened = Tab(browser, server, vue=True)
    if opened.frontend < (1, 40):
        opened.close()
        pytest.skip("the Vue nodes of this frontend are an early experiment")
    yield opened
    opened.close()


def check_drawing(tab: Tab) -> None:
    outputs = tab.run()
    prompt = tab.prompt()
    saved = workflows.saves(prompt)
    assert len(saved) == 2 and all(outputs[key]["images"] for key in saved)
    compare = workflows.only(prompt, "EDiTCompare")
    assert outputs[compare]["a_images"] and outputs[compare]["b_images"]


def check_picker(tab: Tab) -> None:
    strip = ".edit-picker-strip"
    tab.look_at("EDiTApply", 1.5)
    tab.settle(strip)
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
    tab.set("layers", "1, 3-4", "EDiTApply")  # as typing does
    chosen = tab.page.locator(f"{strip} > span").evaluate_all("cells => cells.map(c => c.ariaSelected)")
    assert chosen == ["false", "true", "false", "true", "true", "false"]


def check_report_colours(tab: Tab) -> None:
    """What an EDiTLayerReport sends, given to one by hand."""
    tab.page.evaluate(
        """() => { const node = LiteGraph.createNode("EDiTLayerReport"); app.graph.add(node);
          node.onExecuted({ block_errors: [0.001, 0.1, 2, null, 0.5, 0.3], text: ["layers: 0-1"] }); }"""
    )
    cells = tab.page.locator(".edit-picker-strip > span")
    titles = cells.evaluate_all("cells => cells.map(cell => cell.title)")
    assert "error 0.10" in titles[1] and "error" not in titles[3]
    colours = cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).borderTopColor)")
    assert len(set(colours)) == BLOCKS
    tab.page.evaluate("() => { app.graph.remove(app.graph._nodes.find(node => node.type === 'EDiTLayerReport')); }")
    assert not any("error" in title for title in cells.evaluate_all("cells => cells.map(cell => cell.title)"))


def check_slider(tab: Tab) -> None:
    slider = ".edit-slider"
    tab.look_at("EDiTCompare")
    tab.settle(slider)
    pictures = tab.page.locator(f"{slider} img")
    for picture in pictures.all():
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => image.naturalWidth") > 0
    assert len(set(pictures.evaluate_all("images => images.map(image => image.src)"))) == 2
    tab.drag(slider, 0.5, 0.25)
    assert abs(int(tab.page.locator(slider).get_attribute("aria-valuenow")) - 25) <= 1
    tab.page.keyboard.press("ArrowRight")
    assert abs(int(tab.page.locator(slider).get_attribute("aria-valuenow")) - 30) <= 1


def open_every_template(tab: Tab, from_the_menu: bool) -> None:
    for name in workflows.NAMES:
        if from_the_menu:
            tab.open_template(name)
        else:
            tab.load(name)
        missing = tab.page.evaluate(
            """() => app.graph._nodes.filter((node) => node.has_errors || !(node.type in
              LiteGraph.registered_node_types)).map((node) => node.type)"""
        )
        assert missing == [], name
        tab.page.evaluate("async () => { for (let i = 0; i < 20; i++) await new Promise(requestAnimationFrame); }")
        assert tab.page.get_by_text(re.compile(r"errors? found|Missing")).count() == 0, name  # of node types or files
    assert tab.complaints == []
    assert tab.outside == set()


def wait_for_curve(tab: Tab, vue: bool = False) -> None:
    """The curve of a calibration that runs, shown in its node."""
    node = tab.node_id("EDiTCalibrate")
    find = "document.querySelectorAll(`[data-node-id='${id}'] img`)" if vue else "app.graph.getNodeById(id).imgs ?? []"
    tab.page.wait_for_function(f"id => [...{find}].some(image => image.naturalWidth === 960)", arg=node)


def test_picker_slider_and_badge_after_a_run(tab: Tab) -> None:
    tab.open_template(AB)
    tab.set("steps", 1)
    check_drawing(tab)
    check_slider(tab)
    assert f"{BLOCKS}/{BLOCKS} linear" in tab.badges("EDiTApply")
    check_picker(tab)
    check_report_colours(tab)
    tab.run()
    assert f"3/{BLOCKS} linear" in tab.badges("EDiTApply")
    assert tab.complaints == []
    assert tab.outside == set()


@pytest.mark.parametrize(("name", "blocks"), [("pixart_sigma_edit", 2), ("sd35_medium_edit", 3)])
def test_a_real_models_template_draws_without_weights(tab: Tab, name: str, blocks: int) -> None:
    tab.open_template(name)
    tab.page.evaluate(
        """file => {
          const old = app.graph._nodes.find(({ type }) => ["CLIPLoader", "TripleCLIPLoader"].includes(type));
          const small = LiteGraph.createNode("CLIPLoader");
          app.graph.add(small);
          for (const [name, value] of Object.entries({ clip_name: file, type: "sd3" }))
            small.widgets.find(widget => widget.name === name).value = value;
          for (const link of [...old.outputs[0].links].map(id => app.graph.links[id]))
            small.connect(0, app.graph.getNodeById(link.target_id), link.target_slot);
          app.graph.remove(old);
        }""",
        "random_clip_l.safetensors",
    )
    seed = {"seed": 7, "control_after_generate": "fixed"}
    for widget, value in {"steps": 2, "width": workflows.WIDTH, "height": workflows.HEIGHT, **seed}.items():
        tab.set(widget, value)
    (node,) = (node for node in tab.prompt().values() if node["class_type"] == "EDiTApply")
    assert "edit_weights" not in node["inputs"] and node["inputs"]["quality"] == "balanced"
    fast = tab.draw()["edit"]
    assert fast.shape == (workflows.HEIGHT, workflows.WIDTH, 3) and fast.std() > 10
    assert f"{blocks}/{blocks} linear" in tab.badges("EDiTApply")
    tab.look_at("EDiTApply", 1.5)
    tab.settle(".edit-picker-strip")
    assert tab.page.locator(".edit-picker-strip > span").count() == blocks
    tab.set("quality", "fast")
    assert not np.array_equal(tab.draw()["edit"], fast)
    tab.select("EDiTApply")
    tab.command("Comfy.Canvas.ToggleSelectedNodes.Bypass")
    (plain,) = workflows.draw(tab.server, name.removesuffix("_edit"), seed=7).values()
    assert np.array_equal(tab.draw()["edit"], plain)
    assert tab.complaints == []


def test_bypassing_apply_gives_the_teachers_picture_bit_for_bit(tab: Tab) -> None:
    tab.load(AB)
    tab.set("steps", 2)
    first = tab.draw()
    assert not np.array_equal(first["base"], first["edit"])
    tab.select("EDiTApply")
    tab.command("Comfy.Canvas.ToggleSelectedNodes.Bypass")
    assert "EDiTApply" not in {node["class_type"] for node in tab.prompt().values()}
    bypassed = tab.draw()
    assert np.array_equal(bypassed["edit"], first["base"])
    assert np.array_equal(bypassed["base"], first["base"])


def test_a_dropped_file_calibrates_with_a_live_curve_and_can_be_interrupted(tab: Tab) -> None:
    tab.load(AB)
    tab.set("steps", 1)
    before = tab.draw()["base"]
    tab.drop(CALIBRATE)
    tab.set("steps", 1, "KSampler")
    tab.set("steps", 5000, "EDiTCalibrate")
    tab.queue()
    wait_for_curve(tab)
    tab.command("Comfy.Interrupt")
    assert tab.finish() == "interrupted"

    tab.set("steps", 4, "EDiTCalibrate")
    tab.set("threshold", 1000, "EDiTLayerReport")
    outputs = tab.run()
    report = outputs[tab.node_id("EDiTLayerReport")]
    assert len(report["block_errors"]) == BLOCKS and report["images"]
    assert f"{BLOCKS}/{BLOCKS} linear" in tab.badges("EDiTApply")
    tab.look_at("EDiTApply", 1.5)
    tab.page.wait_for_function(
        "said => [...document.querySelectorAll('.edit-picker-note')].some(note => note.textContent === said)",
        arg=f"{BLOCKS}/{BLOCKS} linear, from another node",
    )
    titles = tab.page.locator(".edit-picker-strip > span").evaluate_all("cells => cells.map(cell => cell.title)")
    assert all(", error " in title for title in titles), titles  # of EDiTInit's as well

    tab.load(AB)
    tab.set("steps", 1)
    assert np.array_equal(tab.draw()["base"], before)
    assert tab.complaints == []


def test_the_benchmarks_chart_is_shown_in_its_node(tab: Tab) -> None:
    tab.load(BENCHMARK)
    tab.set("sizes", "288")
    tab.set("repeats", 1)
    outputs = tab.run()
    (chart,) = outputs[tab.node_id("EDiTBenchmark")]["images"]
    assert chart["type"] == "temp"
    tab.look_at("EDiTBenchmark")
    tab.page.wait_for_function(
        "id => app.graph.getNodeById(id).imgs?.some(image => image.naturalWidth === 960)",
        arg=tab.node_id("EDiTBenchmark"),
    )


def test_help_pages_open_with_their_pictures(tab: Tab) -> None:
    tab.load(AB)
    for kind, heading in (("EDiTApply", "EDiT: Apply Linear Attention"), ("EDiTCompare", "EDiT: Compare Pictures")):
        tab.look_at(kind)
        tab.select(kind)
        tab.page.locator('[data-testid="info-button"]').first.click()
        page = tab.page.locator(".node-help-content")
        page.get_by_role("heading", name=heading, exact=True).wait_for()
        picture = page.locator("img").first
        picture.evaluate("image => image.decode()")
        assert f"/extensions/{PACK_NAME}/docs/" in picture.evaluate("image => image.src")
        assert picture.evaluate("image => image.naturalWidth") > 100
    assert tab.complaints == []


def test_every_template_opens_from_the_menu(server: Server, browser: Any) -> None:
    opened = Tab(browser, server)
    try:
        open_every_template(opened, from_the_menu=True)
    finally:
        opened.close()


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


def test_an_undo_and_another_tab_keep_what_the_last_run_showed(tab: Tab) -> None:
    tab.load(AB)
    picture = {"filename": "example.png", "subfolder": "", "type": "input"}
    outputs = {
        tab.node_id("EDiTApply"): {"edit_blocks": [3, BLOCKS]},
        tab.node_id("EDiTCompare"): {"a_images": [picture], "b_images": [picture]},
    }
    graph = "JSON.stringify(app.graph.serialize().nodes.map(({ id, properties }) => [id, properties]).sort())"
    before = tab.page.evaluate(f"() => {graph}")
    tab.page.evaluate("outputs => { app.nodeOutputs = outputs; }", outputs)  # as the page does where a tab is chosen
    for undone in (False, True):
        if undone:
            tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
            tab.page.evaluate(f"() => {{ window.old = app.graph._nodes[0]; {tracker}.checkState(); }}")
            tab.set("steps", 3)
            tab.page.evaluate(f"() => {tracker}.checkState()")
            tab.page.evaluate(f"async () => {{ await {tracker}.undo(); }}")
            assert tab.page.evaluate("() => !app.graph._nodes.includes(window.old)")
        assert f"3/{BLOCKS} linear" in tab.badges("EDiTApply")
        tab.look_at("EDiTCompare")
        tab.settle(".edit-slider:not([data-empty])")
        assert tab.page.evaluate(f"() => {graph}") == before  # else the next undo would only undo what is shown
    assert tab.complaints == []


def test_the_picker_shows_the_report_it_is_linked_to_and_none_that_is_gone(tab: Tab) -> None:
    tab.load(CALIBRATE)
    found = tab.page.evaluate(
        """() => {
          const node = (kind) => app.graph._nodes.find(({ type }) => type === kind);
          const strip = (kind) => node(kind).widgets.find(({ name }) => name === "edit_layers").element;
          const said = () => strip("EDiTApply").querySelector(".edit-picker-note").textContent;
          const cells = () => strip("EDiTInit").querySelector(".edit-picker-strip").childElementCount;
          const ran = (report, layers) =>
            report.onExecuted({ block_errors: [0.1, 0.2, 0.1, 0.1, 0.5, 0.3], text: [`layers: ${layers}`] });
          delete node("EDiTInit").properties.edit_blocks;
          const linked = node("EDiTLayerReport");
          const other = LiteGraph.createNode("EDiTLayerReport");
          app.graph.add(other);
          const texts = [];
          for (const [report, layers] of [[other, "0-1"], [linked, "2"], [other, "3-5"]]) {
            ran(report, layers);
            texts.push(said());
          }
          const counts = [cells()];
          app.graph.remove(other);
          app.graph.remove(linked);
          counts.push(cells());
          node("EDiTInit").onExecuted({ edit_blocks: [1, 3] });
          counts.push(cells());
          return [texts, counts];
        }"""
    )
    one = f"1/{BLOCKS} linear, from another node"
    assert found == [["layers comes from another node", one, one], [BLOCKS, 28, 3]]


def test_the_workflow_file_is_the_same_with_and_without_the_extension(tab: Tab) -> None:
    tab.load(AB)
    values = tab.page.evaluate(
        "() => Object.fromEntries(app.graph.serialize().nodes.map(node => [node.id, node.widgets_values]))"
    )
    for node in json.loads(template(AB).read_text(encoding="utf-8"))["nodes"]:
        if node["type"].startswith("EDiT"):
            assert (values[str(node["id"])] or []) == node["widgets_values"]
    inputs = {key: node["inputs"].keys() for key, node in workflows.read_api(AB).items()}
    assert {key: node["inputs"].keys() for key, node in tab.prompt().items()} == inputs


def test_without_the_extension_a_workflow_still_runs(server: Server, browser: Any, tab: Tab) -> None:
    tab.load(AB)
    tab.set("steps", 1)
    wanted = tab.draw()
    tab.load(BENCHMARK)  # whose results push the others out of the cache
    tab.set("sizes", "288")
    tab.run()
    plain = Tab(browser, server, settings={"Comfy.Extension.Disabled": ["EDiT"]})
    try:
        plain.load(AB)
        plain.set("steps", 1)
        pictures = plain.draw()
        assert plain.page.locator(".edit-picker, .edit-slider").count() == 0
        assert all(np.array_equal(pictures[name], wanted[name]) for name in wanted)
    finally:
        plain.close()


def test_vue_nodes_show_badge_picker_slider_and_curve(vue_tab: Tab) -> None:
    tab = vue_tab
    tab.load(AB)
    tab.set("steps", 1)
    check_drawing(tab)
    check_slider(tab)
    tab.look_at("EDiTApply")
    badge = tab.page.locator(f"[data-node-id='{tab.node_id('EDiTApply')}'] .edit-picker-badge")
    badge.filter(has_text=f"{BLOCKS}/{BLOCKS} linear").wait_for()
    check_picker(tab)
    tab.load(CALIBRATE)
    tab.set("steps", 5000)
    tab.look_at("EDiTCalibrate")
    tab.queue()
    wait_for_curve(tab, vue=True)
    tab.command("Comfy.Interrupt")
    assert tab.finish() == "interrupted"
    assert tab.complaints == []


def test_every_template_opens_in_vue_nodes(vue_tab: Tab) -> None:
    open_every_template(vue_tab, from_the_menu=False)
