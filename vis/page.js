// What both pages use. Data are put in as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const finite = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function percent(probability) {
  const value = 100 * probability;
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
}

const signed = (value) => value.toFixed(2).replace("-", "−");

// A title and lines of text; ["pre", text] is a command or file content.
function explain(title, lines) {
  const parts = lines.map((line) => (Array.isArray(line) ? make(line[0], {}, line[1]) : make("p", {}, line)));
  byId("notice").replaceChildren(make("h2", {}, title), ...parts);
  byId("notice").hidden = false;
}

// For pages that may not fetch files: the reader hands them over. `take` gets an array of files.
function fileChooser(label, multiple, take) {
  const choose = make("input", { type: "file", accept: ".json,application/json", multiple });
  choose.setAttribute("aria-label", label);
  choose.addEventListener("change", () => take([...choose.files]));
  return choose;
}

// Each part is escaped, and an address with a scheme or a host is no file of this server.
function localAddress(path) {
  if (!path || /^([a-z][a-z0-9+.-]*:|[\\/]{2})/i.test(path)) return "";
  return path.split("/").map(encodeURIComponent).join("/");
}

// A disabled button swallows keys: the focus has to move on.
function disable(button, disabled, neighbour) {
  if (disabled && document.activeElement === button) neighbour.focus();
  button.disabled = disabled;
}
