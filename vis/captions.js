// Shows vis.json: pictures with their captions.
"use strict";

const PER_PAGE = 100;

const state = { rows: [], shown: [], page: 1, open: -1 };

// ---- reading ----

async function load() {
  if (location.protocol === "file:") {
    explainFile();
    return;
  }
  byId("count").textContent = "Reading vis.json …";
  const text = await fetchRows();
  byId("count").textContent = "";
  if (text === null) return;
  take(text, "vis.json");
  loadScores();
}

async function fetchRows() {
  try {
    const response = await fetch("vis.json", { cache: "no-cache" });
    if (response.ok) return await response.text();
    explain("There is no vis.json beside this page.", [
      "It is written by",
      ["pre", "caption-eval --image_folder FOLDER --vis_dir " + folderName()],
    ]);
  } catch (error) {
    explain("vis.json could not be fetched.", [String(error), "Is the server still running?"]);
  }
  return null;
}

async function loadScores() {
  try {
    const response = await fetch("scores.json", { cache: "no-cache" });
    if (response.ok) showScores(await response.json());
  } catch {
    // Folders of the original have no scores: nothing to show.
  }
}

function take(text, source) {
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    explain(`${source} is not valid JSON.`, [String(error)]);
    return;
  }
  if (!Array.isArray(data)) {
    explain(`${source} is not a list of captions.`, ["Expected: ", ["pre", '[{"image_id": 1, "caption": "a cat"}, …]']]);
    return;
  }
  state.rows = data.filter((row) => row !== null && typeof row === "object").map(normalise);
  byId("notice").hidden = true;
  byId("controls").hidden = false;
  byId("shade-label").hidden = !state.rows.some((row) => row.words.length);
  for (const value of ["confident", "unsure"]) {
    byId("sort").querySelector(`[value=${value}]`).hidden = !state.rows.some((row) => row.confidence !== null);
  }
  readAddress();
  select();
}

// One shape for our rows and for the original's, which know only image_id and caption.
function normalise(row, index) {
  const caption = describe(row);
  const id = row.image_id ?? index + 1;
  const alternatives = Array.isArray(row.n_best) ? row.n_best.filter((other) => other && typeof other === "object") : [];
  const isShown = alternatives.length > 0 && String(alternatives[0].caption ?? "") === caption.caption;
  return {
    ...caption,
    id,
    abstained: Boolean(row.abstained),
    name: typeof row.file_name === "string" && row.file_name ? row.file_name : `image ${id}`,
    picture: typeof row.image === "string" ? row.image : `imgs/img${id}.jpg`,
    // The first of the n best is the caption itself, but where the model abstained.
    alternatives: alternatives.slice(isShown ? 1 : 0).map(describe),
    firstAlternative: isShown ? 2 : 1,
  };
}

function describe(row) {
  const words = Array.isArray(row.words) ? row.words.filter((word) => word && typeof word === "object") : [];
  return {
    caption: String(row.caption ?? ""),
    logprob: finite(row.logprob),
    confidence: finite(row.confidence),
    words: words.map((word) => ({ word: String(word.word), logprob: finite(word.logprob) })),
  };
}

// ---- what is shown ----

function select() {
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = state.rows.filter((row) => {
    const text = `${row.caption} ${row.name}`.toLowerCase();
    return terms.every((term) => text.includes(term));
  });
  const unknownLast = (row, otherwise) => row.confidence ?? otherwise;
  const order = {
    confident: (a, b) => unknownLast(b, -1) - unknownLast(a, -1),
    unsure: (a, b) => unknownLast(a, 2) - unknownLast(b, 2),
    name: (a, b) => collator.compare(a.name, b.name),
  }[byId("sort").value];
  state.shown = order ? rows.sort(order) : rows;
  document.body.classList.toggle("shaded", byId("shade").checked);
  draw();
}

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function draw() {
  const pages = Math.max(1, Math.ceil(state.shown.length / PER_PAGE));
  state.page = Math.min(Math.max(1, state.page), pages);
  const first = (state.page - 1) * PER_PAGE;
  const rows = state.shown.slice(first, first + PER_PAGE);
  byId("grid").replaceChildren(...rows.map((row, index) => card(row, first + index)));

  const count = (number) => `${number.toLocaleString()} image${number === 1 ? "" : "s"}`;
  const range = pages > 1 ? `, ${first + 1} to ${first + rows.length} on this page` : "";
  byId("count").textContent =
    state.shown.length === state.rows.length
      ? count(state.rows.length) + range
      : `${state.shown.length.toLocaleString()} of ${count(state.rows.length)} match${range}`;
  byId("pager").hidden = pages === 1;
  byId("page").value = state.page;
  byId("page").max = pages;
  byId("pages").textContent = pages.toLocaleString();
  disable(byId("previous"), state.page === 1, byId("page"));
  disable(byId("next"), state.page === pages, byId("page"));
  writeAddress();
}

function card(row, place) {
  const open = make("button", { type: "button", className: "open" }, picture(row, true));
  open.setAttribute("aria-label", `Enlarge ${row.name}`);
  open.addEventListener("click", () => openDetail(place));
  const text = make("div", { className: "text" }, captionLine("p", row));
  if (row.alternatives.length) {
    const label = `${row.alternatives.length} alternative${row.alternatives.length === 1 ? "" : "s"}`;
    text.append(make("details", {}, make("summary", {}, label), alternatives(row, make("ol", { className: "alternatives" }))));
  }
  const facts = make("p", { className: "facts" }, make("span", { className: "name" }, row.name));
  if (row.confidence !== null) {
    const confidence = make("span", { className: "confidence" }, percent(row.confidence));
    confidence.title = "How sure the model is: the probability per word, on average";
    facts.append(confidence);
  }
  text.append(facts);
  return make("li", { className: "card" }, open, text);
}

function picture(row, lazy) {
  const address = localAddress(row.picture);
  if (!address) return make("span", { className: "no-picture" }, "no picture");
  const image = make("img", { alt: row.name, decoding: "async" });
  if (lazy) image.loading = "lazy";
  image.addEventListener("error", () => image.replaceWith(make("span", { className: "no-picture" }, `no picture: ${row.picture}`)));
  image.src = address;
  return image;
}

function captionLine(tag, row) {
  const line = make(tag, { className: "caption" });
  fillCaption(line, row);
  return line;
}

function fillCaption(line, row) {
  const missing = row.abstained ? "no caption: the model was not sure enough" : "empty caption";
  line.classList.toggle("none", row.caption === "");
  // Words stand for the caption only if they spell it: it may have been edited since.
  if (row.caption === "" || row.words.map((word) => word.word).join(" ") !== row.caption) {
    line.replaceChildren(row.caption || missing);
    return;
  }
  line.replaceChildren();
  for (const word of row.words) {
    const span = make("span", { className: "word" }, word.word);
    if (word.logprob !== null) {
      span.title = `probability ${percent(Math.exp(word.logprob))}`;
      if (byId("shade").checked) span.style.backgroundColor = shade(word.logprob);
    }
    line.append(...(line.childNodes.length ? [" "] : []), span);
  }
}

function alternatives(row, list) {
  list.start = row.firstAlternative;
  list.replaceChildren(
    ...row.alternatives.map((other) =>
      make("li", {}, other.caption || "empty caption", " ", make("small", {}, other.confidence === null ? "" : percent(other.confidence))),
    ),
  );
  return list;
}

// No colour for a certain word, the full one for a word of 2 % or less.
function shade(logprob) {
  const strength = Math.min(1, Math.max(0, logprob / Math.log(0.02)));
  return `rgba(var(--unsure), ${(0.75 * strength).toFixed(3)})`;
}

function percent(probability) {
  const value = 100 * probability;
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

function showScores(scores) {
  const known = Object.entries(scores ?? {}).filter(([, value]) => typeof value === "number");
  if (!known.length) return;
  const table = byId("scores").querySelector("table");
  table.tHead.rows[0].replaceChildren(...known.map(([name]) => make("th", { scope: "col" }, name)));
  // Intervals are there where caption-score wrote the file.
  const text = (name, value) => {
    const interval = scores.intervals?.[name];
    return value.toFixed(3) + (interval ? ` (${interval.map((bound) => bound.toFixed(3)).join(" to ")})` : "");
  };
  table.tBodies[0].rows[0].replaceChildren(...known.map(([name, value]) => make("td", {}, text(name, value))));
  byId("scores").hidden = false;
}

// A disabled button swallows keys: the focus has to move on.
function disable(button, disabled, neighbour) {
  if (disabled && document.activeElement === button) neighbour.focus();
  button.disabled = disabled;
}

// ---- one picture, large ----

function openDetail(place) {
  const row = state.shown[place];
  state.open = place;
  byId("detail-picture").replaceChildren(picture(row, false));
  fillCaption(byId("detail-caption"), row);
  const facts = [row.name];
  if (row.confidence !== null) facts.push(`confidence ${percent(row.confidence)}`);
  if (row.logprob !== null) facts.push(`log-probability ${row.logprob.toFixed(2)}`);
  byId("detail-facts").replaceChildren(...facts.map((fact) => make("span", {}, fact)));
  alternatives(row, byId("detail-alternatives")).hidden = !row.alternatives.length;
  const table = byId("detail-words");
  table.hidden = !row.words.length;
  table.tBodies[0].replaceChildren(
    ...row.words.map((word) => {
      const head = make("th", { scope: "row" }, word.word);
      if (word.logprob !== null) head.style.backgroundColor = shade(word.logprob);
      return make("tr", {}, head, make("td", {}, word.logprob === null ? "" : percent(Math.exp(word.logprob))));
    }),
  );
  disable(byId("detail-previous"), place === 0, byId("detail-close"));
  disable(byId("detail-next"), place === state.shown.length - 1, byId("detail-close"));
  if (!byId("detail").open) byId("detail").showModal();
}

function step(by) {
  const place = state.open + by;
  if (place >= 0 && place < state.shown.length) openDetail(place);
}

// ---- the address carries the view, so that it can be kept and sent ----

function readAddress() {
  const view = new URLSearchParams(location.hash.slice(1));
  state.page = Number.parseInt(view.get("page"), 10) || 1;
  byId("search").value = view.get("search") ?? "";
  byId("sort").value = view.get("sort") ?? "listed";
  if (byId("sort").selectedIndex < 0) byId("sort").value = "listed";
  byId("shade").checked = view.get("shade") === "1";
}

function writeAddress() {
  const view = new URLSearchParams();
  if (byId("search").value) view.set("search", byId("search").value);
  if (byId("sort").value !== "listed") view.set("sort", byId("sort").value);
  if (byId("shade").checked) view.set("shade", "1");
  if (state.page > 1) view.set("page", state.page);
  const hash = view.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

// ---- when there is nothing to show ----

function folderName() {
  const parts = decodeURIComponent(location.pathname).split("/");
  return parts[parts.length - 2] || "vis";
}

// Browsers do not let a page that was opened as a file read the files beside it.
function explainFile() {
  explain("This page was opened as a file, so the browser does not let it read vis.json.", [
    "In a terminal, in the folder of this page, start",
    ["pre", "python -m http.server 8000"],
    "and open http://localhost:8000/ instead. Or choose the vis.json beside this page:",
  ]);
  byId("notice").append(fileChooser("Choose vis.json", false, async ([file]) => take(await file.text(), file.name)));
}

// ---- events ----

function turn(page) {
  state.page = page;
  draw();
  window.scrollTo(0, 0);
}

function changed() {
  state.page = 1;
  select();
}

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", changed);
byId("sort").addEventListener("change", changed);
byId("shade").addEventListener("change", select);
byId("previous").addEventListener("click", () => turn(state.page - 1));
byId("next").addEventListener("click", () => turn(state.page + 1));
byId("page").addEventListener("change", () => turn(Number.parseInt(byId("page").value, 10) || 1));
byId("detail-previous").addEventListener("click", () => step(-1));
byId("detail-next").addEventListener("click", () => step(1));
byId("detail-close").addEventListener("click", () => byId("detail").close());
byId("detail").addEventListener("click", (event) => {
  if (event.target === byId("detail")) byId("detail").close(); // the backdrop
});
byId("detail").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
window.addEventListener("hashchange", () => {
  readAddress();
  select();
});

load();
