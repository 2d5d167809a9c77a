// Which rows are shown, in which order; the address carries it, so that a view can be kept and sent.
"use strict";

const verdictIs = (verdict) => (row) => judgementOf(row)?.verdict === verdict;
const hasUnknownWord = (row) => row.answers.some((answer) => / UNK /.test(` ${answer?.caption} `)) || hasUnkCaption(row);

const FILTERS = {
  all: ["all", () => true],
  unk: ["with UNK", (row) => row.unk],
  abstained: ["without caption", (row) => row.answers[0].caption === "" && !row.captions.length],
  repeated: ["same caption as another", (row) => row.repeated],
  below: ["confidence below …", (row) => row.answers[0].confidence !== null && row.answers[0].confidence < byId("below").value / 100],
  differing: ["results that differ", (row) => row.differs],
  duplicates: ["near-duplicates", (row) => row.duplicates !== null],
  train: ["split train", (row) => row.split === "train"],
  val: ["split val", (row) => row.split === "val"],
  test: ["split test", (row) => row.split === "test"],
  right: ["marked right", verdictIs("right")],
  partly: ["marked partly right", verdictIs("partly")],
  wrong: ["marked wrong", verdictIs("wrong")],
  corrected: ["corrected", (row) => Boolean(judgementOf(row)?.correction)],
  unjudged: ["not judged yet", (row) => !judgementOf(row)?.verdict],
};
const ALWAYS_OFFERED = ["all", "below"];

// Only filters that find something are offered, and the one that is set.
function offerFilters() {
  const chosen = byId("show").value || "all";
  const anyConfidence = state.rows.some((row) => row.answers[0].confidence !== null);
  const options = Object.entries(FILTERS).flatMap(([name, [label, keeps]]) => {
    if (name === "below" && !anyConfidence) return [];
    const number = ALWAYS_OFFERED.includes(name) ? 0 : state.rows.reduce((sum, row) => sum + (keeps(row) ? 1 : 0), 0);
    const offered = ALWAYS_OFFERED.includes(name) || name === chosen || (number > 0 && (number < state.rows.length || name !== "unjudged"));
    return offered ? [make("option", { value: name }, number ? `${label} (${number.toLocaleString("en")})` : label)] : [];
  });
  byId("show").replaceChildren(...options);
  byId("show").value = chosen;
  if (byId("show").selectedIndex < 0) byId("show").value = "all";
}

function offerOrders() {
  const offered = {
    confident: state.rows.some((row) => row.answers[0].confidence !== null),
    unsure: state.rows.some((row) => row.answers[0].confidence !== null),
    differing: state.rows.some((row) => row.difference > 0 || row.differs),
  };
  for (const [name, is] of Object.entries(offered)) byId("sort").querySelector(`[value=${name}]`).hidden = !is;
}

const orUnknown = (row, otherwise) => row.answers[0].confidence ?? otherwise;
const ORDERS = {
  confident: (a, b) => orUnknown(b, -1) - orUnknown(a, -1),
  unsure: (a, b) => orUnknown(a, 2) - orUnknown(b, 2),
  differing: (a, b) => b.difference - a.difference || Number(b.differs) - Number(a.differs),
  name: (a, b) => a.rank - b.rank,
};

// Comparing names as people read them is slow: done once, not at every letter of a search.
function rankNames() {
  if (!state.rows.length || state.rows[0].rank !== undefined) return;
  const sorted = state.rows.toSorted((a, b) => collator.compare(a.name, b.name));
  sorted.forEach((row, place) => {
    row.rank = place;
  });
}

function select() {
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const filter = byId("show").value || "all";
  const keeps = FILTERS[filter][1];
  const rows = state.rows.filter((row) => keeps(row) && terms.every((term) => row.text.includes(term)));
  // Near-duplicates stand together.
  if (byId("sort").value === "name") rankNames();
  const order = ORDERS[byId("sort").value] ?? (filter === "duplicates" ? (a, b) => a.duplicates - b.duplicates : null);
  state.shown = order ? rows.sort(order) : rows;
  byId("below-label").hidden = filter !== "below";
  byId("below-value").textContent = `${byId("below").value} %`;
  document.body.classList.toggle("shaded", byId("shade").checked);
  drawPage();
}

function clearChoice() {
  byId("search").value = "";
  byId("show").value = "all";
  changed();
  byId("search").focus();
}

function changed() {
  state.page = 1;
  select();
}

// ---- the address ----

function readAddress() {
  const view = new URLSearchParams(location.hash.slice(1));
  state.page = Number.parseInt(view.get("page"), 10) || 1;
  byId("search").value = view.get("search") ?? "";
  byId("sort").value = view.get("sort") ?? "listed";
  if (byId("sort").selectedIndex < 0) byId("sort").value = "listed";
  byId("below").value = view.get("below") ?? 30;
  const show = view.get("show") ?? "all";
  if (show in FILTERS && ![...byId("show").options].some((option) => option.value === show)) {
    byId("show").append(make("option", { value: show }, FILTERS[show][0]));
  }
  byId("show").value = show in FILTERS ? show : "all";
  byId("shade").checked = view.get("shade") === "1";
  return view.get("photo");
}

function addressOfView(photo) {
  const old = new URLSearchParams(location.hash.slice(1));
  const view = new URLSearchParams();
  for (const name of ["a", "b", "c"]) if (old.has(name)) view.set(name, old.get(name));
  if (byId("search").value) view.set("search", byId("search").value);
  if (byId("sort").value !== "listed") view.set("sort", byId("sort").value);
  if (byId("show").value !== "all") view.set("show", byId("show").value);
  if (byId("show").value === "below") view.set("below", byId("below").value);
  if (byId("shade").checked) view.set("shade", "1");
  if (state.page > 1) view.set("page", state.page);
  if (photo) view.set("photo", photo);
  const hash = view.toString();
  return hash ? `#${hash}` : location.pathname + location.search;
}

// Replaces the entry in the browser's history, but where a picture is opened: then "back" closes it.
function writeAddress(opening = false) {
  const address = addressOfView(state.open >= 0 ? state.shown[state.open]?.key : null);
  if (address === location.hash || (!address.startsWith("#") && !location.hash)) return;
  history[opening ? "pushState" : "replaceState"](opening ? { opened: true } : history.state, "", address);
}
