// One picture as large as the window allows, with all that is known about its caption.
"use strict";

const SWIPE_PIXELS = 50;

// Captions by people are not judged here.
const canJudge = (row) => !row.captions.length;
const openRow = () => state.shown[state.open] ?? null;

function openLarge(place) {
  const opening = !byId("large").open;
  state.open = place;
  const row = openRow();
  const answer = row.answers[0];
  byId("picture").replaceChildren(picture(row, false));
  byId("place").textContent = `${(place + 1).toLocaleString("en")} / ${state.shown.length.toLocaleString("en")}`;
  preload(place + 1);
  preload(place - 1);
  if (row.captions.length) fillKnownCaption(byId("large-caption"), row.captions[0]);
  else fillCaption(byId("large-caption"), answer);
  byId("verdicts").hidden = byId("edit-start").hidden = !canJudge(row);
  stopEditing();
  showVerdict();
  fillAnswers(row);
  byId("words").hidden = !answer.words.length;
  fillWords(answer.words);
  fillAlternatives(answer);
  fillFacts(row, answer);
  disable(byId("previous"), place === 0, byId("close"));
  disable(byId("next"), place === state.shown.length - 1, byId("close"));
  if (opening) byId("large").showModal();
  else say(`${place + 1} of ${state.shown.length}: ${answer.caption || missingCaption(answer)}`);
  byId("panel").scrollTop = 0;
  writeAddress(opening);
}

// So that the neighbours are there when they are wanted. In an album they are there anyway.
function preload(place) {
  const row = state.shown[place];
  if (row && !isAlbum()) new Image().src = pictureAddress(row.picture);
}

// What the other results say, or all captions of a data set.
function fillAnswers(row) {
  const lines = row.captions.length ? captionLines(row, "span").slice(1) : row.answers.length > 1 ? captionLines(row, "span") : [];
  const answers = lines.map((line, place) => {
    const answer = row.captions.length ? null : row.answers[place];
    const facts = row.captions.length ? [] : [sourceName(place)];
    if (answer?.score != null) facts.push(`${answer.scoreName} ${answer.score.toFixed(2)}`);
    if (answer?.confidence != null) facts.push(`${percent(answer.confidence)} sure`);
    return make("li", {}, line, " ", make("small", {}, facts.filter(Boolean).join(", ")));
  });
  const known = row.references.map((caption) => make("li", {}, caption, " ", make("small", {}, "by people")));
  byId("answers").replaceChildren(...answers, ...known);
  byId("answers").hidden = !answers.length && !known.length;
}

// Listed by what the search sorts them by: where that is not the probability, the length penalty was at work.
function fillAlternatives(answer) {
  byId("others").hidden = !answer.alternatives.length;
  const list = byId("alternatives");
  const all = [answer, ...answer.alternatives];
  const falls = (value) => all.every((other, index) => index === 0 || value(other) === null || value(other) <= value(all[index - 1]));
  byId("others-order").textContent = falls((other) => other.logprob)
    ? "the likeliest first"
    : falls((other) => other.confidence)
      ? "the surest first"
      : "best first";
  list.replaceChildren(
    ...answer.alternatives.map((other) => {
      const facts = [
        other.confidence === null ? null : `${percent(other.confidence)} sure`,
        other.logprob === null ? null : `log p ${signed(other.logprob)}`,
      ].filter(Boolean);
      return make("li", {}, other.caption || "empty caption", " ", make("small", {}, facts.join(", ")));
    }),
  );
}

function fillFacts(row, answer) {
  const facts = [["File", row.link ? make("a", { href: row.link }, row.name) : row.name]];
  if (row.split) facts.push(["Split", row.split]);
  if (answer.confidence !== null) facts.push(["Sure", `${percent(answer.confidence)} (the probability per word)`]);
  if (answer.logprob !== null) facts.push(["log p", `${signed(answer.logprob)} (of the whole caption)`]);
  byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function stepLarge(by) {
  const place = state.open + by;
  if (place >= 0 && place < state.shown.length) openLarge(place);
}

// Called for every way out: buttons, Escape, the browser's "back".
function closed() {
  stopPlaying();
  const place = state.open;
  state.open = -1;
  if (history.state?.opened) history.back();
  else writeAddress();
  const page = Math.floor(place / PER_PAGE) + 1;
  if (page !== state.page) {
    state.page = page;
    drawPage();
  }
  const current = cardAt(place);
  current?.querySelector(".open").focus();
  current?.scrollIntoView({ block: "nearest" });
}

// ---- judging ----

function showVerdict() {
  const judgement = judgementOf(openRow());
  for (const button of byId("verdicts").querySelectorAll("[data-verdict]")) {
    button.setAttribute("aria-pressed", String(judgement?.verdict === button.dataset.verdict));
  }
  const correction = judgement?.correction ?? null;
  byId("correction").hidden = correction === null;
  byId("correction").textContent = `corrected: ${correction ?? ""}`;
  const item = cardAt(state.open);
  if (item) badge(item, openRow());
}

function giveVerdict(verdict) {
  if (!canJudge(openRow())) return;
  const given = judgementOf(openRow())?.verdict === verdict ? null : verdict;
  judge(openRow(), { verdict: given });
  showVerdict();
  say(given ?? "not judged");
}

function startEditing() {
  const row = openRow();
  if (!canJudge(row)) return;
  byId("edited").value = judgementOf(row)?.correction ?? row.answers[0].caption;
  byId("edit").hidden = false;
  byId("edited").focus();
  byId("edited").select();
}

function stopEditing() {
  if (byId("edit").contains(document.activeElement)) byId("edit-start").focus();
  byId("edit").hidden = true;
}

function keepEdit() {
  const row = openRow();
  const text = byId("edited").value.trim().replace(/\s+/g, " ");
  judge(row, { correction: text && text !== row.answers[0].caption ? text : null });
  stopEditing();
  showVerdict();
}

// ---- copying ----

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages of a plain http server have no clipboard of their own.
    const area = make("textarea", { value: text });
    byId("panel").append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${what} copied`);
}

function say(text) {
  byId("said").textContent = text;
}

// ---- events ----

const LARGE_KEYS = {
  ArrowLeft: () => stepLarge(-1),
  ArrowRight: () => stepLarge(1),
  1: () => giveVerdict("right"),
  2: () => giveVerdict("partly"),
  3: () => giveVerdict("wrong"),
  e: startEditing,
  c: () => byId("copy-caption").click(),
};

byId("large").addEventListener("keydown", (event) => {
  if (event.target === byId("edited")) {
    if (event.key === "Enter" && !event.shiftKey) keepEdit();
    else if (event.key === "Escape") stopEditing();
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && !(event.target instanceof HTMLButtonElement)) {
    event.preventDefault();
    playOrStop();
  } else if (LARGE_KEYS[event.key]) {
    event.preventDefault();
    LARGE_KEYS[event.key]();
  }
});
byId("large").addEventListener("close", closed);
byId("close").addEventListener("click", () => byId("large").close());
byId("previous").addEventListener("click", () => stepLarge(-1));
byId("next").addEventListener("click", () => stepLarge(1));
byId("edit").addEventListener("submit", (event) => {
  event.preventDefault();
  keepEdit();
});
byId("edit-cancel").addEventListener("click", stopEditing);
byId("edit-start").addEventListener("click", startEditing);
byId("copy-caption").addEventListener("click", () => {
  const row = openRow();
  copy(judgementOf(row)?.correction ?? (row.answers[0].caption || row.captions[0] || ""), "caption");
});
byId("copy-link").addEventListener("click", () => copy(location.href, "link"));
for (const button of byId("verdicts").querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => giveVerdict(button.dataset.verdict));
}

let touched = null;
byId("stage").addEventListener("pointerdown", (event) => {
  touched = event.pointerType === "mouse" ? null : { x: event.clientX, y: event.clientY };
});
byId("stage").addEventListener("pointerup", (event) => {
  if (touched === null) return;
  const [x, y] = [event.clientX - touched.x, event.clientY - touched.y];
  touched = null;
  if (Math.abs(x) > SWIPE_PIXELS && Math.abs(x) > 2 * Math.abs(y)) stepLarge(x > 0 ? -1 : 1);
});
