// The page: data out of its JSON, what is chosen, and one function for each figure.
const DATA = JSON.parse(document.getElementById("data").textContent);
const C = DATA.config, T = DATA.ids.length, LAYERS = C.num_hidden_layers;
const HEADS = C.mamba_n_heads, QUERIES = C.num_attention_heads;
const BRANCHES = DATA.branches, NAMES = { ssm: "SSM", attention: "Attention", mlp: "MLP" };
const byId = (id) => document.getElementById(id);

/** A tensor of the data: at(...index), range over all values. */
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.f32), (c) => c.charCodeAt(0));
  const values = new Float32Array(bytes.buffer), shape = packed.shape, rank = shape.length;
  if (packed.lower) {
    const n = shape[rank - 1], size = (n * (n + 1)) / 2;
    return { shape, values, at: (i, j, r, c) => (c > r ? 0 : values[(i * shape[1] + j) * size + (r * (r + 1)) / 2 + c]) };
  }
  return {
    shape, values,
    at(...index) {
      let place = 0;
      for (let i = 0; i < rank; i++) place = place * shape[i] + (i < index.length ? index[i] : 0);
      return values[place];
    },
  };
}
const X = Object.fromEntries(Object.entries(DATA.tensors).map(([name, packed]) => [name, unpack(packed)]));

const shown = (id) => (DATA.text[id] || "").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";
const word = (t) => shown(DATA.ids[t]);
const quoted = (text) => `“${text}”`;
const name = (t) => `${t} ${quoted(word(t))}`;
const range = (n) => Array.from({ length: n }, (_, i) => i);

const S = {
  token: Math.floor((DATA.promptTokens - 1 + T - 1) / 2), layer: Math.floor(LAYERS / 2), head: 0, query: 0, read: 0,
  size: "share", time: "half_life", span: T > DATA.promptTokens ? "answer" : "all",
};
S.read = S.token;

function set(change) {
  Object.assign(S, change);
  S.token = Math.min(T - 1, Math.max(0, S.token));
  S.layer = Math.min(LAYERS - 1, Math.max(0, S.layer));
  S.head = Math.min(HEADS - 1, Math.max(0, S.head));
  S.read = Math.min(S.token, Math.max(0, S.read));
  const focused = document.activeElement, label = focused && focused.getAttribute("aria-label");
  const place = focused && focused.closest(".figure, figure, .choices, .thumbs");
  draw();
  // Figures are drawn anew: give the focus back to the one that had it.
  if (place && label && !document.body.contains(focused)) {
    const again = [...place.querySelectorAll("canvas[aria-label], button[aria-label]")].find((n) => n.getAttribute("aria-label") === label);
    if (again) again.focus({ preventScroll: true });
  }
}
const moveCell = (dr, dc) => set({ layer: S.layer + dr, token: S.token + dc });

function header() {
  document.title = `Inside ${DATA.model}: ${DATA.title}`;
  byId("title").textContent = quoted(DATA.title);
  byId("kicker").textContent = `Inside ${DATA.model}`;
  byId("lede").textContent = "What a model with attention and a state space model side by side computes for this text, token by token and layer by layer.";
  const answer = T - DATA.promptTokens;
  byId("facts").textContent = [`${LAYERS} layers`, `width ${C.hidden_size}`, `${HEADS} SSM heads with a state of ${C.mamba_d_head === "auto" ? "" : C.mamba_d_head + " × "}${C.mamba_d_state}`,
    `${QUERIES} attention heads of ${C.head_dim}`, DATA.dtype, `${DATA.promptTokens} tokens of prompt${answer ? ` and ${answer} of the model’s answer` : ""}`].join("  ·  ");
  byId("foot").textContent = "Every number is in this file; nothing is fetched. Made by falcon-h1r dissect.";
  const strip = byId("strip");
  range(T).forEach((t) => {
    const node = element("span", { class: `tok${t === DATA.promptTokens ? " first-answer" : ""}`, role: "option", id: `tok-${t}`, "data-token": t }, strip, word(t));
    hover(node, `token ${name(t)}, id ${DATA.ids[t]}${t === DATA.promptTokens ? "\nhere the model’s answer begins" : ""}`);
    node.addEventListener("click", () => set({ token: t, read: t }));
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: { token: S.token - 1 }, ArrowRight: { token: S.token + 1 }, ArrowUp: { layer: S.layer - 1 }, ArrowDown: { layer: S.layer + 1 }, Home: { token: 0 }, End: { token: T - 1 } }[event.key];
    if (!step) return;
    event.preventDefault();
    set(step);
  });
  const slider = byId("layer");
  slider.max = LAYERS - 1;
  slider.addEventListener("input", () => set({ layer: Number(slider.value) }));
}

function controls() {
  const strip = byId("strip");
  [...strip.children].forEach((node, t) => node.setAttribute("aria-selected", t === S.token));
  strip.setAttribute("aria-activedescendant", `tok-${S.token}`);
  const node = strip.children[S.token], box = strip.getBoundingClientRect(), at = node.getBoundingClientRect();
  if (at.left < box.left || at.right > box.right) strip.scrollLeft += at.left - box.left - box.width / 2;
  byId("layer").value = S.layer;
  byId("layer").setAttribute("aria-valuetext", `layer ${S.layer}`);
  byId("layer-out").textContent = `${S.layer} (0–${LAYERS - 1})`;
  const now = byId("now");
  now.replaceChildren("token ", element("b", {}, null, name(S.token)), " → next ", element("b", {}, null, quoted(shown(X["attribution.token"].at(S.token)))),
    ` ${percent(X["lens.top_probabilities"].at(LAYERS, S.token, 0))}`);
}
const percent = (p) => (p > 0.9995 && p < 1 ? "> 99.9 %" : p > 0 && p < 1e-4 ? "< 0.01 %" : `${short(100 * p)} %`);

// --- one block -------------------------------------------------------------------------------
function step(parent, { tap: key, title, what }) {
  const entry = DATA.walk[S.layer][key];
  const box = element("div", { class: "step", id: `step-${key}` }, parent);
  element("h4", {}, box, title);
  element("div", { class: "what" }, box, what);
  const shape = element("div", { class: "shape" }, box);
  entry.axes.forEach((axis, i) => {
    if (axis === "b") return;
    if (shape.childNodes.length) shape.append(" × ");
    element("b", {}, shape, String(entry.shape[i]));
    shape.append(` ${DATA.axes[axis] || axis}`);
  });
  const acting = Object.entries(entry.multipliers).map(([key, v]) => `${key} ${short(v)}`);
  element("span", { class: "src" }, box, [...acting, entry.where.replace("falcon_h1r/", "")].join("  ·  "));
  entry.rms_ ??= unpack(entry.token_rms);
  entry.values_ ??= unpack(entry.token_values);
  const rms = entry.rms_.at(S.token), values = range(entry.values_.shape[1]).map((i) => entry.values_.at(S.token, i));
  const side = element("div", { class: "vals" }, box), size = Math.max(...values.map(Math.abs)) || 1;
  const root = svg(side, 84, 34, `first values of ${title}`);
  make("line", { x1: 0, x2: 84, y1: 17, y2: 17, stroke: token("line") }, root);
  values.forEach((v, i) => make("rect", { x: i * 14 + 3, y: v > 0 ? 17 - (16 * v) / size : 17, width: 9, height: Math.max(0.5, (16 * Math.abs(v)) / size), fill: css(ramp("signed", v > 0 ? 0.85 : 0.15)), rx: 1 }, root));
  element("span", {}, side, `rms ${short(rms)}`);
  hover(side, () => `${key}\nat token ${name(S.token)}\nrms ${exact(rms)}\nfirst values ${values.map(exact).join(", ")}\nall tokens: ${exact(entry.min)} to ${exact(entry.max)}`);
}

function walk() {
  const root = byId("fig-walk");
  root.replaceChildren();
  const flow = element("div", { class: "flow" }, root);
  const of = (lane) => DATA.boxes.filter((box) => box.lane === lane);
  const run = (parent, boxes) => boxes.forEach((box) => step(parent, box));
  const lane = (parent, name, title, text, wide) => {
    const node = element("div", { class: "lane", style: `--lane: var(--${name})` }, parent);
    element("h3", {}, node, title);
    element("p", { class: "read" }, node, text);
    run(wide ? element("div", { class: "lanes several" }, node) : node, of(name));
  };
  const [first, norm, middle, last] = of("");
  run(element("div", { class: "lanes several" }, flow), [first, norm]);
  element("div", { class: "sum" }, flow, "the same norm feeds both branches");
  const lanes = element("div", { class: "lanes" }, flow);
  lane(lanes, "ssm", "SSM branch", "memory of fixed size, carried along");
  lane(lanes, "attention", "Attention branch", "memory that grows, looked up");
  element("div", { class: "sum" }, flow, "both are added to the residual");
  run(flow, [middle]);
  lane(flow, "mlp", "MLP", "each token by itself", true);
  element("div", { class: "sum" }, flow, "added to the residual");
  run(flow, [last]);
}

// --- what branches add -----------------------------------------------------------------------
const rowHeight = (rows) => Math.max(6, Math.min(20, 320 / rows));
function sizes() {
  choices(byId("size-choice"), [["share", "Share of the residual"], ["norm", "Length"], ["cosine", "Cosine with the residual"]], S.size, (size) => set({ size }));
  // The MLP is added to the residual that holds both branches; its length follows from what was added.
  const value = (b) => (l, t) => {
    const norm = X["contribution.norm"].at(l, b, t);
    if (S.size === "norm") return norm;
    if (S.size === "cosine") return X["contribution.cosine"].at(l, b, t);
    return norm / X["residual.before"].at(l, b, t);
  };
  const all = range(3).flatMap((b) => range(LAYERS).flatMap((l) => range(T).map((t) => value(b)(l, t)))).filter(Number.isFinite);
  const colours = S.size === "cosine" ? scale("signed", -1, 1) : scale("root", 0, Math.max(...all));
  const root = byId("fig-size");
  root.replaceChildren();
  BRANCHES.forEach((branch, b) => {
    const box = element("div", { class: "heat" }, root);
    element("div", { class: "name", style: `color: var(--${branch})` }, box, NAMES[branch]);
    heat(box, {
      rows: LAYERS, cols: T, value: value(b), colours, rowHeight: rowHeight(LAYERS), rowName: (l) => `layer ${l}`, colName: b === 2 ? word : null,
      selected: () => [S.layer, S.token], pick: (layer, t) => set({ layer, token: t }), move: moveCell, label: `${NAMES[branch]}: ${S.size} by layer and token`,
      describe: (l, t) => `layer ${l}, token ${name(t)}\n${NAMES[branch]}: ${S.size} ${exact(value(b)(l, t))}\nlength ${exact(X["contribution.norm"].at(l, b, t))}, cosine ${exact(X["contribution.cosine"].at(l, b, t))}`,
    });
  });
  legend(root, colours, { share: "length, as a multiple of the residual’s", norm: "Euclidean length", cosine: "cosine" }[S.size]);
}

function keys(parent, withEmbedding) {
  const box = element("div", { class: "keys" }, parent);
  [...(withEmbedding ? ["embedding"] : []), ...BRANCHES].forEach((branch) => {
    const item = element("span", {}, box);
    element("i", { style: `background: var(--${branch})` }, item);
    item.append(NAMES[branch] || "Embedding");
  });
}

function attribution() {
  const t = S.token, target = quoted(shown(X["attribution.token"].at(t))), root = byId("fig-attr");
  byId("attr-text").textContent = `After token ${name(t)} the model finds ${target} likeliest (${percent(X["lens.top_probabilities"].at(LAYERS, t, 0))}), with a logit of ${short(X["attribution.logit"].at(t))}. This is who it comes from.`;
  root.replaceChildren();
  keys(root, true);
  const rows = [{ group: "embedding", value: X["attribution.embedding"].at(t), colour: token("embedding"), text: `embedding\n${exact(X["attribution.embedding"].at(t))} of ${exact(X["attribution.logit"].at(t))} logits` }];
  range(LAYERS).forEach((l) => BRANCHES.forEach((branch, b) => {
    const value = X["attribution.branches"].at(l, b, t);
    rows.push({ group: `layer ${l}`, value, colour: token(branch), strong: l === S.layer, pick: l, text: `layer ${l}, ${NAMES[branch]}\n${exact(value)} of ${exact(X["attribution.logit"].at(t))} logits` });
  }));
  bars(root, rows, `Parts of the logit of ${target}`, "part of the logit, in logits", (layer) => set({ layer }));
}

// --- the two matrices ------------------------------------------------------------------------
function thumbs(parent, count, matrix, colours, current, pick, kind) {
  const items = range(count).map((h) => {
    const canvas = element("canvas", { width: T, height: T }), context = canvas.getContext("2d"), image = context.createImageData(T, T);
    const tone = colours(h);
    range(T).forEach((r) => range(r + 1).forEach((c) => {
      const [red, green, blue] = tone.colour(matrix.at(S.layer, h, r, c));
      image.data.set([red, green, blue, 255], 4 * (r * T + c));
    }));
    context.putImageData(image, 0, 0);
    return [h, canvas, `${kind} head ${h}`];
  });
  choices(parent, items, current, pick);
}
function extreme(matrix, h) {
  let most = 0;
  for (let r = 0; r < T; r++) for (let c = 0; c <= r; c++) most = Math.max(most, Math.abs(matrix.at(S.layer, h, r, c)));
  return most;
}
const attentionScale = () => scale("root", 0, 1, "attention");
const hiddenScale = (h) => scale("signedRoot", 0, extreme(X.hidden_attention, h));

function matrix(parent, source, h, colours, label, unit) {
  parent.replaceChildren();
  const box = element("div", { class: "heat" }, parent);
  heat(box, {
    rows: T, cols: T, square: true, font: MONO, value: (r, c) => source.at(S.layer, h, r, c), blank: (r, c) => c > r, colours, rowName: (r) => labelled(word(r)), colName: word, label,
    selected: () => [S.token, S.read], pick: (t, read) => set({ token: t, read }), move: (dr, dc) => set({ token: S.token + dr, read: S.read + dc }),
    describe: (r, c) => `${name(r)} reads ${name(c)}\n${unit} ${exact(source.at(S.layer, h, r, c))}`,
  });
  legend(box, colours, unit === "M" ? "M[t, s]" : "attention weight");
}

function maps() {
  byId("cap-att").textContent = `Attention: layer ${S.layer}, head ${S.query} (0–${QUERIES - 1})`;
  byId("cap-ssm").textContent = `Hidden attention of the SSM: layer ${S.layer}, head ${S.head} (0–${HEADS - 1})`;
  thumbs(byId("thumbs-att"), QUERIES, X.attention, attentionScale, S.query, (query) => set({ query }), "attention");
  thumbs(byId("thumbs-ssm"), HEADS, X.hidden_attention, hiddenScale, S.head, (head) => set({ head }), "SSM");
  matrix(byId("fig-att"), X.attention, S.query, attentionScale(), "Attention map. Arrow keys: up and down move the reading token, left and right the token that is read.", "weight");
  matrix(byId("fig-ssm"), X.hidden_attention, S.head, hiddenScale(S.head), "Hidden attention map. Arrow keys: up and down move the reading token, left and right the token that is read.", "M");
  rowFigure();
}

function rowFigure() {
  const t = S.token, root = byId("fig-row");
  byId("row-title").textContent = `What token ${name(t)} reads`;
  root.replaceChildren();
  const weights = range(T).map((s) => X.attention.at(S.layer, S.query, t, s)), own = range(T).map((s) => X.hidden_attention.at(S.layer, S.head, t, s));
  const most = Math.max(...weights) || 1, size = Math.max(...own.map(Math.abs)) || 1, left = margin([short(most), short(-size)]);
  const width = Math.max(240, root.clientWidth), side = (width - left) / T, top = 108, half = 64;
  const stand = upright(range(t + 1).map((s) => labelled(word(s))), side), base = top + stand.room + 8, height = base + 2 * half + 26;
  const picture = svg(root, width, height, `Row of token ${t} of both maps`);
  const zero = base + half;
  const text = (x, y, value, extra = {}) => make("text", { x, y, "text-anchor": "end", ...extra }, picture, value);
  make("rect", { x: left + S.read * side, y: 0, width: side, height: height - 18, fill: token("faint") }, picture);
  make("line", { x1: left, x2: width, y1: top, y2: top, stroke: token("line") }, picture);
  make("line", { x1: left, x2: width, y1: zero, y2: zero, stroke: token("line") }, picture);
  text(left - 6, 26, short(most)); text(left - 6, top, "0");
  text(left - 6, base + 8, short(size)); text(left - 6, zero + 4, "0"); text(left - 6, base + 2 * half, short(-size));
  make("text", { x: left + 4, y: 12, class: "strong axis" }, picture, `attention weight, head ${S.query}`);
  make("text", { x: left + 4, y: base + 12, class: "strong axis" }, picture, `hidden attention M, head ${S.head}`);
  axisTitles(picture, "token that is read", "", (left + width) / 2, height);
  range(T).forEach((s) => {
    const x = left + s * side + side * 0.12, wide = side * 0.76;
    make("rect", { x, width: wide, y: top - ((top - 20) * weights[s]) / most, height: ((top - 20) * weights[s]) / most, fill: token("attention"), rx: Math.min(2, wide / 4) }, picture);
    const bar = (half * Math.abs(own[s])) / size;
    make("rect", { x, width: wide, y: own[s] > 0 ? zero - bar : zero, height: bar, fill: css(ramp("signed", own[s] > 0 ? 0.8 : 0.2)), rx: Math.min(2, wide / 4) }, picture);
    if (s <= t && isNamed(s, S.read, stand.step, side)) {
      const at = left + (s + 0.5) * side, place = stand.turned(labelled(word(s))) ? { "text-anchor": "end", transform: `translate(${at + 4} ${top + 6}) rotate(-90)` } : { "text-anchor": "middle", x: at, y: top + 15 };
      make("text", { ...place, style: `font: ${MONO}`, class: s === S.read ? "token strong" : "token" }, picture, labelled(word(s)));
    }
    const area = make("rect", { x: left + s * side, y: 0, width: side, height, fill: "transparent", style: "cursor: pointer" }, picture);
    hover(area, s > t ? `${name(s)} comes later` : `${name(t)} reads ${name(s)}\nattention weight ${exact(weights[s])}\nM ${exact(own[s])}`);
    area.addEventListener("click", () => set({ read: s }));
  });
}

// --- time scales -----------------------------------------------------------------------------
const TIMES = {
  half_life: ["Half-life", "tokens"], dt: ["Step size dt", ""], decay: ["Kept per token", ""],
  "hidden_attention.reach": ["Reach of the SSM", "tokens"], "attention.reach": ["Reach of attention", "tokens"],
};
function times() {
  choices(byId("time-choice"), Object.entries(TIMES).map(([key, [text]]) => [key, text]), S.time, (time) => set({ time }));
  const source = X[S.time], heads = source.shape[1], unit = TIMES[S.time][1], ofAttention = S.time === "attention.reach";
  const all = Array.from(source.values).filter((v) => Number.isFinite(v) && v > 0);
  const log = S.time === "half_life" || S.time === "dt", low = all.reduce((a, b) => Math.min(a, b), Infinity), top = all.reduce((a, b) => Math.max(a, b), 0);
  const colours = log ? scale("log", Math.max(low, top / 1e4), top) : S.time === "decay" ? scale("linear", 0, 1) : scale("linear", 0, T, ofAttention ? "attention" : undefined);
  const root = byId("fig-time");
  root.replaceChildren();
  const box = element("div", { class: "heat" }, root);
  heat(box, {
    rows: heads, cols: T, value: (h, t) => source.at(S.layer, h, t), colours, rowHeight: Math.max(9, Math.min(22, 330 / heads)), rowName: (h) => `head ${h}`, colName: word,
    selected: () => [ofAttention ? S.query : S.head, S.token], pick: (h, t) => set(ofAttention ? { query: h, token: t } : { head: h, token: t }),
    move: (dh, dt) => set(ofAttention ? { query: Math.min(QUERIES - 1, Math.max(0, S.query + dh)), token: S.token + dt } : { head: S.head + dh, token: S.token + dt }),
    label: `${TIMES[S.time][0]} by head and token`,
    describe: (h, t) => `head ${h}, token ${name(t)}\n${TIMES[S.time][0]}: ${exact(source.at(S.layer, h, t))} ${unit}` + (ofAttention ? "" : `\ndt ${exact(X.dt.at(S.layer, h, t))}, kept ${exact(X.decay.at(S.layer, h, t))}`),
  });
  legend(box, colours, unit ? `${TIMES[S.time][0]}, in ${unit}` : TIMES[S.time][0]);
  distribution(); convolution(); stateLines("fig-norm", "state.norm", "Frobenius norm of the state"); stateLines("fig-rank", "state.effective_rank", "effective rank of the state, in directions");
}

function distribution() {
  const root = byId("fig-dist");
  root.replaceChildren();
  const width = Math.max(240, root.clientWidth), left = 60, high = Math.max(10, Math.min(24, 340 / HEADS)), height = HEADS * high + 42;
  const picture = svg(root, width, height, "Half-lives of each head, one mark per token");
  const every = Array.from(X.half_life.values).filter((v) => Number.isFinite(v));
  const low = Math.floor(Math.log10(every.reduce((a, b) => Math.min(a, b), Infinity))), top = Math.ceil(Math.log10(every.reduce((a, b) => Math.max(a, b), 0)));
  const x = (v) => left + ((Math.log10(v) - low) / (top - low || 1)) * (width - left - 10);
  for (let e = low; e <= top; e++) {
    make("line", { x1: x(10 ** e), x2: x(10 ** e), y1: 0, y2: HEADS * high, stroke: token("line") }, picture);
    make("text", { x: x(10 ** e), y: height - 23, "text-anchor": e === top ? "end" : "middle" }, picture, short(10 ** e));
  }
  axisTitles(picture, "half-life, in tokens (logarithmic)", "", (left + width) / 2, height);
  make("line", { x1: x(T), x2: x(T), y1: 0, y2: HEADS * high, stroke: token("muted"), "stroke-dasharray": "3 3" }, picture);
  range(HEADS).forEach((h) => {
    const values = range(T).map((t) => X.half_life.at(S.layer, h, t)).filter(Number.isFinite).sort((a, b) => a - b), y = (h + 0.5) * high, on = h === S.head;
    if (on) make("rect", { x: 0, y: h * high, width, height: high, fill: token("faint") }, picture);
    make("text", { x: left - 8, y: y + 4, "text-anchor": "end", class: on ? "strong" : "" }, picture, `head ${h}`);
    values.forEach((v) => make("line", { x1: x(v), x2: x(v), y1: y - high * 0.26, y2: y + high * 0.26, stroke: token("ssm"), "stroke-opacity": on ? 0.65 : 0.32, "stroke-width": 1.5 }, picture));
    if (values.length) {
      const middle = values[Math.floor(values.length / 2)];
      make("line", { x1: x(middle), x2: x(middle), y1: y - high * 0.44, y2: y + high * 0.44, stroke: token("ink"), "stroke-width": 2 }, picture);
      const area = make("rect", { x: 0, y: h * high, width, height: high, fill: "transparent", style: "cursor: pointer" }, picture);
      hover(area, `head ${h}\nhalf-life: median ${exact(middle)} tokens\n${exact(values[0])} to ${exact(values[values.length - 1])}`);
      area.addEventListener("click", () => set({ head: h }));
    }
  });
}

function convolution() {
  const root = byId("fig-conv"), source = X["conv.quantiles"], taps = source.shape[3];
  root.replaceChildren();
  const most = nice(Math.max(...range(3).flatMap((s) => range(taps).flatMap((k) => [0, 4].map((q) => Math.abs(source.at(S.layer, q, s, k)))))));
  const width = Math.max(240, root.clientWidth), left = margin([short(-most)]), height = 224, first = 24, part = (width - left) / 3, base = height - 56;
  const picture = svg(root, width, height, "Quantiles of the convolution's weights for x, B and C");
  const y = (v) => first + ((most - v) / (2 * most)) * (base - first);
  axisTitles(picture, "place before the token, in tokens; by segment", "weight", (left + width) / 2, height);
  [most, 0, -most].forEach((v) => { make("line", { x1: left, x2: width, y1: y(v), y2: y(v), stroke: token("line") }, picture); make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, picture, short(v)); });
  ["x", "B", "C"].forEach((segment, s) => {
    const x = (k) => left + s * part + 7 + ((k + 0.5) / taps) * (part - 14), wide = Math.min(18, (part - 14) / taps - 6);
    make("text", { x: left + (s + 0.5) * part, y: height - 22, "text-anchor": "middle", class: "strong" }, picture, segment);
    range(taps).forEach((k) => {
      const q = range(5).map((i) => source.at(S.layer, i, s, k));
      make("rect", { x: x(k) - wide / 2, width: wide, y: y(q[4]), height: y(q[0]) - y(q[4]), fill: token("ssm"), opacity: 0.22, rx: 2 }, picture);
      make("rect", { x: x(k) - wide / 2, width: wide, y: y(q[3]), height: y(q[1]) - y(q[3]), fill: token("ssm"), opacity: 0.55, rx: 2 }, picture);
      make("line", { x1: x(k) - wide / 2, x2: x(k) + wide / 2, y1: y(q[2]), y2: y(q[2]), stroke: token("ink"), "stroke-width": 2 }, picture);
      const back = taps - 1 - k;
      make("text", { x: x(k), y: height - 40, "text-anchor": "middle" }, picture, back ? `−${back}` : "0");
      hover(make("rect", { x: x(k) - part / taps / 2, y: 0, width: part / taps, height: base, fill: "transparent" }, picture), `${segment}, ${back ? `${back} token${back > 1 ? "s" : ""} ago` : "the token itself"}\nmedian ${exact(q[2])}\nmiddle half ${exact(q[1])} to ${exact(q[3])}\n5–95 % ${exact(q[0])} to ${exact(q[4])}`);
    });
  });
}

function stateLines(id, key, label) {
  const root = byId(id), source = X[key], count = source.shape[2], ranks = key !== "state.norm";
  root.replaceChildren();
  const at = ranks ? Array.from(X["state.positions"].values) : range(T), row = (h, s = source) => range(count).map((i) => s.at(S.layer, h, i));
  const series = range(HEADS).filter((h) => h !== S.head).map((h) => ({ values: row(h), colour: token("muted"), opacity: 0.45 }));
  series.push({ values: row(S.head), colour: token("ssm"), wide: 2.6, mark: true });
  const selected = at.reduce((best, t, i) => (Math.abs(t - S.token) < Math.abs(at[best] - S.token) ? i : best), 0);
  lines(root, series, {
    label: `${label}, by head and token`, xTitle: "after which token", yTitle: label, ticks: [0, count - 1], xs: (i) => `token ${at[i]}`, selected, pick: (i) => set({ token: at[Math.min(count - 1, Math.max(0, i))] }),
    describe: (i) => `token ${name(at[i])}\nhead ${S.head}: ${exact(source.at(S.layer, S.head, i))}` + (ranks ? `\nnumerical rank ${X["state.rank"].at(S.layer, S.head, i)}` : ""),
  });
}

// --- the lens --------------------------------------------------------------------------------
function lensFigure() {
  const root = byId("fig-lens"), colours = scale("linear", 0, 1);
  byId("lens-legend").replaceChildren();
  legend(byId("lens-legend"), colours, "probability of the token that is named", percent);
  const scrolled = root.scrollLeft;
  root.replaceChildren();
  const table = element("table", { class: "lens" }, root), head = element("tr", {}, element("thead", {}, table));
  element("th", {}, head, "token");
  range(T).forEach((t) => element("th", { scope: "col", class: t === S.token ? "on" : "" }, head, labelled(word(t))));
  const body = element("tbody", {}, table);
  range(LAYERS + 1).forEach((point) => {
    const line = element("tr", {}, body);
    element("th", { scope: "row" }, line, point ? `layer ${point - 1}` : "embedding");
    range(T).forEach((t) => {
      const id = X["lens.top_ids"].at(point, t, 0), p = X["lens.top_probabilities"].at(point, t, 0), colour = colours.colour(p);
      const dark = 0.2126 * linear(colour[0] / 255) + 0.7152 * linear(colour[1] / 255) + 0.0722 * linear(colour[2] / 255) < 0.18;
      const on = t === S.token && point === S.layer + 1;
      const cell = element("td", { class: (id === X["attribution.token"].at(t) ? "same " : "") + (on ? "on" : "") }, line, labelled(shown(id)));
      cell.style.background = css(colour);
      cell.style.color = dark ? "#f6f4ee" : "#1c1f24";
      const rank = t < T - 1 ? `\nthe true next token ${quoted(word(t + 1))} has place ${X["lens.rank"].at(point, t)}` : "";
      hover(cell, `${point ? `after layer ${point - 1}` : "at the embedding"}, token ${name(t)}\n${quoted(shown(id))} ${percent(p)}\nKL to the final distribution ${exact(X["lens.kl"].at(point, t))} nats${rank}`);
      cell.addEventListener("click", () => set({ token: t, layer: point - 1 }));
    });
  });
  root.scrollLeft = scrolled;
  const on = root.querySelector("td.on");
  if (on) {
    const left = on.offsetLeft, away = left < root.scrollLeft + 90 || left > root.scrollLeft + root.clientWidth - 50;
    if (away) root.scrollLeft = left - root.clientWidth / 2;
  }
  const point = S.layer + 1, t = S.token, top = X["lens.top_ids"].shape[2];
  byId("lens-title").textContent = `After layer ${S.layer}, token ${name(t)}`;
  const list = byId("fig-top");
  list.replaceChildren();
  const width = Math.max(240, list.clientWidth), picture = svg(list, width, top * 24 + 4, "Likeliest next tokens");
  const bold = "600 12px ui-monospace, 'Liberation Mono', monospace", names = range(top).map((k) => labelled(shown(X["lens.top_ids"].at(point, t, k))));
  const left = Math.max(96, Math.max(...names.map((text) => wide(text, bold))) + 14);
  range(top).forEach((k) => {
    const id = X["lens.top_ids"].at(point, t, k), p = X["lens.top_probabilities"].at(point, t, k), y = k * 24;
    make("text", { x: left - 10, y: y + 16, "text-anchor": "end", class: "strong", style: `font: ${bold}` }, picture, names[k]);
    make("rect", { x: left, y: y + 3, width: Math.max(1, (width - left - 70) * p), height: 17, rx: 2, fill: css(ramp("sequential", 0.62)) }, picture);
    make("text", { x: left + Math.max(1, (width - left - 70) * p) + 7, y: y + 16 }, picture, percent(p));
    hover(make("rect", { x: 0, y, width, height: 24, fill: "transparent" }, picture), `${quoted(shown(id))}\nprobability ${exact(p)}`);
  });
  const kl = byId("fig-kl"), points = range(LAYERS + 1), ranked = t < T - 1;
  kl.replaceChildren();
  byId("lens-read").textContent = "KL divergence, in nats, from the final distribution to the one after each layer, at this token: 0 when nothing is left to decide." + (ranked ? ` The true next token, ${quoted(word(t + 1))}, takes place ${points.map((i) => X["lens.rank"].at(i, t)).join(" → ")}.` : "");
  lines(kl, [{ values: points.map((i) => X["lens.kl"].at(i, t)), colour: css(ramp("sequential", 0.7)), wide: 2.4, mark: true }], {
    label: "KL divergence to the final distribution by layer", xTitle: "after which layer", yTitle: "KL divergence, in nats", height: 160, ticks: [0, LAYERS], xs: (i) => (i ? `layer ${i - 1}` : "embedding"), selected: point, pick: (i) => set({ layer: i - 1 }),
    describe: (i) => `${i ? `after layer ${i - 1}` : "at the embedding"}\nKL ${exact(X["lens.kl"].at(i, t))} nats`,
  });
}
byId("fig-lens").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  moveCell(...step);
});

// --- switches --------------------------------------------------------------------------------
function switchFigure() {
  const source = X["switch.loss"];
  if (!source) { byId("s-switch").hidden = true; return; }
  const p = DATA.promptTokens, has = T > p;
  // Position t is the prediction of token t + 1.
  const spans = { answer: [p - 1, T - 1], prompt: [0, p - 1], all: [0, T - 1] };
  const items = [...(has ? [["answer", "The answer"], ["prompt", "The prompt"]] : []), ["all", has ? "Both" : "All tokens"]];
  if (S.token < T - 1) items.push(["one", `Only the token after ${name(S.token)}`]);
  if (S.span === "one" && S.token >= T - 1) S.span = "all";
  spans.one = [S.token, S.token + 1];
  choices(byId("switch-choice"), items, S.span, (span) => set({ span }));
  const [from, to] = spans[S.span], mean = (f) => { let sum = 0; for (let t = from; t < to; t++) sum += f(t); return sum / (to - from); };
  const loss = mean((t) => X.loss.at(t));
  byId("switch-read").textContent = `Change of the mean loss, in nats per token (0.69 nats: half as likely). With everything on, the loss of these ${to - from} token${to - from > 1 ? "s" : ""} is ${short(loss)} nats.`;
  const root = byId("fig-switch");
  root.replaceChildren();
  keys(root, false);
  bars(root, range(LAYERS).flatMap((l) => BRANCHES.map((branch, b) => {
    const value = mean((t) => source.at(l, b, t));
    return { group: `layer ${l}`, value, colour: token(branch), strong: l === S.layer, pick: l, text: `layer ${l} without ${NAMES[branch]}\nloss ${exact(loss + value)} nats, change ${exact(value)}` };
  })), "Change of loss when a branch is off", "change of the mean loss, in nats per token", (layer) => set({ layer }));
}

// --- theme, size, start ----------------------------------------------------------------------
const MODES = ["auto", "light", "dark"], system = matchMedia("(prefers-color-scheme: dark)");
let mode = "auto";
function applyTheme() {
  document.documentElement.dataset.theme = mode === "auto" ? (system.matches ? "dark" : "light") : mode;
  byId("theme").textContent = `Theme: ${mode}`;
}
byId("theme").addEventListener("click", () => { mode = MODES[(MODES.indexOf(mode) + 1) % 3]; applyTheme(); draw(); });
system.addEventListener("change", () => { applyTheme(); draw(); });

function draw() {
  hideTip();
  controls(); walk(); sizes(); attribution(); maps(); times(); lensFigure(); switchFigure();
}
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's address bar comes and goes
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 120);
});
applyTheme();
header();
draw();
