// What the pack adds to ComfyUI's page. Nothing depends on it: without it the widgets are plain and graphs are the same.

import { app } from "../../scripts/app.js";
import { addStyle, after } from "./dom.js";
import { addPicker, useReport } from "./picker.js";
import { addSlider } from "./slider.js";

/** Says over the node how many blocks were linear in the last run. */
function addBadge(node) {
  const Badge = globalThis.LGraphBadge;
  if (!Badge || !Array.isArray(node.badges)) return () => {};
  const badge = new Badge({ text: "", fgColor: "#fff", bgColor: "#2a6f6a" });
  node.badges.push(() => badge);
  return (text) => {
    badge.text = text;
    node.graph?.setDirtyCanvas(true, true);
    // Vue nodes draw from a copy, which is renewed where another list is announced.
    const property = { type: "node:property:changed", nodeId: node.id, property: "badges" };
    node.graph?.trigger?.("node:property:changed", { ...property, oldValue: node.badges, newValue: [...node.badges] });
  };
}

const EXTEND = {
  EDiTApply(node) {
    const picker = addPicker(node);
    const label = addBadge(node);
    after(node, "onExecuted", ({ edit_blocks: [linear, depth] = [] }) => {
      if (depth === undefined) return;
      label(`${linear}/${depth} linear`);
      if (picker) picker.depth = depth;
    });
  },
  EDiTInit: addPicker,
  EDiTLayerReport(node) {
    after(node, "onExecuted", useReport);
  },
  EDiTCompare(node) {
    const slider = addSlider(node);
    after(node, "onExecuted", ({ a_images = [], b_images = [] }) => slider.show(a_images, b_images));
  },
};

app.registerExtension({
  name: "EDiT",
  setup: addStyle,
  nodeCreated(node) {
    EXTEND[node.comfyClass]?.(node);
  },
});
