"""What a sweep has found: a table as CSV and Markdown, and a picture."""

import csv
import io
from pathlib import Path
from typing import Any

from captioner.errors import InputError
from captioner.runtime.files import atomic_write
from captioner.sweep.study import Interval, Sweep, validation_curve

STATES = {"COMPLETE": "done", "FAIL": "failed", "RUNNING": "unfinished"}


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per trial, best first, failed and unfinished ones last."""
    found = []
    for trial in sweep.study.trials:
        found.append(
            {
                "trial": trial.number,
                "state": STATES[trial.state.name],
                sweep.score_name: trial.value,
                "iteration": trial.user_attrs.get("iteration"),
                **{name: trial.params.get(name) for name in sweep.ranges.search},
                "reason": trial.user_attrs.get("reason", ""),
            }
        )
    sign = -1 if sweep.ranges.by_cider else 1
    return sorted(found, key=lambda r: (r["state"] != "done", sign * (r[sweep.score_name] or 0), r["trial"]))


def markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    if not table:
        return "no trial has begun"
    lines = [list(table[0]), ["---"] * len(table[0])]
    lines += [[_cell(value) for value in row.values()] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write_results(sweep: Sweep) -> list[dict[str, Any]]:
    """Write results.csv, results.md and results.svg into the sweep's folder; returns the table.

    Raises:
        InputError: a file cannot be written, or matplotlib is missing.
    """
    table = rows(sweep)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]) if table else ["trial"])
    writer.writeheader()
    writer.writerows(table)
    for name, content in (("results.csv", text.getvalue()), ("results.md", markdown(table) + "\n")):
        with atomic_write(sweep.folder / name, "w", encoding="utf-8", newline="") as stream:
            stream.write(content)
    _draw(sweep, table, sweep.folder / "results.svg")
    return table


def _draw(sweep: Sweep, table: list[dict[str, Any]], path: Path) -> None:
    """Validation curves of all trials, then the score over each option; the best trial stands out."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a sweep's picture needs matplotlib, which is not installed", remedy='pip install "captioner[sweep]"'
        ) from error
    done = [row for row in table if row["state"] == "done"]
    columns = min(3, 1 + len(sweep.ranges.search))
    lines = -(-(1 + len(sweep.ranges.search)) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    curves = next(axes)
    for row in reversed(done):  # the best one last, on top
        best = row is done[0]
        points = validation_curve(sweep.folder / f"model_idtrial{row['trial']}.json", sweep.ranges.by_cider)
        curves.plot(
            [iteration for _, iteration in points],
            [score for score, _ in points],
            color="tab:red" if best else "0.6",
            label=f"best: trial {row['trial']}" if best else None,
            marker=".",
        )
    curves.set(xlabel="iteration", ylabel=sweep.score_name)
    if done:
        curves.legend()
    for name, values in sweep.ranges.search.items():
        axis = next(axes)
        for row in done:
            x = row[name] if isinstance(values, Interval) else values.index(row[name])
            axis.plot([x], [row[sweep.score_name]], "o", color="tab:red" if row is done[0] else "0.4")
        if not isinstance(values, Interval):
            axis.set_xticks(range(len(values)), [_cell(value) for value in values])
        elif values.log:
            axis.set_xscale("log")
        axis.set(xlabel=name, ylabel=sweep.score_name)
    for unused in axes:
        unused.axis("off")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="svg", metadata={"Date": None})
