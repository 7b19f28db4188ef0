"""Render the results files as the tables and the pictures of the README: `python -m benchmarks.report`.

A table stands in the README between `<!-- NAME -->` and `<!-- /NAME -->`; nothing else is touched. A
picture stands beside the results files that it is made from, and carries their digest. With --check nothing
is written, and the exit status says whether tables and pictures are up to date.
"""

import argparse
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks import kernel_tables, pictures, step_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = {"flow": 0.90, "discriminator": 0.95}
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


def pinwheel_bridges(records: list[dict[str, Any]]) -> str:
    """Mass between the arms, a row per objective, and that of the data."""
    lines = [
        "| objective | mass between the arms, % | flow, % | discriminator, % | bits/dim |",
        "|---|---|---|---|---|",
    ]
    for row, name in ROW_NAMES.items():
        runs = [r for r in records if r["results"]["objective"] == row]
        if not runs:
            continue
        mass = _spread([100 * r["bridges"]["mass_between_arms"] for r in runs], 1)
        flow, discriminator = (
            _spread([100 * r["results"][f"{head}_accuracy"] for r in runs], 1) for head in MARKS
        )
        bits = _spread([r["results"]["bits_per_dim"] for r in runs], 2)
        lines.append(f"| {name} | {mass} | {flow} | {discriminator} | {bits} |")
    data = mean(100 * r["bridges"]["mass_between_arms_of_data"] for r in records)
    lines.append(f"| new data | {data:.1f} | | | |")
    seeds, results = len({r["results"]["seed"] for r in records}), records[0]["results"]
    lines.append(
        f"\n{results['dataset']}, {results['labels']} labels, {results['steps']} steps: samples where "
        f"the data have nothing, mean ± standard deviation over {seeds} seeds. {_hardware(records)}."
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


def time_to_accuracy(records: list[dict[str, Any]]) -> str:
    """Seconds until the validation accuracies first reach their marks, plain and fused."""
    heads = {f"{head} ≥ {100 * least:.0f} %": (head, least) for head, least in MARKS.items()}
    lines = [
        f"| | {' | '.join(f'{name}, s' for name in heads)} | images/s |",
        f"|---|{'---:|' * (1 + len(heads))}",
    ]
    medians: dict[str, list[float]] = {}
    for name, fused in (("PyTorch", False), ("fused", True)):
        runs = [r for r in records if r["results"]["fused"] is fused]
        if not runs:
            continue
        reached = [[_seconds_to(r, *mark) for r in runs] for mark in heads.values()]
        rate = median(r["results"]["images_per_second"] for r in runs)
        medians[name] = [*map(_median, reached), rate]
        cells = [_reached(seconds) for seconds in reached]
        lines.append(f"| {name} | {' | '.join(cells)} | {rate:.0f} |")
    if len(medians) == 2:
        *seconds, rate = zip(*medians.values(), strict=True)
        ratios = [*(plain / fused for plain, fused in seconds), rate[1] / rate[0]]
        cells = ["–" if math.isnan(ratio) else f"×{ratio:.2f}" for ratio in ratios]
        lines.append(f"| faster | {' | '.join(cells)} |")
    seeds, results = len({r["results"]["seed"] for r in records}), records[0]["results"]
    lines.append(
        f"\n{results['dataset']}, {results['labels']} labels: seconds spent in training steps until "
        f"the validation accuracy of each head is first reached; medians over {seeds} seeds, in brackets "
        f"the least and the most. {_hardware(records)}."
    )
    return "\n".join(lines)


def _seconds_to(record: dict[str, Any], head: str, least: float) -> float:
    """When the accuracy first was at least that; infinity if never."""
    rows = (r for r in record["curve"] if r[f"validation_{head}_accuracy"] >= least)
    return min((r["step_seconds"] for r in rows), default=math.inf)


def _median(seconds: list[float]) -> float:
    """NaN unless every run got there."""
    return math.nan if math.inf in seconds else median(seconds)


def _reached(seconds: list[float]) -> str:
    missed = sum(math.isinf(s) for s in seconds)
    if missed:
        return f"not in {missed} of {len(seconds)} runs"
    return f"{median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"


def _of_kernels(table: Callable[[Any], str]) -> Callable[[list[dict[str, Any]]], str]:
    def of_only(records: list[dict[str, Any]]) -> str:
        return table(records[0])

    return of_only


TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], str], tuple[str, ...]]] = {
    "digits-ablation": (digits_ablation, ("digits-ablation",)),
    "pinwheel-bridges": (pinwheel_bridges, ("pinwheel-bridges",)),
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
    "time-to-accuracy": (time_to_accuracy, ("time-to-accuracy",)),
    "dispatch-cpu": (_of_kernels(step_tables.dispatch), ("dispatch-cpu",)),
} | {
    f"{source}-{device}{name}": (_of_kernels(table), (f"{source}-{device}",))
    for device in ("cpu", "cuda")
    for source, name, table in (
        ("step", "", step_tables.steps),
        ("step", "-phases", step_tables.phases),
        ("startup", "", step_tables.startup),
    )
}
PICTURES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    f"{name}-{device}": (picture, tuple(f"{source}-{device}" for source in sources))
    for device in ("cpu", "cuda")
    for name, picture, sources in (
        ("kernels", kernel_tables.picture, ("kernels",)),
        ("step", pictures.waterfall, ("step",)),
        ("scaling", pictures.scaling, ("scaling",)),
    )
} | {
    "pinwheel-bridges": (pictures.bridges, ("pinwheel-bridges",)),
    "roofline-cpu": (pictures.roofline, ("kernels-cpu", "flows-cpu", "conditioners-cpu")),
}
"""By name: what draws it from the contents of its results files, a path and their digest."""


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
    """Pictures that do not show their results files, and the digest of these.

    A picture one of whose files does not exist is none.
    """
    found = {}
    for name, (_, sources) in PICTURES.items():
        files, picture = [results / f"{source}.json" for source in sources], results / f"{name}.png"
        if all(file.exists() for file in files):
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            if not picture.exists() or png_text(picture.read_bytes()).get("Source") != digest:
                found[picture] = digest
    return found


def draw(picture: Path, digest: str) -> None:
    """Make a picture anew from the results files beside it."""
    function, sources = PICTURES[picture.stem]
    files = (picture.with_name(f"{source}.json") for source in sources)
    function(*(json.loads(file.read_text()) for file in files), picture, digest)


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
        draw(picture, digest)


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
