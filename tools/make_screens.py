"""Photographs the pack in a browser, with the small world's models: `docs/screens/` and the help pages' pictures.

`python make_screens.py [CHECKOUT]` takes the newest ComfyUI that is found if none is named; some minutes on two cores.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import comfy
from support.browser import Tab, chromium
from support.server import Server

SCREENS, HELP = ROOT / "docs" / "screens", ROOT / "web" / "docs" / "pictures"
SCREEN_BYTES, HELP_BYTES, SCREEN_WIDTH = 150_000, 60_000, 1280
AB, CALIBRATE = "small_world_pixart_sigma_ab", "small_world_pixart_sigma_calibrate"
BENCHMARK = "small_world_pixart_sigma_benchmark"
QUIET = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    # Text at any size, under the names that it has had.
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
SCALE, MARGIN, TITLE = 1.4, 8, 30


def save(png: bytes, path: Path, most: int, width: int | None = None) -> None:
    """As a JPEG of the best quality that is small enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(png)) as image:
        picture = image.convert("RGB")
    if width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    for quality in range(90, 40, -4):
        picture.save(path, quality=quality, subsampling=0, optimize=True)
        if path.stat().st_size <= most:
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")
            return
    raise SystemExit(f"{path.name} has more than {most} bytes")


def screen(tab: Tab, name: str, whole_graph: bool = False) -> None:
    """The page, or what of it the graph fills."""
    box = tab.page.evaluate(
        """async ([whole, margin]) => {
          app.canvas.deselectAll();
          app.canvas.setDirty(true, true);
          for (let i = 0; i < 8; i++) await new Promise(requestAnimationFrame);
          if (!whole) return null;
          const { scale, offset } = app.canvas.ds, { left, top } = app.canvas.canvas.getBoundingClientRect();
          const boxes = [...app.graph._nodes, ...app.graph._groups].map((item) => [...item.boundingRect]);
          const [x, y, right, bottom] = [
            Math.min(...boxes.map((box) => box[0])), Math.min(...boxes.map((box) => box[1])),
            Math.max(...boxes.map((box) => box[0] + box[2])), Math.max(...boxes.map((box) => box[1] + box[3])),
          ];
          return { x: (x + offset[0]) * scale + left - margin, y: (y + offset[1]) * scale + top - margin,
            width: (right - x) * scale + 2 * margin, height: (bottom - y) * scale + 2 * margin };
        }""",
        [whole_graph, MARGIN],
    )
    save(tab.page.screenshot(clip=box), SCREENS / f"{name}.jpg", SCREEN_BYTES, SCREEN_WIDTH)


def help_page(tab: Tab, kind: str, above: int = 0) -> None:
    """A node of the classic canvas by itself, with its title and what stands so many units above it."""
    home = tab.page.evaluate(
        """kind => { const node = app.graph._nodes.find(node => node.type === kind), home = [...node.pos];
          node.pos = [-9000, -9000]; app.canvas.deselectAll(); return home; }""",
        kind,
    )
    tab.look_at(kind, SCALE)
    left, top, width, height = tab.page.evaluate(
        """async kind => {
          for (let i = 0; i < 8; i++) await new Promise(requestAnimationFrame);
          const { pos, size } = app.graph._nodes.find(node => node.type === kind);
          const { scale, offset } = app.canvas.ds;
          const box = app.canvas.canvas.getBoundingClientRect();
          return [(pos[0] + offset[0]) * scale + box.left, (pos[1] + offset[1]) * scale + box.top,
            size[0] * scale, size[1] * scale];
        }""",
        kind,
    )
    top, height = top - (TITLE + above) * SCALE, height + (TITLE + above) * SCALE
    box = {"x": left - MARGIN, "y": top - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    save(tab.page.screenshot(clip=box), HELP / f"{kind}.jpg", HELP_BYTES)
    tab.page.evaluate(
        "([kind, home]) => { app.graph._nodes.find(node => node.type === kind).pos = home; }", [kind, home]
    )
    tab.look_at(kind, SCALE)


def pictures_loaded(tab: Tab) -> None:
    """Those that the nodes in sight show; the others' are loaded when they come in sight."""
    tab.page.wait_for_function(
        """() => app.canvas.visible_nodes.every(node => (app.nodeOutputs[node.id]?.images ?? []).length === 0
          || node.type === "EDiTCompare" || node.imgs?.every(image => image.complete && image.naturalWidth))"""
    )
    tab.page.wait_for_function("() => [...document.images].every(image => image.complete)")


def fit(tab: Tab) -> None:
    tab.command("Comfy.Canvas.FitView")
    tab.page.wait_for_timeout(1500)  # it glides


def after_run(tab: Tab) -> None:
    tab.run()
    tab.page.get_by_text("View all jobs").wait_for(state="hidden")  # the page learns late of the end
    pictures_loaded(tab)


def calibration(tab: Tab) -> None:
    tab.open_template(CALIBRATE)
    tab.look_at("EDiTCalibrate", SCALE)
    tab.page.evaluate(
        """() => { window.halfway = new Promise(resolve => app.api.addEventListener("progress", ({ detail }) => {
          if (detail.max === 100 && detail.value >= 80) resolve(); })); }"""
    )
    tab.queue()
    tab.page.evaluate("() => window.halfway")
    tab.page.wait_for_function("() => app.graph._nodes.find(node => node.type === 'EDiTCalibrate').imgs?.length")
    help_page(tab, "EDiTCalibrate")
    screen(tab, "calibrate")
    if tab.finish() != "success":
        raise SystemExit("the calibration failed")


def calibrated(tab: Tab) -> None:
    """What is left of a calibration, which is in the cache then."""
    tab.load(CALIBRATE)
    after_run(tab)
    pictures_loaded(tab)
    for kind in ("EDiTInit", "EDiTSaveWeights", "EDiTLayerReport"):
        help_page(tab, kind)
    screen(tab, "report")


def comparison(tab: Tab) -> None:
    tab.page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
    tab.page.get_by_text("edit-attention", exact=True).first.click()
    tab.page.get_by_text(AB, exact=True).first.wait_for()
    tab.page.wait_for_function("() => [...document.images].every(image => image.complete)")
    screen(tab, "templates")
    tab.page.get_by_text(AB, exact=True).first.click()
    tab._wait_for(AB)
    after_run(tab)
    fit(tab)
    screen(tab, "template", whole_graph=True)
    for kind in ("EDiTLoadModel", "EDiTLoadWeights", "EDiTSmallWorldText"):
        help_page(tab, kind)
    add_report(tab)
    tab.look_at("EDiTApply", SCALE)
    tab.drag(".edit-picker-strip", 0.3, 0.45)
    after_run(tab)
    help_page(tab, "EDiTApply", above=22)
    tab.look_at("EDiTApply", 2)
    screen(tab, "picker")
    tab.look_at("EDiTCompare", SCALE)
    tab.drag(".edit-slider", 0.5, 0.42)
    pictures_loaded(tab)
    help_page(tab, "EDiTCompare")
    screen(tab, "compare")


def add_report(tab: Tab) -> None:
    """A Layer Report on the first caption, whose errors colour the picker."""
    tab.page.evaluate(
        """() => {
          const report = LiteGraph.createNode("EDiTLayerReport");
          report.pos = [-2000, 0];
          app.graph.add(report);
          const from = { EDiTLoadModel: "model", EDiTLoadWeights: "edit_weights", CLIPTextEncode: "conditioning",
            EmptyLatentImage: "latent" };
          for (const [type, input] of Object.entries(from))
            app.graph._nodes.find(node => node.type === type).connect(0, report, report.findInputSlot(input));
        }"""
    )


def benchmark(tab: Tab) -> None:
    tab.load(BENCHMARK)
    tab.set("sizes", "288, 512, 768")
    tab.set("repeats", 3)
    after_run(tab)
    help_page(tab, "EDiTBenchmark")
    screen(tab, "benchmark")


def vue(tab: Tab) -> None:
    tab.load(AB)
    after_run(tab)
    fit(tab)
    screen(tab, "vue_nodes")
    tab.look_at("EDiTApply", SCALE)
    tab.settle(".edit-picker")
    screen(tab, "vue_picker")


def light(tab: Tab) -> None:
    tab.load(AB)
    after_run(tab)
    tab.look_at("EDiTApply")
    tab.settle(".edit-picker")
    screen(tab, "light")


def main() -> None:
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else comfy.checkouts()[-1]
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        base = Path(folder)
        for name in ("diffusion_models", "checkpoints", "vae", "text_encoders", "edit"):
            (base / "models" / name).mkdir(parents=True)
        with Server(checkout, base) as server:
            tab = Tab(browser, server, settings=QUIET)
            calibration(tab)
            calibrated(tab)
            comparison(tab)
            benchmark(tab)
            tab.close()
            server.post("/free", {"unload_models": True, "free_memory": True})  # cached nodes tell the page nothing
            tab = Tab(browser, server, vue=True, settings=QUIET)
            vue(tab)
            tab.close()
            server.post("/free", {"unload_models": True, "free_memory": True})
            tab = Tab(browser, server, settings=QUIET | {"Comfy.ColorPalette": "light"})
            light(tab)
            tab.close()


if __name__ == "__main__":
    main()
