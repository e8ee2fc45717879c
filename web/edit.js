// What the pack adds to ComfyUI's page. Nothing depends on it: without it the widgets are plain and graphs are the same.

import { app } from "../../scripts/app.js";
import { addStyle, after } from "./dom.js";
import { addPicker, useReport } from "./picker.js";
import { addSlider } from "./slider.js";

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
    after(node, "onExecuted", ({ edit_blocks: [linear, depth] = [] }) => {
      if (depth === undefined) return;
      const text = `${linear}/${depth} linear`;
      label(text);
      if (picker) Object.assign(picker, { depth, badge: text });
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
