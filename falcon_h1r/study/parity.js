"use strict";
// One tab stop per map; arrow keys, Home and End move in it. What a cell says is read out by its label and shown below.
const shown = document.getElementById("cell");
const say = (cell) => {
  const parts = cell.getAttribute("aria-label").split(/(?<=[,;:]) /); // no number is broken at a line's end
  shown.replaceChildren(...parts.flatMap((part, i) => {
    const node = document.createElement("span");
    node.textContent = part;
    return i ? [" ", node] : [node];
  }));
};
const isCell = (node) => node && node.getAttribute("role") === "gridcell" && node.hasAttribute("aria-label");

for (const grid of document.querySelectorAll("table[role=grid]")) {
  const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells]);
  const placeOf = (cell) => { const r = rows.findIndex((row) => row.includes(cell)); return [r, rows[r].indexOf(cell)]; };
  const along = (cells, from, step) => { let i = from + step; while (i >= 0 && i < cells.length && !isCell(cells[i])) i += step; return cells[i]; };
  // Layers and the model have different tensors: where a column has no cell, the one beside it.
  const nearest = (cells, c) => (cells || []).filter(isCell).sort((a, b) => Math.abs(a.cellIndex - c) - Math.abs(b.cellIndex - c))[0];
  const next = (r, c, key) => {
    const row = rows[r];
    return {
      ArrowLeft: () => along(row, c, -1), ArrowRight: () => along(row, c, 1), Home: () => along(row, -1, 1), End: () => along(row, row.length, -1),
      ArrowUp: () => nearest(rows[r - 1], c), ArrowDown: () => nearest(rows[r + 1], c),
    }[key]?.();
  };
  rows.flat().find(isCell).tabIndex = 0;
  grid.addEventListener("keydown", (event) => {
    if (!isCell(event.target) || event.altKey || event.ctrlKey || event.metaKey) return;
    const cell = next(...placeOf(event.target), event.key);
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    if (isCell(cell)) cell.focus();
  });
  grid.addEventListener("focusin", (event) => {
    if (!isCell(event.target)) return;
    grid.querySelectorAll("[tabindex='0']").forEach((cell) => { cell.tabIndex = -1; });
    event.target.tabIndex = 0;
    say(event.target);
  });
  grid.addEventListener("pointerover", (event) => { const cell = event.target.closest("td"); if (isCell(cell)) say(cell); });
}
