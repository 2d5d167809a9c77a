// Draws the reports of training runs (model_id<ID>.json): loss, validation loss and scores over the iterations.
"use strict";

const COLOURS = 8; // --run-0 to --run-7 in train.css; further runs start over
const RELOAD_SECONDS = 30;
const CAPTIONS_SHOWN = 50;
const FIRST_SCORES = ["CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE", "Top-1 accuracy", "Top-5 accuracy"];

const state = { runs: [], visible: new Map() };

// ---- reading ----

async function load() {
  const inside = textInside("runs.json");
  if (inside !== null) {
    loadInside(JSON.parse(inside));
    return;
  }
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
  if (!wanted.length && failures.length) await explainStart();
  else if (failures.length) explain("Some reports could not be read.", failures.map((failure) => failure.problem));
  show();
}

// caption-train writes this page with the reports of its folder inside: those of the run come first, and are drawn.
function loadInside(names) {
  const recipe = (name) => name.replace(/(_stage\d+)?\.json$/, "");
  for (const name of names) state.visible.set(name, recipe(name) === recipe(names[0]));
  state.runs = names.map((name) => readReport(textInside(name), name, textInside(paceOf(name)))).filter((run) => !run.problem);
  show();
}

async function fetchReport(path) {
  try {
    // Reports of other servers are refused, as pictures are.
    const get = (name) => fetch(localAddress(name) || "about:invalid", { cache: "no-cache" });
    const [response, pace] = await Promise.all([get(path), get(paceOf(path))]);
    if (!response.ok) return { problem: `${path}: ${response.status} ${response.statusText}` };
    return readReport(await response.text(), path, pace.ok ? await pace.text() : null);
  } catch (error) {
    return { problem: `${path}: ${error.message}` };
  }
}

// ---- what is shown ----

function show() {
  const any = state.runs.length > 0;
  byId("controls").hidden = byId("runs").hidden = byId("options").hidden = !any;
  byId("site").hidden = isAlbum();
  state.runs.forEach((run, index) => {
    run.colour = `var(--run-${index % COLOURS})`;
    if (!state.visible.has(run.source)) state.visible.set(run.source, true);
  });
  shortenNames();
  showRuns();
  showOptions();
  showCaptions();
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

// What the runs said about the first images of their last validation, side by side.
function showCaptions() {
  const runs = state.runs.filter((run) => run.captions.size);
  byId("captions").hidden = !runs.length;
  const ids = [...new Set(runs.flatMap((run) => [...run.captions.keys()].slice(0, CAPTIONS_SHOWN)))].slice(0, CAPTIONS_SHOWN);
  const table = byId("captions").querySelector("table");
  table.tHead.rows[0].replaceChildren(...["image", ...runs.map((run) => run.name)].map((text) => make("th", { scope: "col" }, text)));
  table.tBodies[0].replaceChildren(
    ...ids.map((id) => make("tr", {}, make("th", { scope: "row" }, id), ...runs.map((run) => make("td", {}, run.captions.get(id) ?? "–")))),
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
  const charts = [chart("Loss", "−log p per word", lossLines, byId("log").checked, true)];
  for (const name of names) {
    const lines = runs.map((run) => ({ run, label: run.name, points: run.scores.get(name) ?? [], kind: "validation" }));
    charts.push(chart(name, name, lines, false, false));
  }
  const ofRuns = (points) => runs.map((run) => ({ run, label: run.name, points: points(run), kind: "pace" }));
  charts.push(chart("Learning rate", "learning rate", ofRuns((run) => run.learningRate), false, false));
  charts.push(chart("Speed", "iterations per second", ofRuns((run) => smooth(run.speed, smoothing)), false, false));
  const focused = [...byId("charts").children].findIndex((figure) => figure.contains(document.activeElement));
  byId("charts").replaceChildren(...(runs.length ? charts : []).filter(Boolean));
  byId("charts").children[focused]?.querySelector("svg").focus({ preventScroll: true });
}

// ---- when there is nothing to show ----

async function explainStart() {
  const found = await findReports();
  if (found.length) {
    explain("Which runs?", ["These lie beside this page:"]);
    byId("notice").append(reportLinks(found), make("p", {}, "Or choose reports:"), chooser());
    return;
  }
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
    const texts = new Map(await Promise.all(files.map(async (file) => [file.name, await file.text()])));
    const reports = [...texts.keys()].filter((name) => ![...texts.keys()].some((other) => paceOf(other) === name));
    const results = reports.map((name) => readReport(texts.get(name), name, texts.get(paceOf(name)) ?? null));
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
let drawnWidth = 0;
new ResizeObserver(() => {
  const width = byId("charts").clientWidth;
  if (width !== drawnWidth) draw();
  drawnWidth = width;
}).observe(byId("charts"));
setInterval(() => {
  // Only what the address names is followed; chosen files are what they were.
  if (location.protocol !== "file:" && location.hash.includes("report=") && !document.hidden) load();
}, 1000 * RELOAD_SECONDS);

load();
