// A data set before training: all captions, words that would become UNK, how often each word occurs.
"use strict";

const WORDS_LISTED = 500;
const vocabulary = { counts: new Map(), unknown: new Set() };

// As captioner/data/clean.py: lower case, ASCII punctuation gone, split on white space.
const cleanWord = (word) => word.toLowerCase().replace(/[!-/:-@[-`{-~]/g, "");

// words.json: [[word, count, 1 if it is in the vocabulary, else 0], ..], the most frequent first
function takeWords(words) {
  const listed = Array.isArray(words) ? words.filter((entry) => Array.isArray(entry) && typeof entry[0] === "string") : [];
  vocabulary.counts = new Map(listed.map(([word, number]) => [word, number]));
  vocabulary.unknown = new Set(listed.filter((entry) => !entry[2]).map(([word]) => word));
  byId("wordlist").hidden = !listed.length;
  const known = listed.length - vocabulary.unknown.size;
  byId("wordlist").firstElementChild.textContent =
    `Words: ${known.toLocaleString("en")} known, ${vocabulary.unknown.size.toLocaleString("en")} rare ones become UNK`;
  byId("wordlist").addEventListener("toggle", () => fillWordList(listed), { once: true });
}

function fillWordList(listed) {
  const shown = listed.length > WORDS_LISTED ? [...listed.slice(0, WORDS_LISTED / 2), null, ...listed.slice(-WORDS_LISTED / 2)] : listed;
  const chips = shown.map((entry) => {
    if (entry === null) return make("li", {}, "…");
    const [word, number, known] = entry;
    const chip = make("button", { type: "button", className: known ? "chip" : "chip unk" }, word, make("small", {}, number.toLocaleString("en")));
    chip.addEventListener("click", () => {
      byId("search").value = word;
      changed();
    });
    return make("li", {}, chip);
  });
  byId("wordlist").querySelector(".table").replaceChildren(make("ul", { className: "chips" }, ...chips));
}

// What is odd about the data set; where a filter finds the pictures, as a link.
function showFindings(findings) {
  const listed = Array.isArray(findings) ? findings.filter((finding) => isObject(finding) && finding.text) : [];
  byId("findings").hidden = !listed.length;
  byId("findings").firstElementChild.textContent = `Findings: ${listed.length}`;
  const items = listed.map((finding) =>
    make("li", {}, finding.show in FILTERS ? make("a", { href: `#show=${finding.show}` }, finding.text) : String(finding.text)),
  );
  byId("findings").querySelector("ul").replaceChildren(...items);
}

const hasUnkCaption = (row) => row.captions.some((caption) => caption.split(/\s+/).some(isUnknown));

function isUnknown(word) {
  return word === "UNK" || vocabulary.unknown.has(cleanWord(word));
}

function fillKnownCaption(line, caption) {
  const parts = caption.split(/(\s+)/).map((part) => {
    if (!isUnknown(part)) return part;
    return make("span", { className: "word unk", title: `becomes UNK: occurs ${vocabulary.counts.get(cleanWord(part)) ?? 0} times` }, part);
  });
  line.replaceChildren(...parts);
}
