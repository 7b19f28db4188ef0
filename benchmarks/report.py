"""Render the results files as the tables of the README: `python -m benchmarks.report`.

A table stands in the README between `<!-- NAME -->` and `<!-- /NAME -->`; nothing else is touched.
With --check nothing is written, and the exit status says whether the README is up to date.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROW_NAMES = {
    "supervised": "supervised only",
    "nll": "+ likelihood",
    "nll+adversarial": "+ likelihood, adversarial",
    "full": "full: + pseudo-labels",
    "flowgmm": "FlowGMM (baseline)",
}


def digits_ablation(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a row per objective."""
    lines = [
        "| objective | flow, % | discriminator, % | bits/dim |",
        "|---|---|---|---|",
    ]
    for row, name in ROW_NAMES.items():
        runs = [r["results"] for r in records if r["results"]["objective"] == row]
        if not runs:
            continue
        flow = _spread([100 * r["flow_accuracy"] for r in runs], 1)
        discriminator = _spread([100 * r["discriminator_accuracy"] for r in runs], 1)
        bits = _spread([r["bits_per_dim"] for r in runs], 2)
        lines.append(f"| {name} | {flow} | {discriminator} | {bits} |")
    seeds = len({r["results"]["seed"] for r in records})
    minutes = mean(r["results"]["seconds"] for r in records) / 60
    lines.append(
        f"\nTest accuracy at the last step, mean ± standard deviation over {seeds} seeds; "
        f"{minutes:.1f} minutes a run. {_hardware(records)}."
    )
    return "\n".join(lines)


def small_runs(records: list[dict[str, Any]]) -> str:
    """A row per run of the -small presets."""
    lines = [
        "| data, labels | steps | minutes | flow, % | discriminator, % | bits/dim | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        r = record["results"]
        lines.append(
            f"| {r['dataset']}, {r['labels']} | {r['steps']} | {r['seconds'] / 60:.1f} "
            f"| {100 * r['flow_accuracy']:.1f} | {100 * r['discriminator_accuracy']:.1f} "
            f"| {r['bits_per_dim']:.2f} | {r['images_per_second']:.0f} |"
        )
    lines.append(f"\nTest accuracy at the last step, one seed. {_hardware(records)}.")
    return "\n".join(lines)


TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], str], tuple[str, ...]]] = {
    "digits-ablation": (digits_ablation, ("digits-ablation",)),
    "small-runs": (small_runs, ("mnist-small", "fashion-mnist-small", "cifar10-small")),
}


def render(readme: str, results: Path) -> str:
    """The README with every table made anew from the results files."""
    for name, (table, sources) in TABLES.items():
        records = [r for s in sources for r in json.loads((results / f"{s}.json").read_text())]
        block = f"<!-- {name} -->\n{table(records)}\n<!-- /{name} -->"
        pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not pattern.search(readme):
            raise SystemExit(f"README.md: no place for the table {name}")
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if out of date"
    )
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old, RESULTS)
    if args.check and new != old:
        raise SystemExit(
            "README.md is not what benchmarks/results says: python -m benchmarks.report"
        )
    path.write_text(new)


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _hardware(records: list[dict[str, Any]]) -> str:
    """Processor, threads and versions, named once where all records agree."""
    found = []
    for record in records:
        versions, threads = record["results"]["versions"], record["threads"]
        text = f"{record['processor']}, {threads} thread{'s' * (threads > 1)}, torch {versions['torch']}"
        if text not in found:
            found.append(text)
    return "; ".join(found)


if __name__ == "__main__":
    main()
