// The pictures of one page, as justified rows (two columns on a phone), and the pagers above and below them.
"use strict";

const PER_PAGE = 100;

function drawPage() {
  const pages = Math.max(1, Math.ceil(state.shown.length / PER_PAGE));
  state.page = Math.min(Math.max(1, state.page), pages);
  const first = (state.page - 1) * PER_PAGE;
  const rows = state.shown.slice(first, first + PER_PAGE);
  const cards = rows.map((row, index) => card(row, first + index));
  justify(cards); // before they are in the page: asked for its width, it would lay them out twice
  byId("grid").replaceChildren(...cards);
  byId("none").hidden = state.shown.length > 0 || state.rows.length === 0;

  const range = pages > 1 ? `, ${first + 1} to ${first + rows.length} on this page` : "";
  byId("count").textContent =
    state.shown.length === state.rows.length
      ? count(state.rows.length, "picture") + range
      : `${state.shown.length.toLocaleString("en")} of ${count(state.rows.length, "picture")} match${range}`;
  for (const pager of document.querySelectorAll(".pager")) showPager(pager, pages);
  writeAddress();
}

function card(row, place) {
  const open = make("button", { type: "button", className: "open" }, picture(row, true));
  open.addEventListener("click", () => openLarge(place));
  const text = make("div", { className: "text" }, ...captionLines(row, "p"));
  const facts = make("p", { className: "facts" }, make("span", { className: "name", title: row.name }, row.name));
  const sure = row.answers.flatMap((answer, place) =>
    answer?.confidence == null ? [] : [(row.answers.length > 1 ? `${letter(place)} ` : "") + percent(answer.confidence)],
  );
  if (sure.length) {
    facts.append(make("span", { className: "confidence", title: "The probability per word, on average" }, `${sure.join(", ")} sure`));
  } else if (row.split) facts.append(make("span", { className: "confidence" }, row.split));
  text.append(facts);
  const item = make("li", { className: "card" }, open, text);
  item.ratio = row.ratio;
  item.style.setProperty("--ratio", row.ratio.toFixed(3));
  badge(item, row);
  return item;
}

// What the reader said about the caption, in the picture's corner.
function badge(item, row) {
  item.querySelector(".badge")?.remove();
  const judgement = judgementOf(row);
  if (!judgement) return;
  const sign = (SIGNS[judgement.verdict] ?? "") + (judgement.correction === null ? "" : "✎");
  const label = [judgement.verdict, judgement.correction === null ? null : "corrected"].filter(Boolean).join(", ");
  const mark = make("span", { className: `badge ${judgement.verdict ?? ""}`, title: label }, sign);
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", label);
  item.append(mark);
}

function picture(row, small) {
  const caption = row.answers[0].caption || row.captions[0] || `${row.name}, ${missingCaption(row.answers[0])}`;
  const address = pictureAddress(row.picture);
  if (!address) {
    const none = make("span", { className: "no-picture" }, state.about.pictures === false ? row.name : "no picture");
    return none;
  }
  const image = make("img", { alt: caption, decoding: "async" });
  if (small) image.loading = "lazy";
  image.addEventListener("error", () => image.replaceWith(make("span", { className: "no-picture" }, `no picture: ${row.picture}`)));
  image.src = address;
  return image;
}

function cardAt(place) {
  return byId("grid").children[place - (state.page - 1) * PER_PAGE] ?? null;
}

// ---- pages ----

function makePager(pager) {
  const previous = make("button", { type: "button", className: "previous" }, "← Previous");
  const next = make("button", { type: "button", className: "next" }, "Next →");
  const input = make("input", { type: "number", min: 1, inputMode: "numeric", className: "page" });
  const pages = make("output", { className: "pages" });
  pager.append(previous, make("label", {}, "Page ", input, " of ", pages), next);
  previous.addEventListener("click", () => turnPage(state.page - 1));
  next.addEventListener("click", () => turnPage(state.page + 1));
  input.addEventListener("change", () => turnPage(Number.parseInt(input.value, 10) || 1));
}

function showPager(pager, pages) {
  const [previous, label, next] = pager.children;
  pager.hidden = pages === 1;
  label.querySelector(".page").value = state.page;
  label.querySelector(".page").max = pages;
  label.querySelector(".pages").textContent = pages.toLocaleString("en");
  disable(previous, state.page === 1, label.querySelector(".page"));
  disable(next, state.page === pages, label.querySelector(".page"));
}

function turnPage(page) {
  state.page = page;
  drawPage();
  window.scrollTo(0, 0);
}

// ---- size ----

function resize(size) {
  byId("size").value = size;
  byId("grid").dataset.columns = size >= 320 ? 1 : size <= 160 ? 3 : 2; // of a phone
  justify();
}

// Widths in proportion to the pictures' shapes, in rows as near to the chosen height as whole pictures allow. The last
// row is no higher than that.
function justify(cards = [...byId("grid").children]) {
  const gap = Number.parseFloat(getComputedStyle(byId("grid")).columnGap);
  const room = byId("grid").getBoundingClientRect().width - 0.5; // which rounding may take away
  const wanted = Number(byId("size").value);
  const height = (row, ratios) => (room - gap * (row.length - 1)) / ratios;
  let row = [];
  let ratios = 0;
  const close = (high) => {
    for (const item of row) item.style.setProperty("--width", `${(item.ratio * high).toFixed(2)}px`);
    [row, ratios] = [[], 0];
  };
  for (const item of cards) {
    const without = row.length ? height(row, ratios) : Infinity;
    const high = height([...row, item], ratios + item.ratio);
    // Too low with this picture, too high without it: which is nearer?
    if (high < wanted && without / wanted < wanted / high) close(without);
    row.push(item);
    ratios += item.ratio;
    if (height(row, ratios) <= wanted) close(height(row, ratios));
  }
  if (row.length) close(Math.min(wanted, height(row, ratios)));
}

for (const pager of document.querySelectorAll(".pager")) makePager(pager);
let room = 0;
new ResizeObserver(() => {
  if (byId("grid").clientWidth !== room) justify();
  room = byId("grid").clientWidth;
}).observe(byId("grid"));
