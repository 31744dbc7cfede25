"use strict";
// Drawing: colours, numbers, heat maps on canvas, bars and lines in SVG. Knows nothing of the data.

// Perceptually ordered ramps, interpolated in OKLab: lightness runs one way from the background.
const RAMPS = {
  light: {
    sequential: ["#f4f2ec", "#bcd9dc", "#6fb0bd", "#2b7c98", "#134a70", "#0a2144"],
    attention: ["#f6f1e9", "#f8d3ac", "#f0a15f", "#d46a1e", "#97400a", "#4f1e02"],
    signed: ["#560a2b", "#9c1f4c", "#cf6286", "#edb8c6", "#f4f2ec", "#a9cdd4", "#5ba1b3", "#20718c", "#0b3a5c"],
  },
  dark: {
    sequential: ["#22262c", "#17455c", "#16708a", "#35a0b2", "#86cdd2", "#e6f6f2"],
    attention: ["#26241f", "#5c2f0e", "#9a4d12", "#d97d2b", "#f5b46e", "#fdecd2"],
    signed: ["#ffdbe4", "#f096ae", "#c64d72", "#6d2a41", "#22262c", "#1a5166", "#2a8aa2", "#6fc3cf", "#d8f4f2"],
  },
};

const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const gamma = (c) => (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055);

function toLab(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => linear(parseInt(hex.slice(i, i + 2), 16) / 255));
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s];
}

function fromLab([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s]
    .map((c) => Math.round(255 * gamma(Math.min(1, Math.max(0, c)))));
}

const tables = {};
/** The colour of t in 0..1 of a ramp, as [r, g, b]. */
function ramp(name, t) {
  const key = theme() + name;
  if (!tables[key]) {
    const stops = RAMPS[theme()][name].map(toLab);
    tables[key] = Array.from({ length: 257 }, (_, i) => {
      const at = (i / 256) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
      return fromLab(stops[k].map((v, j) => v + (at - k) * (stops[k + 1][j] - v)));
    });
  }
  return tables[key][Math.round(256 * Math.min(1, Math.max(0, t)))];
}
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
const theme = () => document.documentElement.dataset.theme || "light";
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A colour scale: at(value) in 0..1, colour(value), and ticks for its legend. */
function scale(kind, low, high, name) {
  const root = (v) => Math.sign(v) * Math.sqrt(Math.abs(v));
  const signed = kind === "signed" || kind === "signedRoot";
  const inner = { linear: (v) => v, signed: (v) => v, root, signedRoot: root, log: (v) => Math.log10(v) }[kind];
  if (signed) { high = Math.max(Math.abs(low), Math.abs(high)) || 1; low = -high; }
  if (high === low) high = low + 1;
  const a = inner(low), b = inner(high);
  const at = (v) => (inner(v) - a) / (b - a);
  const back = { linear: (u) => u, signed: (u) => u, log: (u) => 10 ** u }[kind] || ((u) => Math.sign(u) * u * u);
  const count = signed ? 5 : 4;
  const ticks = Array.from({ length: count }, (_, i) => back(a + (i / (count - 1)) * (b - a)));
  return { at, ticks, name: name || (signed ? "signed" : "sequential"), colour: (v) => ramp(name || (signed ? "signed" : "sequential"), at(v)) };
}

/** Three significant digits, for reading. */
function short(v) {
  if (v === null || Number.isNaN(v)) return "–";
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return v.toExponential(1).replace("-", "−").replace("e−", "e−").replace("e+", "e");
  const text = size >= 100 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(size >= 1 ? 3 : 2)));
  return text.replace("-", "−");
}
/** All digits that a float32 has, for tooltips. */
const exact = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(7))).replace("-", "−") : short(v));

const FONT = "12px system-ui, 'Liberation Sans', sans-serif", MONO = "11px ui-monospace, 'Liberation Mono', monospace", LONGEST = 24;
const pen = document.createElement("canvas").getContext("2d");
const wide = (text, font) => { pen.font = font; return pen.measureText(text).width; };
/** Room at the left for the numbers of an axis. */
const margin = (labels) => Math.max(40, ...labels.map((text) => wide(text, FONT) + 10));
/** A token's text for a label: whole, but for a run of more letters than any word has. */
const labelled = (text) => (text.length <= LONGEST ? text : `${text.slice(0, LONGEST - 1)}…`);
/** How whole labels stand below columns of this width: those that do not fit across are turned, and only every so many is drawn. */
function upright(labels, side) {
  const longest = labels.reduce((most, text) => Math.max(most, wide(text, MONO)), 0);
  if (longest + 3 <= side) return { turned: () => false, step: 1, room: 18 };
  const step = Math.ceil(13 / side);
  return { turned: (text) => wide(text, MONO) + 3 > side * step, step, room: longest + 12 };
}
/** Whether the label of column c is drawn: the chosen one always, the others where it leaves room. */
const isNamed = (c, chosen, step, side) => c === chosen || (c % step === 0 && !(chosen >= 0 && Math.abs(c - chosen) * side < 12));

const SVG = "http://www.w3.org/2000/svg";
function svg(parent, width, height, label) {
  const root = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, height }, parent);
  root.style.height = `${height}px`;
  return root;
}
function make(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function element(tag, attributes, parent, text) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") node.className = value;
    else node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const tip = document.getElementById("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const x = Math.min(event.clientX + gap, innerWidth - box.width - 8);
  const y = event.clientY + gap + box.height > innerHeight ? event.clientY - box.height - gap : event.clientY + gap;
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${Math.max(8, y)}px`;
}
function hideTip() { tip.hidden = true; }
function hover(node, text) {
  node.addEventListener("pointermove", (event) => showTip(event, typeof text === "function" ? text() : text));
  node.addEventListener("pointerleave", hideTip);
}

function legend(parent, colours, caption, format = short) {
  const box = element("div", { class: "legend" }, parent);
  element("span", {}, box, caption);
  const bar = element("div", { class: "ramp" }, box);
  const stops = Array.from({ length: 17 }, (_, i) => css(ramp(colours.name, i / 16)));
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const ticks = element("div", { class: "ticks" }, box);
  colours.ticks.forEach((v) => element("span", {}, ticks, format(v)));
}

/**
 * A heat map with row names and the tokens below it. option: rows, cols, value(r, c), colours, rowName(r), font of it,
 * colName(c) or null, square, rowHeight, selected() -> [r, c], pick(r, c), describe(r, c), blank(r, c), label, move(dr, dc).
 */
function heat(parent, option) {
  const canvas = element("canvas", { tabindex: 0, role: "group", "aria-label": option.label }, parent);
  const width = Math.max(60, parent.clientWidth), font = option.font || FONT;
  const names = Array.from({ length: option.rows }, (_, r) => option.rowName(r));
  const left = Math.max(...names.map((name) => wide(name, font))) + 14, side = (width - left) / option.cols;
  const high = option.square ? side : option.rowHeight;
  const labels = option.colName ? Array.from({ length: option.cols }, (_, c) => labelled(option.colName(c))) : [];
  const stand = upright(labels, side), below = option.colName ? stand.room : 2, above = high < 14 ? 6 : 1; // room for the first name
  const height = above + option.rows * high + below, dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dense);
  canvas.height = Math.round(height * dense);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  const gap = side > 5 && high > 5 ? 0.6 : 0;

  function draw() {
    context.clearRect(0, 0, width, height);
    const [row, col] = option.selected();
    context.font = font;
    context.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(13 / high));
    for (let r = 0; r < option.rows; r++) {
      if (names[r] !== "" && (r % every === 0 && Math.abs(r - row) >= every || r === row)) {
        context.fillStyle = r === row ? token("ink") : token("muted");
        context.textAlign = "right";
        context.fillText(names[r], left - 8, above + (r + 0.5) * high);
      }
      for (let c = 0; c < option.cols; c++) {
        if (option.blank && option.blank(r, c)) continue;
        const v = option.value(r, c);
        context.fillStyle = Number.isNaN(v) ? token("faint") : css(option.colours.colour(v));
        context.fillRect(left + c * side, above + r * high, side - gap, high - gap);
      }
    }
    context.font = MONO;
    labels.forEach((text, c) => {
      if (!isNamed(c, col, stand.step, side)) return;
      context.save();
      context.fillStyle = c === col ? token("ink") : token("muted");
      const turned = stand.turned(text);
      context.translate(left + (c + 0.5) * side, above + option.rows * high + (turned ? 5 : 10));
      if (turned) context.rotate(-Math.PI / 2);
      context.textAlign = turned ? "right" : "center";
      context.fillText(text, 0, 0);
      context.restore();
    });
    context.strokeStyle = token("ink");
    context.lineWidth = 1.5;
    // In a map that ends at its diagonal, the frames do too.
    const top = option.square ? col * high : 0, cells = option.square ? row + 1 : option.cols;
    if (col >= 0) context.strokeRect(left + col * side - 0.5, above + top, side + 1 - gap, option.rows * high - top);
    if (row >= 0) context.strokeRect(left + 0.5, above + row * high - 0.5, cells * side - 1, high + 1 - gap);
  }
  function at(event) {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - left) / side), r = Math.floor((event.clientY - box.top - above) / high);
    const inside = c >= 0 && c < option.cols && r >= 0 && r < option.rows && !(option.blank && option.blank(r, c));
    return inside ? [r, c] : null;
  }
  canvas.addEventListener("pointermove", (event) => {
    const cell = at(event);
    if (cell) showTip(event, option.describe(...cell)); else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => { const cell = at(event); if (cell) option.pick(...cell); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    option.move(...step);
  });
  draw();
  return { draw, canvas };
}

/** A round number at or above v: 1, 2 or 5 times a power of ten. */
function nice(v) {
  if (!(v > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(v));
  return [1, 2, 5, 10].map((m) => m * power).find((m) => m >= v * 0.999);
}

/** Horizontal signed bars. rows: {name, value, colour, strong, text, group}; a group's name stands once. */
function bars(parent, rows, label, unit, pick) {
  const width = Math.max(240, parent.clientWidth), left = width < 500 ? 76 : 110, right = 58;
  const high = rows.length > 60 ? 9 : 15, gaps = rows.filter((row, i) => i && row.group !== rows[i - 1].group).length;
  const height = rows.length * high + gaps * 7 + 44, root = svg(parent, width, height, label);
  const low = Math.min(0, ...rows.map((r) => r.value)), top = Math.max(0, ...rows.map((r) => r.value));
  const span = top - low || 1, x = (v) => left + right * (low < 0) + ((v - low) / span) * (width - left - right - right * (low < 0));
  make("line", { x1: x(0), x2: x(0), y1: 0, y2: height - 38, stroke: token("muted"), "stroke-width": 1 }, root);
  let y = 0;
  rows.forEach((row, i) => {
    if (i && row.group !== rows[i - 1].group) y += 7;
    if (row.strong) make("rect", { x: 0, y: y - 1, width, height: high + 1, fill: token("faint") }, root);
    if (!i || row.group !== rows[i - 1].group) make("text", { x: 0, y: y + high * 0.5 + 4, class: row.strong ? "strong" : "" }, root, row.group);
    const from = Math.min(x(0), x(row.value)), size = Math.max(0.6, Math.abs(x(row.value) - x(0)));
    const bar = make("rect", { x: from, y: y + 1, width: size, height: high - 3, rx: 1.5, fill: row.colour }, root);
    if (high > 10) {
      const end = row.value < 0 ? { x: from - 5, "text-anchor": "end" } : { x: from + size + 5 };
      const small = Math.abs(row.value) < span / 2000 && Math.abs(row.value) < 0.01;
      make("text", { ...end, y: y + high * 0.5 + 4 }, root, small ? "≈ 0" : short(row.value));
    }
    const area = make("rect", { x: 0, y, width, height: high, fill: "transparent" }, root);
    hover(area, row.text);
    if (pick && row.pick !== undefined) { area.style.cursor = "pointer"; area.addEventListener("click", () => pick(row.pick)); }
    y += high;
  });
  make("text", { x: x(0), y: height - 22, "text-anchor": "middle" }, root, "0");
  axisTitles(root, unit, "", x((low + top) / 2), height);
}

/**
 * Lines over a common x. series: {values, colour, wide, name}; option: label, xTitle, yTitle (what, unit), xs(i) text, ticks [i], selected, pick(i), log,
 * describe(i).
 */
function lines(parent, series, option) {
  const width = Math.max(240, parent.clientWidth), height = (option.height || 190) + 32, right = 12, base = height - 40, first = 26;
  const count = series[0].values.length, root = svg(parent, width, height, option.label);
  const all = series.flatMap((s) => Array.from(s.values)).filter((v) => Number.isFinite(v) && (!option.log || v > 0));
  const top = option.log ? Math.max(...all, 1) : nice(Math.max(...all));
  const low = option.log ? Math.min(...all, top / 10) : 0;
  const inner = option.log ? Math.log10 : (v) => v;
  const marks = option.log ? powers(low, top) : [0, top / 2, top], left = margin(marks.map(short));
  const x = (i) => left + (count === 1 ? 0.5 : i / (count - 1)) * (width - left - right);
  const y = (v) => base - ((inner(Math.max(v, low)) - inner(low)) / (inner(top) - inner(low) || 1)) * (base - first);
  for (const mark of marks) {
    make("line", { x1: left, x2: width - right, y1: y(mark), y2: y(mark), stroke: token("line") }, root);
    make("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, root, short(mark));
  }
  axisTitles(root, option.xTitle, option.yTitle, (left + width - right) / 2, height);
  for (const i of option.ticks) make("text", { x: x(i), y: base + 17, "text-anchor": i === 0 ? "start" : i === count - 1 ? "end" : "middle" }, root, option.xs(i));
  const chosen = option.selected;
  if (chosen >= 0) make("line", { x1: x(chosen), x2: x(chosen), y1: first - 4, y2: base, stroke: token("ink"), "stroke-dasharray": "2 3" }, root);
  for (const s of series) {
    const points = Array.from(s.values, (v, i) => (Number.isFinite(v) ? `${x(s.at ? s.at[i] : i).toFixed(1)},${y(v).toFixed(1)}` : "")).filter(Boolean);
    make("polyline", { points: points.join(" "), fill: "none", stroke: s.colour, "stroke-width": s.wide || 1.3, "stroke-linejoin": "round", opacity: s.opacity ?? 1 }, root);
    if (chosen >= 0 && s.mark) make("circle", { cx: x(chosen), cy: y(s.values[chosen]), r: 3.5, fill: s.colour }, root);
  }
  const area = make("rect", { x: left, y: 0, width: width - left - right, height: base, fill: "transparent" }, root);
  const near = (event) => Math.round(((event.clientX - area.getBoundingClientRect().left) / area.getBoundingClientRect().width) * (count - 1));
  area.addEventListener("pointermove", (event) => showTip(event, option.describe(Math.min(count - 1, Math.max(0, near(event))))));
  area.addEventListener("pointerleave", hideTip);
  if (option.pick) area.addEventListener("click", (event) => option.pick(near(event)));
}
/** What the axes show, and its unit: y's above the chart, x's below it. */
function axisTitles(root, x, y, middle, height) {
  if (y) make("text", { x: 0, y: 11, class: "axis" }, root, y);
  make("text", { x: middle, y: height - 4, "text-anchor": "middle", class: "axis" }, root, x);
}
function powers(low, high) {
  const out = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.floor(Math.log10(high) + 1e-9); e++) out.push(10 ** e);
  return out.length ? out : [low, high];
}

/** A row of buttons of which one is chosen; arrow keys move the choice. */
function choices(parent, items, current, pick) {
  parent.replaceChildren();
  items.forEach(([value, text, title], i) => {
    const on = value === current;
    const button = element("button", { type: "button", role: "radio", "aria-checked": on, tabindex: on ? 0 : -1 }, parent);
    if (typeof text === "string") button.textContent = text; else { button.append(text); button.setAttribute("aria-label", title); }
    if (title) hover(button, title);
    button.addEventListener("click", () => pick(value));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      pick(items[(i + step + items.length) % items.length][0]);
      parent.querySelector("[aria-checked=true]").focus();
    });
  });
}
