"""Tables of training runs, from the records that training.py writes."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.training import BEST

__all__ = ["ablation", "best", "bridges", "published", "small_runs", "sweeps", "time_to_accuracy"]

MARKS = {"flow": 0.90, "discriminator": 0.95}
ROW_NAMES = {
    "supervised": "supervised only",
    "nll": "+ likelihood",
    "nll+adversarial": "+ likelihood, adversarial",
    "full": "full: + pseudo-labels",
    "flowgmm": "FlowGMM (baseline)",
    "flowgmm+consistency": "FlowGMM + consistency (baseline)",
    "fm-gan": "feature matching (baseline)",
}


def ablation(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a row per objective."""
    lines = [
        "| objective | flow, % | discriminator, % | bits/dim |",
        "|---|---|---|---|",
    ]
    for row, name in ROW_NAMES.items():
        runs = [r["results"] for r in records if r["results"]["objective"] == row]
        if not runs:
            continue
        lines.append(f"| {name} | {_accuracies(runs)} |")
    return "\n".join(lines) + _ending(records)


def best(records: list[dict[str, Any]]) -> str:
    """The best recipe of the digits, by number of labels, and without each of its parts."""
    lines = [
        "| recipe | labels | flow, % | discriminator, % | bits/dim |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, changed in BEST.items():
        own = [r for r in records if _changes(r) == changed]
        for labels in sorted({r["results"]["labels"] for r in own}, reverse=True):
            runs = [r["results"] for r in own if r["results"]["labels"] == labels]
            lines.append(f"| {name} | {labels} | {_accuracies(runs)} |")
    return "\n".join(lines) + _ending(records)


def _changes(record: dict[str, Any]) -> list[str]:
    """What a run of the best recipe was told beside preset, labels and seed."""
    pairs = zip(record["arguments"][1::2], record["arguments"][2::2], strict=True)
    own = ("--preset", "--labels", "--seed")
    return [word for pair in pairs if pair[0] not in own for word in pair]


def sweeps(records: list[dict[str, Any]]) -> str:
    """A row per value of each option that was swept."""
    lines = [
        "| option | value | flow, % | discriminator, % | bits/dim |",
        "|---|---:|---:|---:|---:|",
    ]
    by_value: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        _, option, value, *_ = record["arguments"]
        by_value.setdefault((option, value), []).append(record["results"])
    for (option, value), runs in by_value.items():
        lines.append(f"| `{option}` | {value} | {_accuracies(runs)} |")
    return "\n".join(lines) + _ending(records)


def bridges(records: list[dict[str, Any]]) -> str:
    """Mass between the arms, a row per objective, and that of the data."""
    lines = [
        "| objective | between two classes, % | of a class, % | flow, % | discriminator, % |",
        "|---|---|---|---|---|",
    ]
    for row, name in ROW_NAMES.items():
        runs = [r for r in records if r["results"]["objective"] == row]
        if not runs:
            continue
        masses = (
            _spread([100 * r["bridges"][f"mass_between_arms{which}"] for r in runs], 1)
            for which in ("_at_boundary", "")
        )
        accuracies = (
            _spread([100 * r["results"][f"{head}_accuracy"] for r in runs], 1) for head in MARKS
        )
        lines.append(f"| {name} | {' | '.join((*masses, *accuracies))} |")
    data = mean(100 * r["bridges"]["mass_between_arms_of_data"] for r in records)
    lines.append(f"| new data | | {data:.1f} | | |")
    seeds, results = len({r["results"]["seed"] for r in records}), records[0]["results"]
    lines.append(
        f"\n{results['dataset']}, {results['labels']} labels, {results['steps']} steps: share of the samples "
        "halfway between two classes (β = 0.5), and of those of a class, that lie where the data have "
        f"nothing; mean ± standard deviation over {seeds} seeds. {_hardware(records)}."
    )
    return "\n".join(lines)


_CITED = (
    ("thesis: flow / discriminator", "99.1 / 99.1", "93.2 / 94.0", "73.6 / 81.9"),
    ("FlowGMM, as the thesis ran it", "91.7", "67.2", "42.1"),
    ("FlowGMM, as published (MNIST: 1000 labels)", "98.9", "82.4", "78.2"),
    ("FlowGMM + consistency, as published (MNIST: 1000 labels)", "99.0", "86.4", "80.9"),
    ("Improved GAN (feature matching)", "99.07", "91.9", "81.4"),
    ("Bad GAN", "99.2", "95.75", "85.6"),
    ("FixMatch", "–", "96–97", "95.7"),
)


def published(records: list[dict[str, Any]]) -> str:
    """What we measured beside what others published."""
    lines = [
        "| | MNIST, 100 labels | SVHN, 1000 | CIFAR-10, 4000 | |",
        "|---|---:|---:|---:|---|",
    ]
    if records:
        runs = [record["results"] for record in records]
        heads = " / ".join(
            _spread([100 * r[f"{head}_accuracy"] for r in runs], 1) for head in MARKS
        )
        processors = (record["threads"] for record in records)
        told = [
            f"{r['seconds'] / 60:.0f} minutes on {n} processor{'s' * (n > 1)} (split of seed {r['seed']})"
            for r, n in zip(runs, processors, strict=True)
        ]
        lines.append(
            f"| **`mnist-small`: flow / discriminator** | {heads} | not yet measured | not yet measured "
            f"| measured, no GPU: {', '.join(told)} |"
        )
    lines += [f"| {' | '.join(row)} | cited; other splits |" for row in _CITED]
    lines.append(
        "\nTest accuracy, %. Cited figures are those of the thesis and of the papers below, means over "
        "label splits of their own; networks and hours of training differ."
    )
    return "\n".join(lines)


def small_runs(records: list[dict[str, Any]]) -> str:
    """A row per run of the -small presets."""
    lines = [
        "| data, labels | seed | steps | minutes | flow, % | discriminator, % | bits/dim | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        r = record["results"]
        lines.append(
            f"| {r['dataset']}, {r['labels']} | {r['seed']} | {r['steps']} | {r['seconds'] / 60:.1f} "
            f"| {100 * r['flow_accuracy']:.1f} | {100 * r['discriminator_accuracy']:.1f} "
            f"| {r['bits_per_dim']:.2f} | {r['images_per_second']:.0f} |"
        )
    lines.append(f"\nTest accuracy at the last step. {_hardware(records)}.")
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


def _accuracies(runs: Sequence[Mapping[str, Any]]) -> str:
    """Cells of both heads' accuracy and of the likelihood, over the seeds."""
    return " | ".join(
        (
            _spread([100 * r["flow_accuracy"] for r in runs], 1),
            _spread([100 * r["discriminator_accuracy"] for r in runs], 1),
            _spread([r["bits_per_dim"] for r in runs], 2),
        )
    )


def _ending(records: Sequence[dict[str, Any]]) -> str:
    runs = Counter(" ".join(r["arguments"][:-1]) for r in records)  # the last word is the seed
    fewest, most = min(runs.values()), max(runs.values())
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    minutes = mean(r["results"]["seconds"] for r in records) / 60
    return (
        f"\n\nTest accuracy at the last step, mean ± standard deviation over {seeds} seeds; "
        f"{minutes:.1f} minutes a run. {_hardware(records)}."
    )


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; of a single run its value."""
    of_one = f"{mean(values):.{digits}f}"
    return f"{of_one} ± {stdev(values):.{digits}f}" if len(values) > 1 else of_one


def _hardware(records: Sequence[dict[str, Any]]) -> str:
    """Processor, threads and versions, named once where all records agree."""
    found = []
    for record in records:
        versions, threads = record["results"]["versions"], record["threads"]
        text = f"{record['processor']}, {threads} thread{'s' * (threads > 1)}, torch {versions['torch']}"
        if text not in found:
            found.append(text)
    return "; ".join(found)
