// Two pictures over one another, with a divider to drag.

import { api } from "../../scripts/api.js";
import { element, keepEvents } from "./dom.js";

const HEIGHT = 260;
const STEP = 5; // percent, for a press of an arrow key

function address(file) {
  const query = new URLSearchParams({ filename: file.filename, subfolder: file.subfolder ?? "", type: file.type });
  return api.apiURL(`/view?${query}`);
}

class Slider {
  constructor() {
    this.pairs = [];
    this.index = 0;
    this.below = element("img", { alt: "picture b", draggable: false });
    this.above = element("img", { alt: "picture a", draggable: false });
    this.line = element("div", { className: "edit-slider-line" });
    this.turn = element("button", { className: "edit-slider-turn", type: "button", title: "The next pair" });
    const names = ["a", "b"].map((name) => element("div", { className: "edit-slider-name", textContent: name }));
    names[0].style.left = "4px";
    names[1].style.right = "4px";
    const hint = element("div", { className: "edit-slider-hint", textContent: "run the graph to compare" });
    this.root = element("div", { className: "edit-slider", tabIndex: 0 });
    this.root.setAttribute("role", "slider");
    this.root.setAttribute("aria-label", "divider between the two pictures");
    this.root.setAttribute("aria-valuemin", "0");
    this.root.setAttribute("aria-valuemax", "100");
    this.root.append(this.below, this.above, this.line, ...names, this.turn, hint);
    this.move(50);
    this.show([], []);
    this.listen();
  }

  listen() {
    const follow = (event) => {
      const box = this.root.getBoundingClientRect();
      this.move(((event.clientX - box.left) / box.width) * 100);
    };
    keepEvents(this.root);
    this.root.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.target === this.turn) return;
      this.root.setPointerCapture(event.pointerId);
      follow(event);
    });
    this.root.addEventListener("pointermove", (event) => {
      if (this.root.hasPointerCapture(event.pointerId)) follow(event);
    });
    this.root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -STEP, ArrowRight: STEP }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      this.move(this.percent + step);
    });
    this.turn.addEventListener("click", () => this.select(this.index + 1));
  }

  move(percent) {
    this.percent = Math.min(100, Math.max(0, percent));
    this.above.style.clipPath = `inset(0 ${100 - this.percent}% 0 0)`;
    this.line.style.left = `${this.percent}%`;
    this.root.setAttribute("aria-valuenow", String(Math.round(this.percent)));
  }

  show(a, b) {
    this.pairs = a.slice(0, b.length).map((file, index) => [file, b[index]]);
    this.root.toggleAttribute("data-empty", !this.pairs.length);
    this.turn.style.display = this.pairs.length > 1 ? "" : "none";
    this.select(0);
  }

  select(index) {
    if (!this.pairs.length) return;
    this.index = index % this.pairs.length;
    const [a, b] = this.pairs[this.index];
    this.above.src = address(a);
    this.below.src = address(b);
    this.turn.textContent = `${this.index + 1}/${this.pairs.length}`;
  }
}

/** Gives a node the slider, in place of the pictures that it would show one beside the other. */
export function addSlider(node) {
  const slider = new Slider();
  node.addDOMWidget("edit_slider", "edit_slider", slider.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
  }).serialize = false;
  node.hideOutputImages = true; // Vue nodes
  node.onDrawBackground = () => {}; // the classic canvas
  return slider;
}
