"""The table of a sweep: mean and standard deviation over the seeds."""

import csv
import io
import math
from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

__all__ = ["seconds_to_target", "summarise", "swept_number", "table_cells", "table_csv"]

_HEADS = ("flow", "discriminator")
_METRICS = (
    *(f"{head}_accuracy" for head in _HEADS),
    "bits_per_dim",
    *(f"{head}_ece" for head in _HEADS),
    *(f"{head}_seconds_to_target" for head in _HEADS),
    "seconds",
    "images_per_second",
)


def seconds_to_target(rows: Iterable[dict[str, str]], column: str, target: float) -> float | None:
    """Seconds of training until a column of metrics.csv first reaches the target; None if never.

    They include the evaluations up to then, and are known as finely as those are frequent
    (--eval-every).
    """
    reached = (r for r in rows if r.get(column) and float(r[column]) >= target)
    first = next(reached, None)
    return None if first is None else float(first["seconds"])


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, for each preset and option values.

    Args:
        records: as sweep.json holds them under "runs".

    Returns:
        For each: preset, options, the number of runs and of those finished, and by metric its mean,
        std (sample standard deviation, with n - 1; None for n < 2) and n, the finished runs that have
        the metric: those that never reach the target have no time to it.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["preset"], *record["options"].items()), []).append(record)
    table = []
    for (name, *options), group in groups.items():
        results = [record["results"] for record in group if "results" in record]
        metrics = {}
        for metric in _METRICS:
            values = [r[metric] for r in results if r.get(metric) is not None]
            metrics[metric] = {
                "mean": mean(values) if values else None,
                "std": stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
        row = {"preset": name, "options": dict(options), "runs": len(group)}
        table.append(row | {"finished": len(results), "metrics": metrics})
    return table


def swept_number(table: list[dict[str, Any]]) -> str | None:
    """The one option that takes several values, all of them finite numbers; None if none or several do."""
    found = []
    for name in table[0]["options"]:
        values = {row["options"][name] for row in table}
        if len(values) > 1 and all(map(_is_number, values)):
            found.append(name)
    return found[0] if len(found) == 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def table_cells(table: list[dict[str, Any]], target: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that is shown."""
    aim = f"to {100 * target:g} %, s"
    columns = (
        ("flow, %", "flow_accuracy", 100, 1),
        ("discriminator, %", "discriminator_accuracy", 100, 1),
        ("bits/dim", "bits_per_dim", 1, 3),
        (f"flow {aim}", "flow_seconds_to_target", 1, 1),
        (f"discriminator {aim}", "discriminator_seconds_to_target", 1, 1),
        ("training, s", "seconds", 1, 1),
    )
    header = ["preset", *table[0]["options"], "runs", *(title for title, *_ in columns)]
    rows = []
    for row in table:
        finished = row["finished"]
        count = str(finished) if finished == row["runs"] else f"{finished} of {row['runs']}"
        figures = [
            _spread(row["metrics"][metric], scale, digits, finished)
            for _, metric, scale, digits in columns
        ]
        rows.append([row["preset"], *row["options"].values(), count, *figures])
    return header, rows


def _spread(metric: dict[str, Any], scale: float, digits: int, finished: int) -> str:
    if metric["mean"] is None:
        return "–"
    text = f"{scale * metric['mean']:.{digits}f}"
    if metric["std"] is not None:
        text += f" ± {scale * metric['std']:.{digits}f}"
    return text if metric["n"] == finished else f"{text} ({metric['n']} of {finished})"


def table_csv(table: list[dict[str, Any]]) -> str:
    """The whole table, a column for each mean and each standard deviation."""
    text = io.StringIO()
    kinds = ("mean", "std", "n")
    header = ["preset", *table[0]["options"], "runs", "finished"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, *(f"{m}_{kind}" for m in _METRICS for kind in kinds)])
    for row in table:
        figures = [row["metrics"][m][kind] for m in _METRICS for kind in kinds]
        options = row["options"].values()
        writer.writerow([row["preset"], *options, row["runs"], row["finished"], *figures])
    return text.getvalue()
