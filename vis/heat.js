// Where the model looked: a small map per word, laid over the picture.
"use strict";

// The model sees the picture as 256 × 256 pixels, of which it takes the inner 224 × 224. What became of a picture that
// is no square is its image mode: squashed, its middle square, or padded to a square.
const HEAT_INSET = 15 / 256;
const HEAT_SIZE = 224 / 256;
const PLAY_MILLISECONDS = 700;

// base64 of uint8, row by row, of a square map → {side, values 0..1}, or null
function readHeat(text) {
  if (!text) return null;
  let bytes;
  try {
    bytes = atob(text);
  } catch {
    return null;
  }
  const side = Math.sqrt(bytes.length);
  if (!Number.isInteger(side)) return null;
  return { side, values: Array.from(bytes, (byte) => byte.charCodeAt(0) / 255) };
}

// The picture steps back (large.css), and what is hot stands out; cold is transparent.
function heatCanvas(heat) {
  const canvas = make("canvas", { className: "heat", width: heat.side, height: heat.side });
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(heat.side, heat.side);
  heat.values.forEach((value, index) => {
    pixels.data.set([255, 90 + 110 * value, 20, 165 * value], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function showHeat(heat) {
  hideHeat();
  const image = byId("picture").querySelector("img");
  if (!heat || !image) return;
  const canvas = heatCanvas(heat);
  // The image fills its box with `object-fit: contain`: where its pixels are has to be worked out.
  const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight) || 0;
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const side = { crop: Math.min(width, height), pad: Math.max(width, height) }[state.about.image_mode];
  const [seenWidth, seenHeight] = side ? [side, side] : [width, height];
  canvas.style.left = `${image.offsetLeft + (image.clientWidth - seenWidth) / 2 + seenWidth * HEAT_INSET}px`;
  canvas.style.top = `${image.offsetTop + (image.clientHeight - seenHeight) / 2 + seenHeight * HEAT_INSET}px`;
  canvas.style.width = `${seenWidth * HEAT_SIZE}px`;
  canvas.style.height = `${seenHeight * HEAT_SIZE}px`;
  canvas.style.filter = `blur(${(Math.min(seenWidth, seenHeight) * HEAT_SIZE) / heat.side / 6}px)`;
  byId("picture").append(canvas);
}

function hideHeat() {
  byId("picture").querySelector(".heat")?.remove();
}

// ---- the chips of the words: hovered, focused or tapped, or one after the other ----

const player = { timer: 0, held: null };

function holdWord(chip) {
  for (const other of byId("word-chips").querySelectorAll("[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
  player.held = chip;
  chip?.setAttribute("aria-pressed", "true");
  showHeat(chip?.heat ?? null);
}

function wordChip(word) {
  const probability = word.logprob === null ? "" : percent(Math.exp(word.logprob));
  const heat = readHeat(word.heat);
  const chip = make(heat ? "button" : "span", { className: "chip" }, word.word, make("small", {}, probability));
  if (word.logprob !== null) chip.style.setProperty("--shade", shade(word.logprob));
  if (heat) {
    chip.type = "button";
    chip.heat = heat;
    chip.setAttribute("aria-pressed", "false");
    chip.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && showHeat(heat));
    chip.addEventListener("pointerleave", () => showHeat(player.held?.heat ?? null));
    chip.addEventListener("click", () => {
      stopPlaying();
      holdWord(player.held === chip ? null : chip);
    });
  }
  return make("li", {}, chip);
}

function fillWords(words) {
  stopPlaying();
  player.held = null;
  hideHeat();
  byId("word-chips").replaceChildren(...words.map(wordChip));
  byId("play").hidden = !byId("word-chips").querySelector("button");
}

function playOrStop() {
  if (player.timer) {
    stopPlaying();
    return;
  }
  const chips = [...byId("word-chips").querySelectorAll("button")];
  if (!chips.length) return;
  let place = -1;
  const next = () => {
    place += 1;
    holdWord(chips[place] ?? null);
    if (place >= chips.length) stopPlaying();
  };
  player.timer = setInterval(next, PLAY_MILLISECONDS);
  byId("play").textContent = "■ Stop";
  next();
}

function stopPlaying() {
  clearInterval(player.timer);
  player.timer = 0;
  byId("play").textContent = "▶ Where it looked";
}

byId("play").addEventListener("click", playOrStop);
new ResizeObserver(() => player.held && showHeat(player.held.heat)).observe(byId("picture"));
