// One shape for the rows of our results, of the original's (which know only image_id and caption), of data sets, and of
// several results of the same pictures side by side.
"use strict";

const state = {
  about: {},
  sources: [], // names of the results that are compared, or of the one that is shown
  rows: [],
  shown: [],
  page: 1,
  open: -1, // place in `shown` of the picture in the large view
};

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

// → rows, or a sentence that says why the data are none
function readRows(data, name) {
  if (!Array.isArray(data)) return `${name} is not a list of captions.`;
  return data.filter(isObject).map(readRow);
}

function readRow(row, index) {
  const id = row.image_id ?? index + 1;
  const ours = row.words !== undefined || row.logprob !== undefined || row.captions !== undefined;
  const name = typeof row.file_name === "string" && row.file_name ? row.file_name : `image ${id}`;
  const width = finite(row.width);
  const height = finite(row.height);
  return {
    id,
    key: typeof row.file_name === "string" && row.file_name ? row.file_name : String(id),
    name,
    // The original names its pictures by their ids; ours say where they are, or that there are none.
    picture: typeof row.image === "string" ? row.image : ours ? "" : `imgs/img${id}.jpg`,
    link: localLink(row.link),
    ratio: width > 0 && height > 0 ? Math.min(2.4, Math.max(0.6, width / height)) : 1.25,
    answers: [readAnswer(row)],
    references: texts(row.references),
    captions: texts(row.captions), // of a data set
    split: typeof row.split === "string" ? row.split : "",
    duplicates: typeof row.duplicates === "number" ? row.duplicates : null,
    text: "",
  };
}

// Where a picture comes from, as a scene of a video: only files beside the page, for data may come from anyone.
function localLink(link) {
  if (typeof link !== "string" || !URL.canParse(link, location.href)) return "";
  const address = new URL(link, location.href);
  return link && address.protocol === location.protocol && address.host === location.host ? address.href : "";
}

const texts = (value) => (Array.isArray(value) ? value.map(String) : []);

function readAnswer(row) {
  const alternatives = Array.isArray(row.n_best) ? row.n_best.filter(isObject).map(readCaption) : [];
  const caption = readCaption(row);
  // The first of the n best is the caption itself, but where the model abstained.
  const isFirst = alternatives.length > 0 && alternatives[0].caption === caption.caption;
  const score = finite(row.score);
  return { ...caption, score, scoreName: String(row.score_name ?? "score"), abstained: Boolean(row.abstained), alternatives: alternatives.slice(isFirst ? 1 : 0) };
}

function readCaption(row) {
  const words = Array.isArray(row.words) ? row.words.filter(isObject) : [];
  return {
    caption: String(row.caption ?? ""),
    logprob: finite(row.logprob),
    confidence: finite(row.confidence),
    words: words.map((word) => ({ word: String(word.word), logprob: finite(word.logprob), heat: typeof word.heat === "string" ? word.heat : "" })),
  };
}

const missingCaption = (answer) => (answer.abstained ? "no caption: the model was not sure enough" : "empty caption");

// Rows of several results, joined by file name or id, in the order of the first.
function joinRows(results) {
  const others = results.slice(1).map((rows) => new Map(rows.map((row) => [row.key, row])));
  return results[0].map((row) => ({
    ...row,
    answers: [row.answers[0], ...others.map((found) => found.get(row.key)?.answers[0] ?? null)],
  }));
}

// What search, filters and sorting ask about each row, found out once.
function prepareRows() {
  const captions = new Map();
  for (const row of state.rows) {
    const caption = row.answers[0].caption;
    captions.set(caption, (captions.get(caption) ?? 0) + 1);
  }
  for (const row of state.rows) {
    const answers = row.answers.filter(Boolean);
    row.text = [...answers.map((answer) => answer.caption), ...row.captions, row.name].join(" ").toLowerCase();
    row.unk = hasUnknownWord(row);
    row.repeated = row.answers[0].caption !== "" && captions.get(row.answers[0].caption) > 1;
    const scores = answers.map((answer) => answer.score ?? answer.confidence).filter((value) => value !== null);
    row.difference = scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : 0;
    row.differs = row.answers.some((answer) => (answer?.caption ?? "") !== row.answers[0].caption);
  }
}
