// The `layers` text, as edit_core/layers.py reads and writes it.

const ITEM = /^(\d{1,6})(?:\s*-\s*(\d{1,6}))?$/;

/** The last block that a text may name here: more cells than this could not be shown. */
export const MOST = 255;

/**
 * The blocks that a text names, for a model of `depth` blocks.
 *
 * Blocks past the depth are kept: how many there are may not be known yet. Returns null where the text is no such list.
 */
export function parseLayers(text, depth) {
  const words = String(text ?? "").trim().toLowerCase();
  if (words === "all") return new Set(Array(depth).keys());
  if (words === "none") return new Set();
  const chosen = new Set();
  for (const item of words.split(",")) {
    const match = ITEM.exec(item.trim());
    if (!match) return null;
    const first = Number(match[1]);
    const last = Number(match[2] ?? first);
    if (last < first || last > MOST) return null;
    for (let block = first; block <= last; block++) chosen.add(block);
  }
  return chosen;
}

/** The shortest text for these blocks: "all" for every one of `depth`, "none" for no block. */
export function formatLayers(blocks, depth) {
  const sorted = [...blocks].sort((a, b) => a - b);
  if (!sorted.length) return "none";
  if (sorted.length === depth && sorted.at(-1) === depth - 1) return "all";
  const runs = [];
  for (const block of sorted) {
    const run = runs.at(-1);
    if (run && block === run[1] + 1) run[1] = block;
    else runs.push([block, block]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(", ");
}
