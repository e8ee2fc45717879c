// What the pack adds to ComfyUI's page. Nothing depends on it: without it the widgets are plain and graphs are the same.

import { app } from "../../scripts/app.js";
import { addStyle, after } from "./dom.js";
import { addPicker, dropReport, useReport } from "./picker.js";
import { addSlider } from "./slider.js";

/** What shows the last run of a node, by node. */
const shows = new Map();

/** Has `show(output, again)` show what a node's runs give, and again what the page knows of the last in a graph it reads. */
function onOutput(node, show) {
  shows.set(node, show);
  after(node, "onExecuted", (output) => show(output, false));
  after(node, "onConfigure", () => showAgain(node)); // an undo makes all nodes anew
  after(node, "onRemoved", () => shows.delete(node));
}

function showAgain(node) {
  const place = node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : String(node.id);
  const output = app.nodeOutputs?.[place];
  if (output) shows.get(node)(output, true);
}

/** Says over the node how many blocks were linear in the last run. Vue nodes keep the badges that they began with. */
function addBadge(node) {
  const Badge = globalThis.LGraphBadge;
  if (!Badge || !Array.isArray(node.badges)) return () => {};
  const badge = new Badge({ text: "", fgColor: "#fff", bgColor: "#2a6f6a" });
  node.badges.push(() => badge);
  return (text) => {
    badge.text = text;
    node.graph?.setDirtyCanvas(true, true);
  };
}

const EXTEND = {
  EDiTApply(node) {
    const picker = addPicker(node);
    const label = addBadge(node);
    onOutput(node, ({ edit_blocks: [linear, depth] = [] }, again) => {
      if (depth === undefined) return;
      const text = `${linear}/${depth} linear`;
      label(text);
      if (!picker) return;
      picker.badge = text;
      picker.run(depth, again);
    });
  },
  EDiTInit(node) {
    const picker = addPicker(node);
    onOutput(node, ({ edit_blocks: [, depth] = [] }, again) => {
      if (depth !== undefined) picker?.run(depth, again);
    });
  },
  EDiTLayerReport(node) {
    onOutput(node, (output) => useReport(node, output));
    after(node, "onRemoved", () => dropReport(node));
  },
  EDiTCompare(node) {
    const slider = addSlider(node);
    onOutput(node, ({ a_images = [], b_images = [] }) => slider.show(a_images, b_images));
  },
};

app.registerExtension({
  name: "EDiT",
  setup: addStyle,
  nodeCreated(node) {
    EXTEND[node.comfyClass]?.(node);
  },
  /** Of another tab's workflow, after its graph was read. */
  onNodeOutputsUpdated() {
    for (const node of shows.keys()) showAgain(node);
  },
});
