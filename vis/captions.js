// The page of captions: reads its files and answers to the reader.
"use strict";

async function load() {
  const view = new URLSearchParams(location.hash.slice(1));
  const names = ["a", "b", "c"].map((name) => view.get(name)).filter(Boolean);
  if (!names.length) names.push("vis.json");
  byId("count").textContent = `Reading ${names.join(", ")} …`;
  const [results, about, scores] = await Promise.all([
    Promise.all(names.map(readData)),
    readData("about.json"),
    readData("scores.json"),
  ]);
  state.about = isObject(about.data) ? about.data : {};
  if (state.about.words === true) takeWords((await readData("words.json")).data);
  showFindings(state.about.findings);
  byId("count").textContent = "";
  const read = results.map((result, index) => ({ name: names[index], ...result }));
  const failed = read.find((result) => result.data === undefined);
  if (failed) {
    explainFailure(failed);
    return;
  }
  if (take(read)) showScores(scores.data);
}

let loaded = []; // [{name, data}], in the order of their letters

function take(read) {
  const results = read.map(({ name, data }) => readRows(data, name));
  const wrong = results.find((rows) => typeof rows === "string");
  if (wrong) {
    explain(wrong, ["Expected:", ["pre", '[{"image_id": 1, "caption": "a cat"}, …]']]);
    return false;
  }
  loaded = read;
  state.sources = read.map((result) => result.name);
  state.rows = results.length > 1 ? joinRows(results) : results[0];
  prepareRows();
  loadJudgements();
  showTitle();
  byId("notice").hidden = true;
  byId("controls").hidden = false;
  byId("shade-label").hidden = !state.rows.some((row) => row.answers.some((answer) => answer?.words.length));
  byId("judged").hidden = true;
  showTally();
  offerFilters();
  offerOrders();
  const photo = readAddress();
  explainMissingPictures();
  select();
  if (photo !== null) openPhoto(photo);
  return true;
}

function showTitle() {
  const { about } = state;
  const folder = typeof about.title === "string" && about.title ? about.title : "Captions";
  byId("title").textContent = folder;
  document.title = folder === "Captions" ? folder : `${folder} · captions`;
  const facts = [];
  if (state.sources.length > 1) facts.push(state.sources.map((_, place) => `${letter(place)}: ${sourceName(place)}`).join(", "));
  if (typeof about.model === "string" && about.model) facts.push(about.model);
  const date = new Date(about.date ?? NaN);
  if (!Number.isNaN(date.getTime())) facts.push(date.toLocaleDateString(undefined, { dateStyle: "medium" }));
  byId("about").textContent = facts.join(" · ");
  byId("site").hidden = about.training !== true || isAlbum();
}

function explainMissingPictures() {
  if (state.about.pictures !== false && state.rows.some((row) => row.picture)) return;
  if (!state.rows.length) {
    explain("There are no captions in this result.", ["The file is an empty list."]);
    return;
  }
  if (state.sources.length > 1) {
    explain("This comparison has no pictures, only captions.", [
      "They come from a page of the same pictures: write the comparison into its folder,",
      ["pre", "caption-score --predictions A.json --compare B.json --references R.json --view vis"],
    ]);
    return;
  }
  explain("This result has no pictures, only captions.", [
    "They were left out with --dump_images 0. To see them, write the page again without it:",
    ["pre", `caption-eval --image_folder FOLDER --vis_dir ${folderName()}`],
  ]);
}

function showScores(scores) {
  const known = Object.entries(scores ?? {}).filter(([, value]) => typeof value === "number");
  byId("scores").hidden = !known.length;
  if (!known.length) return;
  const table = byId("scores").querySelector("table");
  table.tHead.rows[0].replaceChildren(...known.map(([name]) => make("th", { scope: "col" }, name)));
  // Intervals are there where caption-score wrote the file.
  const text = (name, value) => {
    const interval = scores.intervals?.[name];
    return value.toFixed(3) + (interval ? ` (${interval.map((bound) => bound.toFixed(3)).join(" to ")})` : "");
  };
  table.tBodies[0].replaceChildren(make("tr", {}, ...known.map(([name, value]) => make("td", {}, text(name, value)))));
}

function openPhoto(key) {
  const place = state.shown.findIndex((row) => row.key === key);
  if (place < 0) return;
  state.page = Math.floor(place / PER_PAGE) + 1;
  drawPage();
  openLarge(place);
}

// ---- when there is nothing to show ----

function folderName() {
  const parts = decodeURIComponent(location.pathname).split("/");
  return parts[parts.length - 2] || "vis";
}

function explainFailure({ name, missing, problem }) {
  if (!missing) {
    explain("This page cannot read its captions.", [problem]);
  } else if (location.protocol === "file:") {
    explain(`There is no ${name}.js beside this page, and browsers do not let a page that was opened as a file read ${name}.`, [
      "Write the page again with caption-eval, or start, in the folder of this page,",
      ["pre", "python -m http.server 8000"],
      "and open http://localhost:8000/ instead. Or choose the file, or drop it onto this page:",
    ]);
    byId("notice").append(fileChooser(`Choose ${name}`, true, takeFiles));
  } else {
    explain(`There is no ${name} beside this page.`, [
      "It is written by",
      ["pre", `caption-eval --image_folder FOLDER --vis_dir ${folderName()}`],
    ]);
  }
}

// Files the reader hands over: the first are shown, further ones are compared with them.
async function takeFiles(files) {
  const read = await Promise.all(files.map(async (file) => ({ name: file.name, ...(await readFile(file)) })));
  const failed = read.find((result) => result.problem);
  if (failed) explain("This file cannot be read.", [failed.problem]);
  else take([...loaded, ...read].slice(0, 3));
}

// ---- events ----

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", changed);
byId("sort").addEventListener("change", changed);
byId("show").addEventListener("change", changed);
byId("below").addEventListener("input", changed);
byId("shade").addEventListener("change", select);
byId("clear").addEventListener("click", clearChoice);
byId("size").addEventListener("input", () => {
  resize(byId("size").value);
  try {
    localStorage.setItem("captioner size", byId("size").value);
  } catch {
    // Storage is switched off: the size holds for this visit.
  }
});
byId("view").addEventListener("click", () => {
  const open = byId("view").getAttribute("aria-expanded") !== "true";
  byId("view").setAttribute("aria-expanded", String(open));
});
byId("forget").addEventListener("click", () => {
  if (!confirm(`Forget all ${judgements.size} judgements?`)) return;
  judgements.clear();
  keepJudgements();
  showTally();
  offerFilters();
  select();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLElement && event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing && !byId("large").open && !byId("controls").hidden) {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  }
});
const dropping = (is) => document.body.classList.toggle("dropping", is);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  dropping(event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", (event) => event.relatedTarget === null && dropping(false));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dropping(false);
  const files = [...event.dataTransfer.files];
  if (files.length) takeFiles(files);
});
window.addEventListener("hashchange", () => {
  const view = new URLSearchParams(location.hash.slice(1));
  const named = ["a", "b", "c"].map((name) => view.get(name)).filter(Boolean);
  if (named.length && named.join() !== state.sources.join()) {
    load();
    return;
  }
  const open = state.open >= 0 ? state.shown[state.open].key : null;
  if ((location.hash || location.pathname + location.search) === addressOfView(open)) return; // our own doing
  const photo = readAddress();
  if (photo === null && byId("large").open) byId("large").close();
  else select();
  if (photo !== null && photo !== open) openPhoto(photo);
});

function startSize() {
  let size = null;
  try {
    size = localStorage.getItem("captioner size");
  } catch {
    // Storage is switched off: the usual size.
  }
  resize(Number(size) || 230);
}

startSize();
load();
