// Draws the reports of training runs (model_id<ID>.json): loss, validation loss and scores over the iterations.
"use strict";

const COLOURS = 8; // --run-0 to --run-7 in style.css; further runs start over
const RELOAD_SECONDS = 30;
const MAX_POINTS = 1500; // of a drawn line: more than it has pixels would only cost time
const FIRST_SCORES = ["CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE"];

const state = { runs: [], visible: new Map() };

// ---- reading ----

async function load() {
  if (location.protocol === "file:") {
    explainFile();
    return;
  }
  const wanted = new URLSearchParams(location.hash.slice(1)).getAll("report");
  const paths = wanted.length ? wanted : ["model_id.json"];
  const results = await Promise.all(paths.map(fetchReport));
  const failures = results.filter((result) => result.problem);
  state.runs = results.filter((result) => !result.problem);
  byId("notice").hidden = true;
  if (!wanted.length && failures.length) explainStart();
  else if (failures.length) explain("Some reports could not be read.", failures.map((failure) => failure.problem));
  show();
}

async function fetchReport(path) {
  try {
    // Reports of other servers are refused, as pictures are.
    const response = await fetch(localAddress(path) || "about:invalid", { cache: "no-cache" });
    if (!response.ok) return { problem: `${path}: ${response.status} ${response.statusText}` };
    return readReport(await response.text(), path);
  } catch (error) {
    return { problem: `${path}: ${error.message}` };
  }
}

function readReport(text, source) {
  let report;
  try {
    report = JSON.parse(text);
  } catch (error) {
    return { problem: `${source} is not valid JSON: ${error.message}` };
  }
  if (!isObject(report) || !isObject(report.loss_history ?? 0)) {
    return { problem: `${source} is not a training report: it has no "loss_history"` };
  }
  const scores = new Map();
  for (const [iteration, values] of Object.entries(report.val_lang_stats_history ?? {})) {
    if (!isObject(values)) continue; // the original leaves null where nothing was scored
    for (const [name, value] of Object.entries(values)) {
      if (!scores.has(name)) scores.set(name, {});
      scores.get(name)[iteration] = value;
    }
  }
  return {
    source,
    name: source.replace(/\.json$/, ""),
    iteration: finite(report.iter) ?? 0,
    options: isObject(report.opt) ? report.opt : {},
    loss: series(report.loss_history),
    validation: series(report.val_loss_history),
    scores: new Map([...scores].map(([name, history]) => [name, series(history)])),
  };
}

// {"0": 3.7, "25": 2.4} → [[0, 3.7], [25, 2.4]], in order, without what is not finite.
function series(history) {
  return Object.entries(history ?? {})
    .map(([iteration, value]) => [Number(iteration), finite(value)])
    .filter(([iteration, value]) => Number.isFinite(iteration) && value !== null)
    .sort((a, b) => a[0] - b[0]);
}

// ---- what is shown ----

function show() {
  const any = state.runs.length > 0;
  byId("controls").hidden = byId("runs").hidden = byId("options").hidden = !any;
  state.runs.forEach((run, index) => {
    run.colour = `var(--run-${index % COLOURS})`;
    if (!state.visible.has(run.source)) state.visible.set(run.source, true);
  });
  shortenNames();
  showRuns();
  showOptions();
  draw();
}

// What all sources begin with says nothing.
function shortenNames() {
  const folders = state.runs.map((run) => run.source.replace(/\.json$/, "").split("/"));
  let common = 0;
  while (folders.length > 1 && folders.every((parts) => parts.length > common + 1 && parts[common] === folders[0][common])) common += 1;
  state.runs.forEach((run, index) => {
    run.name = folders.length > 1 ? folders[index].slice(common).join("/") : folders[index][folders[index].length - 1];
  });
}

function showRuns() {
  byId("runs").tBodies[0].replaceChildren(
    ...state.runs.map((run) => {
      const box = make("input", { type: "checkbox", checked: state.visible.get(run.source) });
      box.style.accentColor = run.colour;
      box.addEventListener("change", () => {
        state.visible.set(run.source, box.checked);
        draw();
      });
      const swatch = make("span", { className: "swatch" });
      swatch.style.backgroundColor = run.colour;
      const name = make("th", { scope: "row" }, make("label", {}, box, swatch, run.name));
      name.title = run.source;
      return make("tr", {}, name, ...facts(run).map((fact) => make("td", {}, fact)));
    }),
  );
}

function facts(run) {
  const last = (points) => (points.length ? points[points.length - 1][1].toFixed(3) : "–");
  const extreme = (points, better) => points.reduce((best, point) => (better(point[1], best[1]) ? point : best), points[0]);
  const best = [];
  if (run.validation.length) {
    const [iteration, value] = extreme(run.validation, (a, b) => a < b);
    best.push(`loss ${value.toFixed(3)} at ${iteration.toLocaleString()}`);
  }
  const cider = run.scores.get("CIDEr") ?? [];
  if (cider.length) {
    const [iteration, value] = extreme(cider, (a, b) => a > b);
    best.push(`CIDEr ${value.toFixed(3)} at ${iteration.toLocaleString()}`);
  }
  return [run.iteration.toLocaleString(), last(run.loss), last(run.validation), best.join(", ") || "–"];
}

// Every option of every run; those in which the runs differ come first and stand out.
function showOptions() {
  const names = [...new Set(state.runs.flatMap((run) => Object.keys(run.options)))].sort();
  const value = (run, name) => (name in run.options ? JSON.stringify(run.options[name]) : "–");
  const differs = (name) => new Set(state.runs.map((run) => value(run, name))).size > 1;
  const table = byId("options").querySelector("table");
  table.tHead.rows[0].replaceChildren(...["option", ...state.runs.map((run) => run.name)].map((text) => make("th", { scope: "col" }, text)));
  const ordered = [...names.filter(differs), ...names.filter((name) => !differs(name))];
  table.tBodies[0].replaceChildren(
    ...ordered.map((name) =>
      make("tr", { className: differs(name) ? "differs" : "" }, make("th", { scope: "row" }, name), ...state.runs.map((run) => make("td", {}, value(run, name)))),
    ),
  );
}

function draw() {
  const runs = state.runs.filter((run) => state.visible.get(run.source));
  const smoothing = Number(byId("smooth").value);
  const lossLines = runs.flatMap((run) => [
    { run, label: `${run.name}, training`, points: smooth(run.loss, smoothing), kind: "training" },
    { run, label: `${run.name}, validation`, points: run.validation, kind: "validation" },
  ]);
  const names = [...new Set(runs.flatMap((run) => [...run.scores.keys()]))];
  const rank = (name) => (FIRST_SCORES.includes(name) ? FIRST_SCORES.indexOf(name) : FIRST_SCORES.length);
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const charts = [chart("Loss", lossLines, byId("log").checked, true)];
  for (const name of names) {
    const lines = runs.map((run) => ({ run, label: run.name, points: run.scores.get(name) ?? [], kind: "validation" }));
    charts.push(chart(name, lines, false, false));
  }
  byId("charts").replaceChildren(...(runs.length ? charts : []).filter(Boolean));
}

// Mean over a window of up to a tenth of the points, centred: it lags neither behind nor ahead. Towards the steep start
// it narrows; at the end it does not, lest the last value stick out.
function smooth(points, amount) {
  const half = Math.round((amount * points.length) / 20);
  const sums = [0];
  for (const [, value] of points) sums.push(sums[sums.length - 1] + value);
  return points.map(([iteration], index) => {
    const first = Math.max(0, index - half);
    const last = Math.min(points.length - 1, index + Math.min(half, index));
    return [iteration, (sums[last + 1] - sums[first]) / (last + 1 - first)];
  });
}

// ---- one chart ----

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function chart(title, lines, logarithmic, wide) {
  const drawn = lines.filter((line) => line.points.length);
  if (!drawn.length) return null;
  const room = byId("charts").clientWidth;
  const width = wide || room < 700 ? room : Math.floor((room - 16) / 2);
  const height = wide ? Math.min(420, Math.max(260, width * 0.45)) : 240;
  const inner = { left: 52, right: width - 28, top: 12, bottom: height - 30 };

  const values = drawn.flatMap((line) => line.points.map((point) => point[1]));
  const iterations = drawn.flatMap((line) => [line.points[0][0], line.points[line.points.length - 1][0]]);
  const log = logarithmic && least(values) > 0;
  const x = scale(least(iterations), greatest(iterations), inner.left, inner.right, 75, false);
  const y = scale(least(values), greatest(values), inner.bottom, inner.top, 40, log);

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0 });
  picture.append(svg("title", {}, `${title} over iterations: ${drawn.map((line) => line.label).join("; ")}`));
  for (const tick of y.ticks) {
    picture.append(svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: inner.left - 8, y: y(tick) + 4, "text-anchor": "end" }, y.format(tick)));
  }
  for (const tick of x.ticks) {
    picture.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: inner.top, y2: inner.bottom }));
    picture.append(svg("text", { x: x(tick), y: height - 10, "text-anchor": "middle" }, x.format(tick)));
  }
  for (const line of drawn) picture.append(...lineMarks(line, x, y));

  const readout = make("figcaption", {}, make("h2", {}, title), make("p", { className: "readout" }, legend(drawn)));
  readout.lastChild.setAttribute("aria-live", "polite");
  addCursor(picture, drawn, x, y, inner, readout.lastChild);
  return make("figure", { className: wide ? "chart wide" : "chart" }, readout, picture);
}

function legend(lines) {
  return lines.some((line) => line.kind === "training") ? "thin: training; with dots: validation" : "";
}

function lineMarks(line, x, y) {
  const points = thin(line.points).map(([iteration, value]) => [x(iteration).toFixed(1), y(value).toFixed(1)]);
  const path = svg("path", { class: `line ${line.kind}`, d: "M" + points.map((point) => point.join(" ")).join("L") });
  path.style.stroke = line.run.colour;
  const dots = line.kind === "validation" && points.length <= 60 ? points : points.length === 1 ? points : [];
  return [
    path,
    ...dots.map(([cx, cy]) => {
      const dot = svg("circle", { cx, cy, r: 2.8 });
      dot.style.fill = line.run.colour;
      return dot;
    }),
  ];
}

function thin(points) {
  const every = Math.ceil(points.length / MAX_POINTS);
  return points.filter((_, index) => index % every === 0 || index === points.length - 1);
}

// Loops, because Math.min(...values) overflows the stack on long histories.
const least = (values) => values.reduce((a, b) => Math.min(a, b));
const greatest = (values) => values.reduce((a, b) => Math.max(a, b));

// A function from values to pixels with round ticks, at least so many pixels apart.
function scale(low, high, from, to, apart, log) {
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const turn = log ? Math.log : (value) => value;
  const position = (value) => from + ((turn(value) - turn(low)) / (turn(high) - turn(low))) * (to - from);
  const rough = (high - low) / Math.max(2, Math.abs(to - from) / apart);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  position.ticks = [];
  for (let count = Math.ceil(low / step); count * step <= high + step * 1e-9; count += 1) position.ticks.push(count * step);
  const digits = Math.min(6, Math.max(0, -Math.floor(Math.log10(step))));
  position.format = (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return position;
}

// A vertical line under the pointer, or moved by the arrow keys, and the values it meets.
function addCursor(picture, lines, x, y, inner, readout) {
  const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const rule = svg("line", { class: "cursor", y1: inner.top, y2: inner.bottom, visibility: "hidden" });
  picture.append(rule);
  let at = places.length - 1;

  function point(index) {
    at = Math.min(places.length - 1, Math.max(0, index));
    rule.setAttribute("x1", x(places[at]));
    rule.setAttribute("x2", x(places[at]));
    rule.setAttribute("visibility", "visible");
    const met = lines.map((line) => {
      const found = line.points[nearest(line.points.map((other) => other[0]), places[at])];
      const swatch = make("span", { className: "swatch" });
      swatch.style.backgroundColor = line.run.colour;
      return make("span", { className: "met" }, swatch, `${line.label} ${found[1].toFixed(3)}`);
    });
    readout.replaceChildren(make("span", { className: "met" }, `iteration ${places[at].toLocaleString()}`), ...met);
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * picture.viewBox.baseVal.width;
    point(nearest(places.map(x), pixel));
  });
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    point(at + by);
  });
}

function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[high] - wanted) < Math.abs(sorted[low] - wanted) ? high : low;
}

// ---- when there is nothing to show ----

function explainStart() {
  explain("Which runs?", [
    "caption-train writes a report, model_id<ID>.json, into its checkpoint_path. Start a server in a folder that contains both it and this page, for instance",
    ["pre", "python -m http.server 8000"],
    "and name the reports in this page's address, one or several, relative to the page:",
    ["pre", "http://localhost:8000/vis/train.html#report=../runs/a/model_id.json&report=../runs/b/model_id.json"],
    "Or choose them here:",
  ]);
  byId("notice").append(chooser());
}

function explainFile() {
  explain("This page was opened as a file, so the browser does not let it read reports.", [
    "Choose them here (model_id<ID>.json in the checkpoint_path of caption-train), or start",
    ["pre", "python -m http.server 8000"],
    "and open the page from there: then it follows running trainings.",
  ]);
  byId("notice").append(chooser());
}

function chooser() {
  return fileChooser("Choose reports", true, async (files) => {
    const results = await Promise.all(files.map(async (file) => readReport(await file.text(), file.name)));
    const failures = results.filter((result) => result.problem);
    state.runs = [...state.runs, ...results.filter((result) => !result.problem)];
    if (failures.length) explain("Some reports could not be read.", failures.map((failure) => failure.problem));
    else byId("notice").hidden = true;
    show();
  });
}

// ---- events ----

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("smooth").addEventListener("input", draw);
byId("log").addEventListener("change", draw);
window.addEventListener("hashchange", load);
new ResizeObserver(draw).observe(byId("charts"));
setInterval(() => {
  // Only what the address names is followed; chosen files are what they were.
  if (location.protocol !== "file:" && location.hash.includes("report=") && !document.hidden) load();
}, 1000 * RELOAD_SECONDS);

load();
