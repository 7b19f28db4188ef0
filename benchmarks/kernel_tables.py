"""Tables and picture of what the commands beside this file write: kernels, conditioners, flows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import speed_up

__all__ = ["conditioners", "flows", "memory", "models", "operations", "picture", "priors"]

Row = Mapping[str, Any]
Results = Mapping[str, Any]

_HIGH = "fused, high"
_IN_HIGH = (
    "In `high` each number in products is the sum of two of bfloat16, by AMX; it is compared with eager and "
    "compiled in float32, which do not change. "
)
_ALONE = "log_prob alone"  # the rows of gmm_log_prob that other libraries stand beside
_TICKS = {False: (0.5, 1, 2, 5, 10, 20), True: (0.3, 1, 3, 10, 30, 100)}
_COLOURS = {"eager": "#4477aa", "compile": "#ee8833"}


# --- tables --------------------------------------------------------------------------------------


def operations(results: Results) -> str:
    """A row per operation, shape and type: times, and how many times faster the fused one is."""
    lines = [
        "| operation | shape | eager, ms | compiled, ms | fused, ms | × eager | × compiled | of a copy |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variants in _cases(results):
        fused = variants["fused"]
        if fused["note"] == _ALONE:
            continue
        baselines = [variants.get(name) for name in _COLOURS]
        times = (_milliseconds(row) for row in (*baselines, fused))
        ratios = (_ratio(fused, row) for row in baselines)
        share = f"{fused['of_copy']:.0%}".replace("%", " %")
        cells = [_name(fused), _shape(fused), *times, *ratios, share]
        lines.append(f"| {' | '.join(cells)} |")
    copy = results["copy"]["gb_s"]
    lines.append(
        "\nMedians of one call, forward and backward (`actnorm_statistics` and `dequantize_logit`: "
        "forward). The last column is the rate of the bytes that the operation has to move, as a share "
        f"of what a copy of {results['copy']['bytes'] / 2e6:.0f} MB reaches ({copy:.0f} GB/s); more than "
        "all of it where the backward finds in the cache what the forward left there. "
        f"{_circumstances(results)}"
    )
    return "\n".join(lines)


def priors(results: Results) -> str:
    """The mixture's likelihood beside other libraries'."""
    variants = next(v for v in _cases(results) if v["fused"]["note"] == _ALONE)
    lines = ["| log p(z), forward + backward | ms | hybridflow is faster, × |", "|---|---:|---:|"]
    for name, row in sorted(variants.items(), key=lambda item: item[1]["us"][1]):
        factor = "" if name == "fused" else _ratio(variants["fused"], row)
        lines.append(f"| {_VARIANTS.get(name, name)} | {_milliseconds(row)} | {factor} |")
    batch, size = variants["fused"]["shape"]
    lines.append(
        f"\n{batch} points, {size} dimensions, 10 components; gradients of points and means. "
        "FlowGMM's way, K full covariances built in each call, is written anew here; the others are the "
        "libraries' own, with unit scales."
    )
    return "\n".join(lines)


def conditioners(results: Results) -> str:
    """Convolutional conditioners, a row per shape: times, how many times faster, the rate, and the times
    in bfloat16 where they were measured."""
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in results["rows"]:
        key = tuple(row[k] for k in ("data", "batch", "channels", "size", "hidden"))
        shapes.setdefault(key, {})[row["variant"]] = row
    high = any(_HIGH in variants for variants in shapes.values())
    narrow = any(_in_bf16(variants) for variants in shapes.values())
    columns = ["eager, ms", "compiled, ms", "fused, ms", "× eager", "× compiled", "GFLOP/s"]
    columns += ["of a product's", *(["high: fused, ms", "× eager", "× compiled"] * high)]
    columns += ["bf16: eager, ms", "fused, ms", "× eager"] * narrow
    lines = [
        f"| data | batch × channels × size², hidden | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for (data, batch, channels, size, hidden), variants in shapes.items():
        fused, compiled, eager = variants["fused"], variants["compile"], _eager(variants)
        cells = [data, f"{batch}×{channels}×{size}², {hidden}"]
        cells += [_milliseconds(row) for row in (eager, compiled, fused)]
        cells += [_ratio(fused, row) for row in (eager, compiled)]
        share = f"{fused['gflop_s'] / fused['matmul_gflop_s']:.0%}".replace("%", " %")
        cells += [f"{fused['gflop_s']:.0f}", share]
        cells += _in_high(variants) if high else []
        if of_bf16 := _in_bf16(variants):
            fused, eager = of_bf16["fused"], _eager(of_bf16)
            cells += [_milliseconds(eager), _milliseconds(fused), _ratio(fused, eager)]
        lines.append(f"| {' | '.join(cells)} |")
    bf16 = (
        "In bfloat16 the products alone are narrow, by AMX; eager is PyTorch under autocast. "
        if narrow
        else ""
    )
    lines.append(
        "\nMedians of forward and backward; eager is the better of contiguous and channels-last. The rate "
        "counts three times two 3×3 convolutions, as if no tap fell outside of the image and nothing were "
        "computed twice; its share is of PyTorch's product of 1024×1024 matrices, measured before each row. "
        f"{_IN_HIGH * high}{bf16}{_hardware(results)}."
    )
    return "\n".join(lines)


def _in_high(variants: Mapping[str, Row]) -> list[str]:
    """Cells: the time of the fused variant with such products, and how many times faster it is."""
    row = variants.get(_HIGH)
    if row is None:
        return [""] * 3
    return [
        _milliseconds(row),
        *(_ratio(row, v) for v in (_eager(variants), variants.get("compile"))),
    ]


def _in_bf16(variants: Mapping[str, Row]) -> dict[str, Row]:
    suffix = ", bf16"
    return {n.removesuffix(suffix): row for n, row in variants.items() if n.endswith(suffix)}


def flows(results: Results) -> str:
    """Whole flows and steps, a row per data set and task: times, speed-ups, rate, peak memory."""
    high = any(row["variant"] == _HIGH for row in results["rows"])
    columns = ["eager, ms", "compiled, ms", "fused, ms", "× eager", "× compiled"]
    columns += ["high: fused, ms", "× eager", "× compiled"] * high
    columns += ["of a product's rate", "memory, MB: eager", "fused", "constant"]
    lines = [
        f"| data, batch | task | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in results["rows"]:
        key = tuple(row[k] for k in ("data", "batch", "task"))
        cases.setdefault(key, {})[row["variant"]] = row
    for (data, batch, task), variants in cases.items():
        fused, compiled, eager = variants["fused"], variants.get("compile"), _eager(variants)
        times = (_milliseconds(row) for row in (eager, compiled, fused))
        ratios = (_ratio(fused, row) for row in (eager, compiled))
        lean = variants.get("fused, constant memory")
        peaks = (_megabytes(row) for row in (eager, fused, lean))
        cells = [f"{data}, {batch}", task, *times, *ratios, *(_in_high(variants) if high else [])]
        cells += [_share(fused), *peaks]
        lines.append(f"| {' | '.join(cells)} |")
    modes = sorted({r["mode"] for r in results["rows"] if r["variant"] == "compile"})
    compiled_by = f", by `torch.compile(mode={modes[0]!r})`" if modes else ""
    lines.append(
        f"\nMedians, in {results.get('precision', 'fp32')}; eager is the better of contiguous and "
        f"channels-last; compiled{compiled_by}. {_IN_HIGH * high}The rate "
        "counts the convolutions as the table of conditioners does, beside PyTorch's product of 1024×1024 "
        "matrices. Memory is the most that lives at one moment of the task, parameters and inputs not "
        "counted; `constant` keeps the activations of one coupling. The step is that of the preset, with "
        f"its own batch. {_hardware(results)}."
    )
    return "\n".join(lines)


def _eager(variants: Mapping[str, Row]) -> Row:
    """PyTorch's better memory format, in float32."""
    rows = [variants[name] for name in ("eager", "eager, channels-last") if name in variants]
    return min(rows, key=lambda row: row["us"][1])


def _megabytes(row: Row | None) -> str:
    peak = None if row is None else row.get("peak_bytes")
    return "" if peak is None else _three_digits(peak / 1e6)


def _share(row: Row) -> str:
    rate = row.get("gflop_s")
    return "" if rate is None else f"{rate / row['matmul_gflop_s']:.0%}".replace("%", " %")


def _hardware(results: Results) -> str:
    machine = results["machine"]
    return (
        f"{_where(results)}, torch {machine['versions']['torch']}, "
        f"commit {(results['commit'] or 'unknown')[:10]}"
    )


def models(results: Results) -> str:
    """Other libraries' models before and after `fuse`."""
    lines = [
        "| library | before, ms | after, ms | × faster | layers swapped | largest difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    found: dict[str, dict[str, Row]] = {}
    for row in results["models"]:
        found.setdefault(row["library"], {})[row["variant"]] = row
    for library, variants in found.items():
        before, after = variants["eager"], variants["fused"]
        version = results["machine"]["versions"].get(library) or ""
        times = f"{_milliseconds(before)} | {_milliseconds(after)}"
        lines.append(
            f"| {library} {version} | {times} | {_ratio(after, before)} | {after['swapped']} "
            f"| {after['error']:.0e} |"
        )
    batch, size = results["models"][0]["shape"]
    lines.append(
        f"\nEight couplings on ({batch}, {size}) inputs, conditioners with two hidden layers of 64 "
        "units; log-likelihood and all its gradients, which differ from the unfused model's by the last "
        "column at most (relative)."
    )
    return "\n".join(lines)


def memory(results: Results) -> str:
    """Peak memory of 8 and 48 couplings."""
    peaks: dict[str, dict[int, Row]] = {}
    for row in results["memory"]:
        peaks.setdefault(row["variant"], {})[row["couplings"]] = row
    lines = [
        "| | 8 couplings, MB | 48 couplings, MB | ratio | 48 couplings, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant, rows in peaks.items():
        few, many = rows[8], rows[48]
        wrong = bool(few["problems"] or many["problems"])
        ratio = "wrong" if wrong else f"{many['peak_bytes'] / few['peak_bytes']:.2f}"
        sizes = f"{few['peak_bytes'] / 1e6:.1f} | {many['peak_bytes'] / 1e6:.1f}"
        lines.append(f"| {variant} | {sizes} | {ratio} | {_milliseconds(many)} |")
    first = results["memory"][0]
    shape = "×".join(map(str, first["shape"]))
    lines.append(
        f"\nMost memory that a training step of {shape}, hidden {first['hidden']}, allocates at one "
        "moment, beside the parameters, their gradients and the batch."
    )
    return "\n".join(lines)


_VARIANTS = {"eager": "plain PyTorch", "compile": "torch.compile", "fused": "**hybridflow**"}


def _cases(results: Results) -> list[dict[str, Row]]:
    """Variants by name, for each case that has a fused one, an operation's own beside one another.

    On a GPU as replayed from CUDA graphs, where they are.
    """
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(results["ops"], key=lambda r: r["launch"] == "graph"):
        key = (row["op"], row["note"], tuple(row["shape"]), row["dtype"])
        cases.setdefault(key, {})[row["variant"]] = row
    found = [variants for variants in cases.values() if "fused" in variants]
    order = list(dict.fromkeys(v["fused"]["op"] for v in found))
    return sorted(
        found,
        key=lambda v: (
            order.index(v["fused"]["op"]),
            bool(v["fused"]["note"]),
            v["fused"]["dtype"] != "float32",
        ),
    )


def _name(row: Row) -> str:
    parts = [f"`{row['op']}`", row["note"], row["dtype"] if row["dtype"] != "float32" else ""]
    return ", ".join(filter(None, parts))


def _shape(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def _milliseconds(row: Row | None) -> str:
    return "–" if row is None else _three_digits(row["us"][1] / 1e3)


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(row: Row, over: Row | None) -> str:
    """The speed-up; a word instead where a variant is wrong."""
    if over is None:
        return "–"
    ratio = speed_up(row, over)
    if ratio is None:
        return "wrong"
    return (
        f"{ratio[1]:.2f}"
        if ratio[1] < 10
        else f"{ratio[1]:.1f}"
        if ratio[1] < 100
        else f"{ratio[1]:.0f}"
    )


def _circumstances(results: Results) -> str:
    load, commit = results["load"], (results["commit"] or "unknown")[:10]
    versions = results["machine"]["versions"]
    return (
        f"{_where(results)}, torch {versions['torch']}, commit {commit}; other processes took "
        f"{load['others']:.0%} of the machine.".replace("%", " %")
    )


def _where(results: Results) -> str:
    machine = results["machine"]
    if gpu := machine.get("gpu"):
        return str(gpu["name"])
    threads = machine["threads"]
    return f"{machine['processor']}, {threads} thread{'s' * (threads > 1)}"


# --- picture -------------------------------------------------------------------------------------


def picture(results: Results, path: Path, source: str) -> None:
    """Speed-ups over eager and compiled PyTorch as bars, a panel per shape; `source` goes into the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    cases = [v for v in _cases(results) if not v["fused"]["note"]]
    panels = _panels(cases)
    labels = list(dict.fromkeys(_label(v["fused"]) for v in cases))
    ratios = (speed_up(v["fused"], v.get(name)) or [1] for v in cases for name in _COLOURS)
    ends = [end for ratio in ratios for end in ratio]
    limits = max(0.3, min(0.6, 0.9 * min(ends))), min(150, 2 * max(2, *ends))  # room for figures
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(3.1 * len(panels) + 2.2, 0.42 * len(labels) + 1.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        _bars(axis, title, rows, labels)
        axis.set_xlim(limits)
        axis.set_xticks([t for t in _TICKS[limits[1] > 25] if limits[0] <= t <= limits[1]])
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    keys = [Patch(color=c, label=f"faster than {_VARIANTS[n]}") for n, c in _COLOURS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"hybridflow.kernels, forward + backward: {_where(results)}", fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Source": source})
    pyplot.close(figure)


def _panels(cases: Sequence[dict[str, Row]]) -> dict[str, list[dict[str, Row]]]:
    """By shape; a shape with its positions flattened belongs to that with positions."""
    shapes = list(dict.fromkeys(tuple(v["fused"]["shape"]) for v in cases))
    whole = {_elements(shape): shape for shape in sorted(shapes, key=len)}
    panels: dict[str, list[dict[str, Row]]] = {}
    for variants in cases:
        shape = whole[_elements(tuple(variants["fused"]["shape"]))]
        panels.setdefault("×".join(map(str, shape)), []).append(variants)
    return panels


def _elements(shape: tuple[int, ...]) -> tuple[int, int]:
    size = 1
    for length in shape[1:]:
        size *= length
    return shape[0], size


def _label(row: Row) -> str:
    return row["op"] + (" (bf16)" if row["dtype"] == "bfloat16" else "")


def _bars(axis: Any, title: str, cases: Sequence[dict[str, Row]], labels: Sequence[str]) -> None:
    """One panel: from 1 to the median, with whiskers from the least to the most favourable."""
    for variants in cases:
        fused = variants["fused"]
        for offset, (name, colour) in zip((-0.19, 0.19), _COLOURS.items(), strict=True):
            ratio = speed_up(fused, variants.get(name))
            if ratio is None:
                continue
            low, middle, high = ratio
            y = labels.index(_label(fused)) + offset
            axis.barh(y, middle - 1, left=1, height=0.36, color=colour)
            axis.plot([low, high], [y, y], color="0.25", linewidth=1)
            figure = f"{middle:.1f}" if middle >= 1 else f"{middle:.2f}"
            axis.text(max(high, 1) * 1.06, y, figure, va="center", fontsize=7, clip_on=True)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.xaxis.minorticks_off()
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)
