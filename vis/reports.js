// Reports of training runs (model_id<ID>.json), ours and the original's, in one shape. Ours have learning rates and
// speeds in a second file.
"use strict";

const ACCURACIES = [
  ["top1", "Top-1 accuracy"],
  ["top5", "Top-5 accuracy"],
];
const paceOf = (source) => source.replace(/\.json$/, "_pace.json");

// text: of the report; pace: of the second file, or null
function readReport(text, source, pace = null) {
  let report;
  try {
    report = JSON.parse(text);
  } catch (error) {
    return { problem: `${source} is not valid JSON: ${error.message}` };
  }
  if (!isObject(report) || !isObject(report.loss_history ?? 0)) {
    return { problem: `${source} is not a training report: it has no "loss_history"` };
  }
  const scores = new Map();
  for (const [iteration, values] of Object.entries(report.val_lang_stats_history ?? {})) {
    if (!isObject(values)) continue; // the original leaves null where nothing was scored
    for (const [name, value] of Object.entries(values)) {
      if (!scores.has(name)) scores.set(name, {});
      scores.get(name)[iteration] = value;
    }
  }
  for (const [iteration, values] of Object.entries(report.val_accuracy_history ?? {})) {
    if (!isObject(values)) continue;
    for (const [key, name] of ACCURACIES) {
      if (!scores.has(name)) scores.set(name, {});
      scores.get(name)[iteration] = values[key];
    }
  }
  return {
    source,
    name: source.replace(/\.json$/, ""),
    iteration: finite(report.iter) ?? 0,
    options: isObject(report.opt) ? report.opt : {},
    loss: series(report.loss_history),
    validation: series(report.val_loss_history),
    captions: lastCaptions(report.val_predictions),
    scores: new Map([...scores].map(([name, history]) => [name, series(history)])),
    ...readPace(pace),
  };
}

function readPace(text) {
  let pace = null;
  try {
    pace = JSON.parse(text);
  } catch {
    // It is being written at this moment: the next look finds it whole.
  }
  return { learningRate: series(pace?.learning_rate), speed: series(pace?.iterations_per_second) };
}

// {"0": 3.7, "25": 2.4} → [[0, 3.7], [25, 2.4]], in order, without what is not finite.
function series(history) {
  return Object.entries(history ?? {})
    .map(([iteration, value]) => [Number(iteration), finite(value)])
    .filter(([iteration, value]) => Number.isFinite(iteration) && value !== null)
    .sort((a, b) => a[0] - b[0]);
}

// Image id → caption of the last validation. The original keeps a list for each validation, by iteration.
function lastCaptions(predictions) {
  const lists = isObject(predictions) ? Object.entries(predictions).sort((a, b) => a[0] - b[0]).map((entry) => entry[1]) : [predictions];
  const last = lists[lists.length - 1];
  const rows = Array.isArray(last) ? last.filter(isObject) : [];
  return new Map(rows.map((row) => [String(row.image_id), String(row.caption ?? "")]));
}
