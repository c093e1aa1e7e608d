"use strict";
// The map: CONTENT is what map_page.py packed; pictures and neighbours are read when first needed.
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7fbc41",
  "#b2182b", "#35978f", "#bf812d", "#f768a1", "#6a8dba", "#a6761d", "#41ab5d", "#e7298a"];
const OTHER = "#8f8f8f";
const MOST_FOUND = 20000, MOST_LISTED = 40, MOST_RINGED = 300;
const FAINT = 0.12;  // what was not found

function unpack(text, Kind) {
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : slowly(text);
  return new Kind(bytes.buffer);
}
function slowly(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}
const once = (make) => { let made; return () => (made ??= make()); };

const count = CONTENT.count;
const numbers = { label: unpack(CONTENT.label, Int32Array), cluster: unpack(CONTENT.cluster, Int32Array) };
const places = Object.fromEntries(Object.entries(CONTENT.places).map(([name, text]) => {
  const both = unpack(text, Float32Array);
  return [name, { x: both.subarray(0, count), y: both.subarray(count) }];
}));
const pictures = once(() => $("pictures").textContent.split(","));
const nearest = once(() => unpack($("nearest").textContent, Int32Array));
const cosines = once(() => unpack($("cosines").textContent, Int16Array));
const texts = once(() => CONTENT.paths.map((path, i) => (path + "\n" + labelOf(i)).toLowerCase()));

let traces = [];  // of each, the rows that it shows
let colors = [];  // of each row
const labelOf = (row) => CONTENT.labels[numbers.label[row]];
const said = (row) => [labelOf(row), "cluster " + (numbers.cluster[row] + 1)].filter(Boolean).join(", ");

function picture(row) {
  const frame = document.createElement("div");
  frame.className = "shown";
  const text = $("pictures") ? pictures()[row] : "";
  const address = text ? "data:image/webp;base64," + text : localFile(row);
  if (!address) { frame.textContent = "no picture"; return frame; }
  const image = document.createElement("img");
  image.alt = ""; image.decoding = "async"; image.src = address;
  image.onerror = () => { frame.textContent = "picture not found"; };
  frame.append(image);
  return frame;
}
function localFile(row) {
  if (!CONTENT.root || location.protocol !== "file:") return "";
  return CONTENT.root + "/" + CONTENT.paths[row].split("/").map(encodeURIComponent).join("/");
}
function named(row, more) {
  const name = document.createElement("div"), small = document.createElement("span");
  name.className = "name"; name.textContent = CONTENT.paths[row];
  small.className = "muted"; small.textContent = [more, said(row)].filter(Boolean).join(" · ");
  name.append(small);
  return name;
}

function grouped(by) {
  const numbersOf = numbers[by];
  if (!numbersOf) return [{ name: "all", color: COLORS[0], rows: Int32Array.from({ length: count }, (_, i) => i) }];
  const sizes = new Map();
  for (const number of numbersOf) sizes.set(number, (sizes.get(number) || 0) + 1);
  const largest = [...sizes.entries()].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const own = largest.length > COLORS.length ? largest.slice(0, COLORS.length - 1) : largest;
  const group = new Map(own.map(([number, size], i) => [number, { size, number, color: COLORS[i] }]));
  const left = count - own.reduce((sum, [, size]) => sum + size, 0);
  const rest = { size: left, number: -1, color: OTHER };
  const all = left ? [rest, ...group.values()] : [...group.values()];
  for (const one of all) {
    one.rows = new Int32Array(one.size); one.filled = 0;
    const text = by === "label" ? CONTENT.labels[one.number] || "no label" : "cluster " + (one.number + 1);
    one.name = (one === rest ? "others" : text) + " (" + one.size.toLocaleString("en") + ")";
  }
  for (let row = 0; row < count; row++) {
    const one = group.get(numbersOf[row]) || rest;
    one.rows[one.filled++] = row;
  }
  return all;
}

function paint() {
  const style = getComputedStyle(document.documentElement);
  return { ink: style.getPropertyValue("--ink").trim(), paper: style.getPropertyValue("--paper").trim(),
           muted: style.getPropertyValue("--muted").trim() };
}

const rings = { chosen: [], near: [], found: [] };
const size = () => (count > 30000 ? 3 : count > 5000 ? 4 : 6);
const opacity = () => (rings.found.length ? FAINT : count > 5000 ? 0.7 : 0.85);

function overlay(now) {
  const { x, y } = places[$("layout").value];
  const ring = (rows, color, across, width) => ({
    type: "scattergl", mode: "markers", x: rows.map((r) => x[r]), y: rows.map((r) => y[r]),
    hoverinfo: "skip", showlegend: false,
    marker: { size: across, color, symbol: "circle-open", line: { width } },
  });
  const found = ring(rings.found, rings.found.map((row) => colors[row]), size() + (rings.found.length > MOST_RINGED ? 1 : 3), 0);
  found.marker.symbol = "circle";
  if (rings.found.length <= MOST_RINGED) found.marker.line = { width: 1.2, color: now.ink };
  return [found, ring(rings.near, now.ink, 12, 2),
          ring(rings.chosen, "#ff2d2d", 17, 3)];
}

function draw(whole) {
  const now = paint(), { x, y } = places[$("layout").value], by = $("color").value;
  const groups = grouped(by);
  traces = groups.map((group) => group.rows);
  colors = new Array(count);
  for (const group of groups) for (const row of group.rows) colors[row] = group.color;
  const data = groups.map((group) => ({
    type: "scattergl", mode: "markers", name: group.name, hoverinfo: "none",
    x: Float32Array.from(group.rows, (row) => x[row]), y: Float32Array.from(group.rows, (row) => y[row]),
    marker: { color: group.color, size: size(), opacity: opacity(), line: { width: 0 } },
  }));
  const axis = { visible: false };
  const layout = {
    paper_bgcolor: now.paper, plot_bgcolor: now.paper, margin: { l: 8, r: 8, t: 8, b: 8 },
    dragmode: "pan", hovermode: "closest", hoverdistance: 12, uirevision: whole ? Math.random() : $("layout").value,
    xaxis: axis, yaxis: { ...axis }, showlegend: groups.length > 1,
    legend: { font: { color: now.ink, size: 12, family: "system-ui, sans-serif" }, itemsizing: "constant",
              bgcolor: "rgba(0,0,0,0)", x: 1.01, xanchor: "left", y: 1 },
  };
  const config = { scrollZoom: true, displayModeBar: false, responsive: true, doubleClick: "reset" };
  return Plotly.react("map", [...data, ...overlay(now)], layout, config);
}

function drawRings() {
  const rest = overlay(paint()), first = traces.length;
  const of = (key) => rest.map((ring) => ring[key]);
  if ($("map").data[0].marker.opacity !== opacity())
    Plotly.restyle("map", { "marker.opacity": opacity() }, traces.map((_, i) => i));
  return Plotly.restyle("map", { x: of("x"), y: of("y"), marker: of("marker") }, rest.map((_, i) => first + i));
}

function choose(row, move) {
  const near = CONTENT.near, from = row * near;
  const rows = Array.from(nearest().subarray(from, from + near));
  rings.chosen = [row]; rings.near = rows;
  const side = $("side");
  side.replaceChildren();
  const big = picture(row);
  big.classList.add("big");
  const head = named(row);
  side.append(big, head);
  const title = document.createElement("h2");
  title.textContent = "Nearest by cosine"; title.style.margin = "14px 0 4px";
  side.append(title);
  rows.forEach((other, i) => side.append(entry(other, (cosines()[from + i] / CONTENT.unit).toFixed(3))));
  drawRings();
  if (move) centre(row);
}
function entry(row, more) {
  const button = document.createElement("button");
  button.className = "row"; button.type = "button"; button.dataset.row = row;
  button.append(picture(row), named(row, more));
  button.onclick = () => choose(row, true);
  return button;
}
function centre(row) {
  const { x, y } = places[$("layout").value], full = $("map")._fullLayout;
  const to = {};
  for (const [name, value] of [["xaxis", x[row]], ["yaxis", y[row]]]) {
    const [low, high] = full[name].range, half = (high - low) / 2;
    if (value > low + 0.2 * half && value < high - 0.2 * half) continue;
    to[name + ".range"] = [value - half, value + half];
  }
  if (Object.keys(to).length) Plotly.relayout("map", to);
}

function search() {
  const wanted = $("search").value.trim().toLowerCase();
  const rows = [];
  if (wanted) texts().forEach((text, row) => { if (text.includes(wanted)) rows.push(row); });
  $("found").textContent = wanted ? rows.length.toLocaleString("en") + " found" : "";
  rings.found = rows.slice(0, MOST_FOUND); rings.near = []; rings.chosen = [];
  $("side").replaceChildren();
  if (wanted) {
    for (const row of rows.slice(0, MOST_LISTED)) $("side").append(entry(row));
    if (rows.length > MOST_LISTED) {
      const more = document.createElement("p");
      more.className = "muted"; more.textContent = "and " + (rows.length - MOST_LISTED).toLocaleString("en") + " more";
      $("side").append(more);
    }
  } else help();
  drawRings();
  return rows;
}
function help() {
  const text = document.createElement("p");
  text.className = "muted";
  text.textContent = "Drag to move, scroll to zoom, double-click to see all. Point at an image to see it;" +
    " click it for its nearest neighbours. A click on a colour's name hides it.";
  $("side").replaceChildren(text);
}

function rowOf(event) {
  const point = event.points.find((p) => p.curveNumber < traces.length);
  return point ? traces[point.curveNumber][point.pointNumber] : undefined;
}
let shown = -1;
function hover(event) {
  const row = rowOf(event), card = $("card");
  if (row === undefined) return;
  if (row !== shown) { card.replaceChildren(picture(row), named(row)); shown = row; }
  card.hidden = false;
  const { clientX: x, clientY: y } = event.event, box = card.getBoundingClientRect();
  const left = x + 18 + box.width > innerWidth ? x - box.width - 18 : x + 18;
  const top = Math.min(y + 12, innerHeight - box.height - 8);
  card.style.left = Math.max(4, left) + "px"; card.style.top = Math.max(4, top) + "px";
}

for (const name of Object.keys(places)) {
  const names = { pca: "principal components", umap: "UMAP" };
  $("layout").append(new Option(names[name] || name, name));
}
if (CONTENT.labels.length < 2) {
  $("color").value = "cluster";
  $("color").querySelector('[value="label"]').disabled = true;
}
draw(true).then(() => {
  const map = $("map");
  map.on("plotly_hover", hover);
  map.on("plotly_unhover", () => { $("card").hidden = true; });
  map.on("plotly_relayouting", () => { $("card").hidden = true; });
  map.on("plotly_click", (event) => { const row = rowOf(event); if (row !== undefined) choose(row, false); });
  requestAnimationFrame(() => { document.body.dataset.drawn = Math.round(performance.now()); });
});
help();
$("color").onchange = () => draw(false);
$("layout").onchange = () => draw(true);
$("whole").onclick = () => Plotly.relayout("map", { "xaxis.autorange": true, "yaxis.autorange": true });
dark.addEventListener("change", () => draw(false));
let waiting = 0;
$("search").oninput = () => { clearTimeout(waiting); waiting = setTimeout(search, 150); };
$("search").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  clearTimeout(waiting);
  const rows = search();
  if (rows.length) choose(rows[0], true);
};
