// Line charts over iterations, drawn as SVG.
"use strict";

const pointed = { title: "", iteration: 0 }; // where the reader points: charts that are drawn anew go on from there
const MAX_POINTS = 1500; // of a drawn line: more than it has pixels would only cost time

// Mean over a window of up to a tenth of the points, centred: it lags neither behind nor ahead. Towards the steep start
// it narrows; at the end it does not, lest the last value stick out.
function smooth(points, amount) {
  const half = Math.round((amount * points.length) / 20);
  const sums = [0];
  for (const [, value] of points) sums.push(sums[sums.length - 1] + value);
  return points.map(([iteration], index) => {
    const first = Math.max(0, index - half);
    const last = Math.min(points.length - 1, index + Math.min(half, index));
    return [iteration, (sums[last + 1] - sums[first]) / (last + 1 - first)];
  });
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function chart(title, unit, lines, logarithmic, wide) {
  const drawn = lines.filter((line) => line.points.length);
  if (!drawn.length) return null;
  const room = Math.floor(byId("charts").getBoundingClientRect().width); // clientWidth may be rounded up
  const width = wide || room < 700 ? room : Math.floor((room - 16) / 2);
  const height = wide ? Math.min(420, Math.max(260, width * 0.45)) : 240;
  const inner = { left: 68, right: width - 28, top: 12, bottom: height - 48 };

  const values = drawn.flatMap((line) => line.points.map((point) => point[1]));
  const iterations = drawn.flatMap((line) => [line.points[0][0], line.points[line.points.length - 1][0]]);
  const log = logarithmic && least(values) > 0;
  const x = scale(least(iterations), greatest(iterations), inner.left, inner.right, 75, false);
  const y = scale(least(values), greatest(values), inner.bottom, inner.top, 40, log);

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0 });
  picture.append(svg("title", {}, `${title} over iterations: ${drawn.map((line) => line.label).join("; ")}`));
  for (const tick of y.ticks) {
    picture.append(svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: inner.left - 8, y: y(tick) + 4, "text-anchor": "end" }, y.format(tick)));
  }
  for (const tick of x.ticks) {
    picture.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: inner.top, y2: inner.bottom }));
    picture.append(svg("text", { x: x(tick), y: height - 28, "text-anchor": "middle" }, x.format(tick)));
  }
  const middle = (inner.top + inner.bottom) / 2;
  picture.append(svg("text", { class: "axis", x: (inner.left + inner.right) / 2, y: height - 8, "text-anchor": "middle" }, "iteration"));
  const turned = { class: "axis", x: 16, y: middle, transform: `rotate(-90 16 ${middle})`, "text-anchor": "middle" };
  picture.append(svg("text", turned, unit + (log ? ", logarithmic" : "")));
  for (const line of drawn) picture.append(...lineMarks(line, x, y));

  const readout = make("figcaption", {}, make("h2", {}, title), make("p", { className: "readout" }, legend(drawn)));
  readout.lastChild.setAttribute("aria-live", "polite");
  addCursor(picture, title, drawn, x, inner, readout.lastChild);
  return make("figure", { className: wide ? "chart wide" : "chart" }, readout, picture);
}

function legend(lines) {
  return lines.some((line) => line.kind === "training") ? "thin: training; with dots: validation" : "";
}

function lineMarks(line, x, y) {
  const points = thin(line.points).map(([iteration, value]) => [x(iteration).toFixed(1), y(value).toFixed(1)]);
  const path = svg("path", { class: `line ${line.kind}`, d: "M" + points.map((point) => point.join(" ")).join("L") });
  path.style.stroke = line.run.colour;
  const dots = line.kind === "validation" && points.length <= 60 ? points : points.length === 1 ? points : [];
  return [
    path,
    ...dots.map(([cx, cy]) => {
      const dot = svg("circle", { cx, cy, r: 2.8 });
      dot.style.fill = line.run.colour;
      return dot;
    }),
  ];
}

function thin(points) {
  const every = Math.ceil(points.length / MAX_POINTS);
  return points.filter((_, index) => index % every === 0 || index === points.length - 1);
}

// Loops, because Math.min(...values) overflows the stack on long histories.
const least = (values) => values.reduce((a, b) => Math.min(a, b));
const greatest = (values) => values.reduce((a, b) => Math.max(a, b));

// A function from values to pixels with round ticks, at least so many pixels apart.
function scale(low, high, from, to, apart, log) {
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const turn = log ? Math.log : (value) => value;
  const position = (value) => from + ((turn(value) - turn(low)) / (turn(high) - turn(low))) * (to - from);
  const rough = (high - low) / Math.max(2, Math.abs(to - from) / apart);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  position.ticks = [];
  for (let count = Math.ceil(low / step); count * step <= high + step * 1e-9; count += 1) position.ticks.push(count * step || 0); // not −0
  const digits = Math.min(6, Math.max(0, -Math.floor(Math.log10(step))));
  position.format = (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return position;
}

// A vertical line under the pointer, or moved by the arrow keys, and the values it meets.
function addCursor(picture, title, lines, x, inner, readout) {
  const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const rule = svg("line", { class: "cursor", y1: inner.top, y2: inner.bottom, visibility: "hidden" });
  picture.append(rule);
  let at = places.length - 1;

  function point(index) {
    at = Math.min(places.length - 1, Math.max(0, index));
    Object.assign(pointed, { title, iteration: places[at] });
    rule.setAttribute("x1", x(places[at]));
    rule.setAttribute("x2", x(places[at]));
    rule.setAttribute("visibility", "visible");
    const met = lines.map((line) => {
      const found = line.points[nearest(line.points.map((other) => other[0]), places[at])];
      const swatch = make("span", { className: "swatch" });
      swatch.style.backgroundColor = line.run.colour;
      return make("span", { className: "met" }, swatch, `${line.label} ${figure(found[1])}`);
    });
    readout.replaceChildren(make("span", { className: "met" }, `iteration ${places[at].toLocaleString()}`), ...met);
  }

  if (pointed.title === title) point(nearest(places, pointed.iteration));
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * picture.viewBox.baseVal.width;
    point(nearest(places.map(x), pixel));
  });
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    point(at + by);
  });
}

const figure = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(2) : value.toFixed(3));

function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[high] - wanted) < Math.abs(sorted[low] - wanted) ? high : low;
}
