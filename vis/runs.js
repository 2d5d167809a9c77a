// Reports of runs in the folders beside the page, found in the lists that python -m http.server gives of folders.
"use strict";

const MOST_LISTS = 60;
const DEEPEST = 2; // folders below the one that holds the page's folder

// → addresses relative to the page, sorted
async function findReports() {
  const here = new URL(".", location.href);
  const found = new Set();
  let folders = [new URL("..", here)];
  let left = MOST_LISTS;
  for (let depth = 0; folders.length && depth <= DEEPEST; depth += 1) {
    const looked = folders.slice(0, left);
    left -= looked.length;
    const lists = await Promise.all(looked.map(linksOf));
    folders = [];
    lists.forEach((links, place) => {
      for (const link of links) {
        // Only what lies in the folder itself: a list of another kind may link to anything.
        const folder = looked[place].href;
        const name = link.href.startsWith(folder) ? decoded(link.href.slice(folder.length)) : "";
        if (/^model_id[^/]*\.json$/.test(name) && !/_pace\.json$/.test(name)) found.add(relative(here, link));
        else if (/^[^./][^/]*\/$/.test(name)) folders.push(link);
      }
    });
  }
  return [...found].sort();
}

async function linksOf(folder) {
  try {
    const response = await fetch(folder, { cache: "no-cache" });
    if (!response.ok) return [];
    // Parsed, but neither shown nor run.
    const list = new DOMParser().parseFromString(await response.text(), "text/html");
    return [...list.querySelectorAll("a[href]")].map((link) => new URL(link.getAttribute("href"), folder));
  } catch {
    return []; // no list there, or no server any more
  }
}

function relative(here, address) {
  const above = new URL("..", here).href;
  const path = address.href.startsWith(here.href) ? address.href.slice(here.href.length) : `../${address.href.slice(above.length)}`;
  return decoded(path);
}

function decoded(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    return ""; // not the name of a file
  }
}

// Each by itself, and all together.
function reportLinks(reports) {
  const address = (names) => `#${new URLSearchParams(names.map((name) => ["report", name]))}`;
  const link = (text, names) => make("li", {}, make("a", { href: address(names) }, text));
  const all = reports.length > 1 ? [link(`all ${reports.length} side by side`, reports)] : [];
  return make("ul", { className: "reports" }, ...reports.map((name) => link(name, [name])), ...all);
}
