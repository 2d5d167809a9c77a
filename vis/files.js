// Where data come from: fetched from the server; from inside this page (an album); or, where the page was opened by
// double click, from a script file beside each JSON file, because browsers let no such page read files.
"use strict";

const received = new Map();

// What NAME.json.js calls.
function receiveData(name, data) {
  received.set(name, data);
}

// → {data}, {missing: true} or {problem: text}
async function readData(name) {
  const inside = textInside(name);
  if (inside !== null) return parse(inside, name);
  if (isAlbum()) return { missing: true };
  if (location.protocol === "file:") return readScript(name);
  const address = localAddress(name);
  if (!address) return { problem: `${name}: only files of this server are read` };
  try {
    const response = await fetch(address, { cache: "no-cache" });
    if (response.status === 404) return { missing: true };
    if (!response.ok) return { problem: `${name}: ${response.status} ${response.statusText}` };
    return parse(await response.text(), name);
  } catch (error) {
    return { problem: `${name} could not be fetched (${error.message}). Is the server still running?` };
  }
}

// A file that lies in this page itself, as text; null if there is none of that name.
function textInside(name) {
  return document.querySelector(`script[type="application/json"][data-name="${CSS.escape(name)}"]`)?.textContent ?? null;
}

const isAlbum = () => document.documentElement.dataset.album !== undefined;

// The pictures of an album lie in the page itself, one block each.
function pictureAddress(path) {
  const inside = isAlbum() && document.querySelector(`script[type="text/plain"][data-picture="${CSS.escape(path)}"]`);
  return inside ? `data:image/jpeg;base64,${inside.textContent}` : localAddress(path);
}

function readScript(name) {
  const address = localAddress(name);
  if (!address) return { missing: true };
  return new Promise((resolve) => {
    const script = make("script", { src: `${address}.js` });
    script.addEventListener("error", () => resolve({ missing: true }));
    script.addEventListener("load", () =>
      resolve(received.has(name) ? { data: received.get(name) } : { problem: `${name}.js holds no data: it may be cut off` }),
    );
    document.head.append(script);
  });
}

function parse(text, name) {
  try {
    return { data: JSON.parse(text) };
  } catch (error) {
    return { problem: `${name} is not valid JSON: ${error.message}` };
  }
}

async function readFile(file) {
  return parse(await file.text(), file.name);
}
