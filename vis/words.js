// Captions as marked-up lines: unsure words shaded, words in which results differ, UNK.
"use strict";

// No colour for a certain word, the full one for a word of 2 % or less.
function shade(logprob) {
  const strength = Math.min(1, Math.max(0, logprob / Math.log(0.02)));
  return `rgba(var(--unsure), ${(0.75 * strength).toFixed(3)})`;
}

function fillCaption(line, answer, other = null) {
  line.classList.toggle("none", answer.caption === "");
  if (answer.caption === "") {
    line.replaceChildren(missingCaption(answer));
    return;
  }
  const words = answer.caption.split(" ");
  // Probabilities belong to the caption only if their words spell it: it may have been edited since.
  const known = answer.words.map((word) => word.word).join(" ") === answer.caption ? answer.words : [];
  const same = other === null ? null : sharedWords(words, other.caption.split(" "));
  const parts = words.map((word, index) => {
    const differs = same !== null && !same.has(index);
    if (!differs && !known.length && word !== "UNK") return word;
    const span = make(differs ? "mark" : "span", { className: word === "UNK" ? "word unk" : "word" }, word);
    const logprob = known[index]?.logprob ?? null;
    if (logprob !== null) {
      span.title = `probability ${percent(Math.exp(logprob))}`;
      if (byId("shade").checked) span.style.backgroundColor = shade(logprob);
    }
    return span;
  });
  line.replaceChildren(...parts.flatMap((part, index) => (index ? [" ", part] : [part])));
}

// The places in `words` of a longest common subsequence with `others`.
function sharedWords(words, others) {
  const length = Array.from({ length: words.length + 1 }, () => new Uint16Array(others.length + 1));
  for (let i = words.length - 1; i >= 0; i -= 1) {
    for (let j = others.length - 1; j >= 0; j -= 1) {
      length[i][j] = words[i] === others[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const shared = new Set();
  for (let i = 0, j = 0; i < words.length && j < others.length; ) {
    if (words[i] === others[j]) {
      shared.add(i);
      i += 1;
      j += 1;
    } else if (length[i + 1][j] >= length[i][j + 1]) i += 1;
    else j += 1;
  }
  return shared;
}

// The lines below a picture: its caption, those of each result with their letters, or all captions of a data set.
function captionLines(row, tag) {
  if (row.captions.length) {
    return row.captions.map((caption) => {
      const line = make(tag, { className: "caption small" });
      fillKnownCaption(line, caption);
      return line;
    });
  }
  return row.answers.map((answer, place) => {
    const line = make(tag, { className: "caption" });
    if (answer === null) line.append("–");
    else fillCaption(line, answer, place > 0 ? row.answers[0] : row.answers[1] ?? null);
    if (row.answers.length > 1) line.prepend(make("b", { className: "letter" }, letter(place)), " ");
    return line;
  });
}

const sourceName = (place) => (state.sources[place] ?? "").replace(/^compare-|\.json$/g, "");
const letter = (place) => "ABC"[place];
