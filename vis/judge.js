// Captions marked right, partly right or wrong, and corrected; kept in this browser, saved as files.
"use strict";

const VERDICTS = ["right", "partly", "wrong"];
const SIGNS = { right: "✓", partly: "≈", wrong: "✕" };
const judgements = new Map(); // key of a row → {caption, verdict, correction}

const storageKey = () => `captioner judgements ${location.pathname} ${state.sources[0] ?? ""}`;

function loadJudgements() {
  judgements.clear();
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(storageKey()));
  } catch {
    // Storage is switched off, or holds something else: this visit starts without judgements.
  }
  for (const [key, judgement] of isObject(kept) ? Object.entries(kept) : []) {
    if (isObject(judgement)) judgements.set(key, judgement);
  }
}

function keepJudgements() {
  try {
    localStorage.setItem(storageKey(), JSON.stringify(Object.fromEntries(judgements)));
  } catch (error) {
    byId("tally").append(` Not kept when this page is closed: ${error.message}`);
  }
}

// A judgement of another caption than the one that is shown is out of date.
function judgementOf(row) {
  const judgement = judgements.get(row.key);
  return judgement && judgement.caption === row.answers[0].caption ? judgement : null;
}

function judge(row, change) {
  const judgement = { caption: row.answers[0].caption, verdict: null, correction: null, ...judgementOf(row), ...change };
  if (judgement.verdict === null && judgement.correction === null) judgements.delete(row.key);
  else judgements.set(row.key, judgement);
  showTally();
  keepJudgements();
  offerFilters();
}

const judgedRows = () => state.rows.flatMap((row) => (judgementOf(row) ? [[row, judgementOf(row)]] : []));

// Wilson's interval (1927) of a share, at 95 %: right also for few cases and for shares near 0 and 1.
function wilson(successes, total) {
  const z = 1.959964;
  const share = successes / total;
  const centre = (share + z ** 2 / (2 * total)) / (1 + z ** 2 / total);
  const half = (z * Math.sqrt((share * (1 - share)) / total + z ** 2 / (4 * total ** 2))) / (1 + z ** 2 / total);
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

function showTally() {
  const judged = judgedRows();
  const total = judged.filter(([, judgement]) => judgement.verdict).length;
  const corrected = judged.filter(([, judgement]) => judgement.correction !== null).length;
  byId("judged").hidden = !judged.length;
  byId("judged").firstElementChild.textContent = `Judged ${total} of ${state.rows.length.toLocaleString("en")}`;
  const shares = VERDICTS.map((verdict) => {
    const number = judged.filter(([, judgement]) => judgement.verdict === verdict).length;
    if (!total) return `${verdict} 0`;
    const [low, high] = wilson(number, total);
    return `${verdict} ${number}: ${percent(number / total)} (${percent(low)} to ${percent(high)})`;
  });
  byId("tally").textContent = `${shares.join(" · ")} · corrected ${corrected}. In brackets: 95 % intervals (Wilson).`;
}

// ---- as files ----

const EXPORTS = {
  json: ["judgements.json", "application/json", () => JSON.stringify(judgedRows().map(exported), null, 1)],
  csv: ["judgements.csv", "text/csv", () => [CSV_HEAD, ...judgedRows().map((pair) => Object.values(exported(pair)))].map(csvLine).join("")],
  raw: ["corrected.json", "application/json", () => JSON.stringify(rawRecords(), null, 1)],
};
const CSV_HEAD = ["image_id", "file_name", "caption", "verdict", "correction"];

function exported([row, judgement]) {
  return {
    image_id: row.id,
    file_name: row.key === String(row.id) ? "" : row.name,
    caption: judgement.caption,
    verdict: judgement.verdict ?? "",
    correction: judgement.correction ?? "",
  };
}

// The original's raw format, of pictures whose right caption is known: ready for caption-prepro.
function rawRecords() {
  return judgedRows().flatMap(([row, { caption, verdict, correction }]) => {
    const right = correction ?? (verdict === "right" ? caption : "");
    return right ? [{ file_path: row.name, captions: [right], id: row.id }] : [];
  });
}

function csvLine(values) {
  return `${values.map((value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value)).join(",")}\r\n`;
}

function save(kind) {
  const [name, type, content] = EXPORTS[kind];
  const link = make("a", { href: URL.createObjectURL(new Blob([content()], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

for (const button of document.querySelectorAll("[data-export]")) {
  button.addEventListener("click", () => save(button.dataset.export));
}
