"use strict";

const $ = (id) => document.getElementById(id);
const N_BEST = 3;
let token = ""; // in memory only: it is gone with the tab
let withheld = []; // pictures that wait for it
let queue = Promise.resolve();

/** What to ask of the captions; what nobody filled in is as the server was started. */
function query() {
  const asked = new URLSearchParams({ n_best: N_BEST, explain: Number($("explain").checked) });
  for (const id of ["require", "ban", "caption_prefix", "max_words"]) {
    const value = $(id).value.trim();
    if (value) asked.set(id, value);
  }
  return asked;
}

function percent(probability) {
  return `${Math.round(100 * probability)} %`;
}

/** Show a picture at once; its caption follows, as asked for when it came. */
function add(file) {
  const asked = query();
  const card = $("result").content.cloneNode(true).querySelector("li");
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  for (const event of ["load", "error"]) image.addEventListener(event, () => URL.revokeObjectURL(image.src));
  $("results").prepend(card);
  // One after the other: a hundred dropped photos shall not fill the queue that others wait in, too.
  queue = queue.then(() => caption(file, card, asked));
}

async function caption(file, card, asked) {
  const headers = { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  let body;
  try {
    answer = await fetch(`v1/captions?${asked}`, { method: "POST", headers, body: file });
    body = await answer.json();
  } catch {
    fail(card, "the server cannot be reached");
    return;
  }
  if (answer.status === 401) {
    withheld.push([file, card, asked]);
    $("access").hidden = false;
    $("status").textContent = token ? "That token is not right." : "";
  } else if (answer.status === 429) {
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    card.querySelector(".facts").textContent = `the server is busy; trying again in ${seconds} s`;
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    await caption(file, card, asked);
  } else if (answer.ok) {
    show(card, body.results[0]);
  } else {
    fail(card, body.error);
  }
}

function show(card, result) {
  card.querySelector(".caption").textContent = result.caption || "(no caption)";
  card.querySelector("img").alt = result.caption;
  card.querySelector(".facts").textContent = `confidence ${percent(result.confidence)}`;
  card.querySelector(".alternatives").replaceChildren(
    ...(result.n_best ?? []).slice(1).map((other) => {
      const item = document.createElement("li");
      item.textContent = `${other.caption} (${percent(other.confidence)})`;
      return item;
    }),
  );
  const explained = result.words.filter((word) => word.heat);
  card.querySelector(".words").hidden = explained.length === 0;
  card.querySelector(".words").replaceChildren(...explained.map((word) => wordButton(card.querySelector("figure"), word)));
  card.classList.add("done");
}

/** A word that lays its heat-map over the picture while it is pointed at or has the focus. */
function wordButton(figure, word) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = word.word;
  const hide = () => figure.querySelector("canvas")?.remove();
  const draw = () => {
    hide();
    figure.append(heatCanvas(atob(word.heat)));
  };
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, draw);
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, hide);
  return button;
}

function heatCanvas(bytes) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.sqrt(bytes.length);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < bytes.length; i++) pixels.data.set([255, 60, 0, bytes.charCodeAt(i)], 4 * i);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function fail(card, reason) {
  card.classList.add("failed");
  card.querySelector(".caption").textContent = reason;
}

for (const id of ["files", "camera"]) {
  $(id).addEventListener("change", (event) => {
    for (const file of event.target.files) add(file);
    event.target.value = ""; // the same file may be chosen again
  });
}
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  for (const file of event.dataTransfer.files) add(file);
});
document.addEventListener("paste", (event) => {
  for (const file of event.clipboardData.files) add(file);
});
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  $("status").textContent = "";
  $("access").hidden = true;
  const waiting = withheld;
  withheld = [];
  for (const one of waiting) queue = queue.then(() => caption(...one));
});
