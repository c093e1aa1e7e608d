"use strict";
// Draws CONTENT into the panels that plots_page.py laid out, in the colours of the page's style.
const colors = () => {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { ink: of("--ink"), muted: of("--muted"), paper: of("--paper"), line: of("--line"),
           mark: of("--mark") };
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const CONFIG = { responsive: true, displaylogo: false, doubleClick: "reset",
                 modeBarButtons: [["toImage", "pan2d", "zoom2d", "resetScale2d"]] };
const TICKS = [];  // of logarithmic axes, as people count
for (let power = -9; power < 10; power++) for (const digit of [1, 2, 5]) TICKS.push(digit * 10 ** power);
const FONT = "system-ui, sans-serif";

function axis(paint, more) {
  return { gridcolor: paint.line, linecolor: paint.line, zeroline: false, automargin: true,
           tickfont: { color: paint.muted }, ...more };
}

function frame(paint, more) {
  return { paper_bgcolor: paint.paper, plot_bgcolor: paint.paper, margin: { l: 52, r: 14, t: 12, b: 38 },
           font: { family: FONT, size: 12, color: paint.ink },
           hoverlabel: { bgcolor: paint.paper, bordercolor: paint.line, font: { color: paint.ink } },
           ...more };
}

function kept(id) {  // zoom outlives the reload of a live page
  try { return JSON.parse(sessionStorage.getItem("btpipe-" + id)) || {}; } catch { return {}; }
}

function keep(id, layout) {
  const found = {};
  for (const name of ["xaxis", "yaxis"])
    if (layout[name] && layout[name].autorange === false) found[name] = layout[name].range;
  try { sessionStorage.setItem("btpipe-" + id, JSON.stringify(found)); } catch { /* private */ }
}

function drawPanel(panel, id) {
  const paint = colors();
  const traces = panel.lines.map((line) => ({
    type: "scatter", name: line.name, x: line.x, y: line.y,
    mode: line.x.length < 12 && !line.bound ? "lines+markers" : "lines",
    line: { color: line.color, dash: line.dash, width: line.bound ? 1.2 : 1.8 },
    hovertemplate: "%{y:.4~g}<extra>%{fullData.name}</extra>",
  }));
  const shapes = CONTENT.marks.map((mark) => ({
    type: "line", xref: "x", yref: "paper", x0: mark.x, x1: mark.x, y0: 0, y1: 1,
    line: { color: mark.alarm ? paint.mark : paint.muted, width: 1, dash: "dot" },
  }));
  const labels = CONTENT.marks.map((mark) => ({
    xref: "x", yref: "paper", x: mark.x, y: 1, showarrow: false, yanchor: "bottom",
    text: mark.sign, hovertext: mark.text,
    font: { size: 12, color: mark.alarm ? paint.mark : paint.muted },
  }));
  const zoom = kept(id);
  const ranged = (name) => (zoom[name] ? { range: zoom[name], autorange: false } : {});
  const layout = frame(paint, {
    shapes, annotations: labels, hovermode: "x", showlegend: traces.length > 1,
    legend: { orientation: "h", y: -0.16, x: 0, yanchor: "top", font: { size: 11.5 } },
    xaxis: axis(paint, { title: { text: CONTENT.by, standoff: 4 }, rangemode: "tozero", ...ranged("xaxis") }),
    yaxis: axis(paint, panel.log
      ? { type: "log", tickvals: TICKS, ticktext: TICKS.map((tick) => +tick.toPrecision(1) + ""), ...ranged("yaxis") }
      : { rangemode: panel.from_zero ? "tozero" : "normal", ...ranged("yaxis") }),
  });
  if (CONTENT.marks.length) layout.margin.t = 22;
  const place = document.getElementById(id);
  return Plotly.react(place, traces, layout, CONFIG).then(() => {
    place.removeAllListeners("plotly_relayout");
    place.on("plotly_relayout", () => keep(id, place._fullLayout));
  });
}

function drawMatrix(matrix, id) {
  const paint = colors(), whole = matrix.block === 1;
  const middle = paint.paper, high = dark.matches ? "#ff9d57" : "#b3400a";
  const low = dark.matches ? "#6fb4ff" : "#0b4f8a";
  const trace = {
    type: "heatmap", z: matrix.cells, zmin: whole ? -1 : 0, zmax: 1, dx: matrix.block, dy: matrix.block,
    x0: matrix.block / 2 - 0.5, y0: matrix.block / 2 - 0.5,
    colorscale: whole ? [[0, low], [0.5, middle], [1, high]] : [[0, middle], [1, high]],
    colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: paint.muted } },
    hovertemplate: "%{y:.0f}, %{x:.0f}: %{z:.3f}<extra></extra>",
  };
  const layout = frame(paint, {
    xaxis: axis(paint, { showgrid: false, constrain: "domain", title: { text: "view 2", standoff: 4 } }),
    yaxis: axis(paint, { showgrid: false, autorange: "reversed", scaleanchor: "x",
                         constrain: "domain", title: { text: "view 1", standoff: 4 } }),
  });
  return Plotly.react(id, [trace], layout, CONFIG);
}

function draw() {
  return Promise.all([
    ...CONTENT.panels.map((panel, i) => drawPanel(panel, "panel" + i)),
    ...CONTENT.matrices.map((matrix, i) => drawMatrix(matrix, "matrix" + i)),
  ]);
}

draw().then(() => { document.body.dataset.drawn = Math.round(performance.now()); });
dark.addEventListener("change", draw);
if (CONTENT.reload) setTimeout(() => location.reload(), CONTENT.reload * 1000);
