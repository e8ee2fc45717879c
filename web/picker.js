// A strip of cells, one per transformer block, over a node's `layers` text.

import { after, element, keepEvents } from "./dom.js";
import { formatLayers, parseLayers } from "./layers.js";

const DEPTH = 28; // PixArt-Σ's, until a run says how many blocks there are
const MARGIN = 4;
const HEIGHT = 36 + 2 * MARGIN;
const PROPERTY = "edit_blocks"; // a node's own depth, kept in the workflow

const pickers = new Set();
const reports = new Map(); // by EDiTLayerReport: {errors: one per block or null, layers: the suggestion}; the last is last

/** Takes over what an EDiTLayerReport gave. */
export function useReport(node, { block_errors: errors = [], text = [] }) {
  if (!errors.length) return;
  reports.delete(node);
  reports.set(node, { errors, layers: String(text[0] ?? "").replace(/^layers: /, "") });
  for (const picker of pickers) picker.refresh();
}

/** Forgets what an EDiTLayerReport gave: it is gone, by itself or with its graph. */
export function dropReport(node) {
  if (reports.delete(node)) for (const picker of pickers) picker.refresh();
}

/** Teal for errors of 1% and less, through yellow, to red for those of 100% and more. */
function colour(error) {
  const share = Math.min(1, Math.max(0, 1 + Math.log10(Math.max(error, 1e-9)) / 2));
  return `hsl(${Math.round(175 * (1 - share))} 65% ${Math.round(42 + 16 * share)}%)`;
}

class Picker {
  constructor(node, widget) {
    this.node = node;
    this.widget = widget;
    this.text = null;
    this.found = null;
    this.strip = element("div", { className: "edit-picker-strip", tabIndex: 0 });
    this.strip.setAttribute("role", "listbox");
    this.strip.setAttribute("aria-multiselectable", "true");
    this.strip.setAttribute("aria-label", "transformer blocks with linear attention");
    this.note = element("div", { className: "edit-picker-note" });
    this.root = element("div", { className: "edit-picker" });
    this.ran = element("span", { className: "edit-picker-badge", title: "In the last run" });
    const below = element("div", { className: "edit-picker-below" });
    below.append(this.note, this.ran);
    this.root.append(this.strip, below);
    this.current = 0;
    this.listen();
  }

  /** The number of the input that a link goes into in the widget's place; -1 for none. */
  get slot() {
    return this.node.inputs?.findIndex(({ widget, link }) => widget?.name === this.widget.name && link != null) ?? -1;
  }

  get linked() {
    return this.slot >= 0;
  }

  /** The report that counts: the one that is linked, or that came last. */
  get report() {
    return (this.linked && reports.get(this.node.getInputNode(this.slot))) || ([...reports.values()].at(-1) ?? null);
  }

  /** The text that counts: where a link replaces the widget, a report's suggestion, or null for what is not known. */
  get layers() {
    if (!this.linked) return String(this.widget.value ?? "");
    return reports.get(this.node.getInputNode(this.slot))?.layers ?? null;
  }

  get errors() {
    const { own, report } = this;
    return report && (!own || own === report.errors.length) ? report.errors : null;
  }

  /** How many blocks the last run found, as far as it is known. */
  get own() {
    return this.found ?? this.node.properties?.[PROPERTY];
  }

  get depth() {
    return this.own ?? this.report?.errors.length ?? DEPTH;
  }

  /**
   * Takes over how many blocks a run found, and keeps it in the workflow; not `again`, where a graph is read anew:
   * an undo that changes the graph at once could not be followed by another.
   */
  run(depth, again) {
    this.found = depth;
    if (!again) this.node.properties[PROPERTY] = depth;
    this.refresh();
  }

  /** Of the last run, for Vue nodes: the classic canvas has it over the node. */
  set badge(text) {
    this.ran.textContent = globalThis.LiteGraph?.vueNodesMode ? text : "";
  }

  listen() {
    keepEvents(this.root);
    let drag = null; // {to: linear or dense, last: the block passed last}
    const cell = (event) => {
      const box = this.strip.getBoundingClientRect();
      const count = this.strip.childElementCount;
      return Math.min(count - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * count)));
    };
    this.strip.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.linked) return;
      const block = cell(event);
      this.strip.setPointerCapture(event.pointerId);
      drag = { to: !this.chosen().has(block), last: block };
      this.fill(block, block, drag.to);
    });
    this.strip.addEventListener("pointermove", (event) => {
      const block = cell(event);
      if (drag && block !== drag.last) {
        this.fill(drag.last, block, drag.to);
        drag.last = block;
      }
    });
    for (const kind of ["pointerup", "pointercancel"]) this.strip.addEventListener(kind, () => (drag = null));
    this.strip.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, " ": 0 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      this.current = Math.min(this.strip.childElementCount - 1, Math.max(0, this.current + step));
      if (!step && !this.linked) this.fill(this.current, this.current, !this.chosen().has(this.current));
      this.refresh();
    });
    for (const kind of ["focus", "blur"]) this.strip.addEventListener(kind, () => this.refresh());
  }

  chosen() {
    return parseLayers(this.layers, this.depth) ?? new Set();
  }

  fill(from, to, linear) {
    const chosen = this.chosen();
    for (let block = Math.min(from, to); block <= Math.max(from, to); block++) {
      if (linear) chosen.add(block);
      else chosen.delete(block);
    }
    const text = formatLayers(chosen, this.depth);
    if (text === this.widget.value) return;
    this.widget.value = text;
    this.widget.callback?.(text);
    this.refresh();
    this.node.graph?.setDirtyCanvas(true, true);
  }

  /** Called for every frame that the classic canvas draws. */
  refreshIfChanged() {
    if (this.layers !== this.text || this.linked !== (this.strip.ariaDisabled === "true")) this.refresh();
  }

  refresh() {
    const { depth, errors, layers, linked } = this;
    const chosen = parseLayers(layers, depth);
    // A text may name more blocks than are known of: they are shown, so that they can be switched off.
    const count = Math.max(depth, ...[...(chosen ?? [])].map((block) => block + 1));
    const focused = document.activeElement === this.strip;
    while (this.strip.childElementCount > count) this.strip.lastChild.remove();
    while (this.strip.childElementCount < count) this.strip.append(element("span"));
    [...this.strip.children].forEach((cell, block) => {
      const linear = chosen?.has(block) ?? false;
      const error = errors?.[block];
      cell.className = `${linear ? "edit-linear" : ""} ${focused && block === this.current ? "edit-current" : ""}`.trim();
      cell.setAttribute("role", "option");
      cell.setAttribute("aria-selected", String(linear));
      cell.title = `block ${block}: ${linear ? "linear" : "dense"}`;
      if (error == null) cell.style.removeProperty("--edit-colour");
      else {
        cell.style.setProperty("--edit-colour", colour(error));
        cell.title += `, error ${error.toPrecision(2)}`;
      }
    });
    this.text = layers;
    this.strip.ariaDisabled = String(linked);
    this.note.textContent = this.describe(chosen, count, linked);
  }

  describe(chosen, count, linked) {
    if (linked && this.text === null) return "layers comes from another node";
    if (!chosen) return "not a list of blocks";
    return `${chosen.size}/${count} linear${linked ? ", from another node" : ""}`;
  }
}

/** Gives a node with a `layers` text the strip; null where it has none. */
export function addPicker(node) {
  const widget = node.widgets?.find(({ name }) => name === "layers");
  if (!widget) return null;
  const picker = new Picker(node, widget);
  // Last of the widgets and without a value, so that a workflow is the same with and without this extension.
  node.addDOMWidget("edit_layers", "edit_layers", picker.root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
    onDraw: () => picker.refreshIfChanged(),
  }).serialize = false;
  after(widget, "callback", () => picker.refresh());
  after(node, "onConfigure", () => picker.refresh());
  after(node, "onConnectionsChange", () => picker.refresh());
  after(node, "onRemoved", () => pickers.delete(picker));
  pickers.add(picker);
  picker.refresh();
  return picker;
}
