"""Render the results files as the tables and the pictures of the README: `python -m benchmarks.report`.

A table stands in the README between `<!-- NAME -->` and `<!-- /NAME -->`; nothing else is touched. A
picture stands beside its results file, whose digest it carries. With --check nothing is written, and the
exit status says whether tables and pictures are up to date.
"""

import argparse
import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import kernel_tables

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


def _of_kernels(table: Callable[[Any], str]) -> Callable[[list[dict[str, Any]]], str]:
    def of_only(records: list[dict[str, Any]]) -> str:
        return table(records[0])

    return of_only


TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], str], tuple[str, ...]]] = {
    "digits-ablation": (digits_ablation, ("digits-ablation",)),
    "small-runs": (small_runs, ("mnist-small", "fashion-mnist-small", "cifar10-small")),
} | {
    f"kernels-{device}{name}": (_of_kernels(table), (f"kernels-{device}",))
    for device in ("cpu", "cuda")
    for name, table in (
        ("", kernel_tables.operations),
        ("-priors", kernel_tables.priors),
        ("-models", kernel_tables.models),
        ("-memory", kernel_tables.memory),
    )
}
TABLES |= {
    "conditioners-cpu": (_of_kernels(kernel_tables.conditioners), ("conditioners-cpu",)),
    "flows-cpu": (_of_kernels(kernel_tables.flows), ("flows-cpu",)),
}
PICTURES = ("kernels-cpu", "kernels-cuda")


def render(readme: str, results: Path) -> str:
    """The README with every table made anew from the results files.

    What was never measured has no file, and then no place in the README either.
    """
    for name, (table, sources) in TABLES.items():
        pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        place, files = pattern.search(readme), [results / f"{source}.json" for source in sources]
        if not any(file.exists() for file in files):
            if place:
                raise SystemExit(f"README.md: there are no results for the table {name}")
            continue
        if not place:
            raise SystemExit(f"README.md: no place for the table {name}")
        block = f"<!-- {name} -->\n{table(_records(files))}\n<!-- /{name} -->"
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


def _records(files: list[Path]) -> list[dict[str, Any]]:
    """What the files hold: a list of records each, or one."""
    contents = [json.loads(file.read_text()) for file in files]
    return [r for c in contents for r in (c if isinstance(c, list) else [c])]


def outdated_pictures(results: Path) -> dict[Path, str]:
    """Pictures that do not show their results file, and the digest of that file."""
    found = {}
    for name in PICTURES:
        file, picture = results / f"{name}.json", results / f"{name}.png"
        if file.exists():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if not picture.exists() or png_text(picture.read_bytes()).get("Source") != digest:
                found[picture] = digest
    return found


def png_text(png: bytes) -> dict[str, str]:
    """The texts that a PNG file carries."""
    texts, at = {}, 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"tEXt":
            key, _, value = png[at + 8 : at + 8 + length].partition(b"\0")
            texts[key.decode("latin-1")] = value.decode("latin-1")
        at += 12 + length
    return texts


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
    pictures = outdated_pictures(RESULTS)
    if args.check:
        stale = (["README.md"] if new != old else []) + [picture.name for picture in pictures]
        if stale:
            raise SystemExit(
                f"{', '.join(stale)}: not what benchmarks/results says: python -m benchmarks.report"
            )
        return
    path.write_text(new)
    for picture, digest in pictures.items():
        kernel_tables.picture(json.loads(picture.with_suffix(".json").read_text()), picture, digest)


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
