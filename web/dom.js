// The little that the widgets share.

export function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

/** Keeps presses inside an element, which the canvas or the node would otherwise take for a drag of their own. */
export function keepEvents(root) {
  for (const kind of ["pointerdown", "pointermove", "pointerup", "mousedown", "dblclick"]) {
    root.addEventListener(kind, (event) => {
      if (event.type.endsWith("move") ? event.buttons === 1 : event.button === 0) event.stopPropagation();
    });
  }
}

/** Runs `extra` after a node's own method of this name. */
export function after(node, name, extra) {
  const original = node[name];
  node[name] = function (...args) {
    const result = original?.apply(this, args);
    extra.apply(this, args);
    return result;
  };
}

export function addStyle() {
  document.head.append(element("link", { rel: "stylesheet", href: new URL("./edit.css", import.meta.url).href }));
}
