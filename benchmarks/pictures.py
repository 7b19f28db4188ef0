"""Pictures of the training step, of cost against size, of the machine's limits, and of samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.kernel_tables import _milliseconds, _where
from benchmarks.kernels import speed_up
from benchmarks.step_tables import best_eager, cases, stages
from benchmarks.workloads import FLOWS

__all__ = ["bridges", "roofline", "scaling", "waterfall"]

Row = Mapping[str, Any]
Results = Mapping[str, Any]

# Colours that the colour-blind tell apart; markers and dashes differ as well.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#4477aa", "#ee8833", "#228833", "#aa3377"
_STAGES = {
    "eager": _BLUE,
    "channels-last": "#66ccee",
    "elementwise kernels": "#ccbb44",
    "conditioner kernels": _ORANGE,
    "CUDA graph": _PURPLE,
}
_VARIANTS = {
    "eager": (_BLUE, "o", "-"),
    "compile": (_GREEN, "^", "--"),
    "fused": (_ORANGE, "s", "-"),
    "fused, constant memory": (_PURPLE, "D", "-."),
}


@contextmanager
def _figure(path: Path, source: str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, written when left; `source` goes into the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    yield figure, axes
    figure.savefig(path, dpi=130, metadata={"Source": source})
    pyplot.close(figure)


# --- waterfall -----------------------------------------------------------------------------------


def waterfall(results: Results, path: Path, source: str) -> None:
    """A panel per data set: ms of a step after each technique, and the factor that it brought."""
    found = {case: stages(variants) for case, variants in cases(results).items()}
    names = [name for name in _STAGES if any(name in of_case for of_case in found.values())]
    size = (2.6 * len(found) + 1.4, 0.42 * len(names) + 1.3)
    with _figure(path, source, ncols=len(found), figsize=size, sharey=True) as (figure, axes):
        for axis, ((data, batch), of_case) in zip(axes[0], found.items(), strict=True):
            _falling(axis, of_case, names)
            axis.set_title(f"{data}, {batch} images", fontsize=10)
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].invert_yaxis()
        figure.supxlabel("ms of a training step, and × from one to the next", fontsize=9)
        figure.suptitle(
            f"The hybrid step, {results['precision']}, technique by technique: {_where(results)}",
            fontsize=11,
        )


def _falling(axis: Any, of_case: Mapping[str, Row], names: Sequence[str]) -> None:
    """Bars as long as the step takes; pale what the technique took away."""
    longest = max(row["us"][1] for row in of_case.values()) / 1e3
    before: Row | None = None
    for name, row in of_case.items():
        y, ms = names.index(name), row["us"][1] / 1e3
        axis.barh(y, ms, height=0.66, color=_STAGES[name])
        end, factor = ms, ""
        if before is not None:
            ratio = speed_up(row, before)
            factor = "  wrong" if ratio is None else f"  ×{ratio[1]:.2f}"
            if ratio is not None and ratio[1] > 1:
                end = before["us"][1] / 1e3
                axis.barh(y, end - ms, left=ms, height=0.66, color=_STAGES[name], alpha=0.25)
        axis.text(end + 0.02 * longest, y, f"{_milliseconds(row)}{factor}", va="center", fontsize=8)
        before = before if row["problems"] else row
    axis.set_xlim(0, 1.65 * longest)
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="x", color="0.92")


# --- cost against size ---------------------------------------------------------------------------

_AXES = {"batch": "images in a batch", "couplings": "couplings", "size": "height and width, pixels"}
_COSTS: dict[str, Callable[[Row], float | None]] = {
    "images/s": lambda row: row.get("images_per_second"),
    "peak memory, MB": lambda row: row["peak_bytes"] / 1e6 if "peak_bytes" in row else None,
    "first call, s": lambda row: row.get("first_call_seconds"),
}


def scaling(results: Results, path: Path, source: str) -> None:
    """Rows: throughput, peak memory, first call; columns: batch, couplings, image; all logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    options = {"nrows": len(_COSTS), "ncols": len(_AXES), "sharex": "col", "sharey": "row"}
    with _figure(path, source, figsize=(10, 8), **options) as (figure, axes):
        for line, (title, cost) in zip(axes, _COSTS.items(), strict=True):
            for axis, name in zip(line, _AXES, strict=True):
                ticks = _curves(axis, results["rows"], name, cost)
                axis.set_xscale("log")
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
                axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.grid(color="0.92")
            line[0].set_ylabel(title)
        for axis, label in zip(axes[-1], _AXES.values(), strict=True):
            axis.set_xlabel(label)
        handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
        shown = {n: handles[n] for n in _VARIANTS if n in handles}
        if "failed" in handles:
            shown["too slow or out of memory"] = handles["failed"]
        figure.legend(
            shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False
        )
        base = next(row for row in results["rows"] if row["axis"] == "base")
        sizes = f"{base['batch']} images of {base['size']}², {base['couplings']} couplings"
        figure.suptitle(
            f"Likelihood, forward + backward, around {sizes}, hidden {base['hidden']}\n"
            f"{_where(results)}",
            fontsize=11,
        )


def _curves(
    axis: Any, rows: Sequence[Row], name: str, cost: Callable[[Row], float | None]
) -> list[int]:
    """A curve per variant; a cross at the foot where it failed. Returns the sizes."""
    of_axis = [row for row in rows if row["axis"] in ("base", name)]
    for variant, (colour, marker, dashes) in _VARIANTS.items():
        points = sorted((r for r in of_axis if r["variant"] == variant), key=lambda r: r[name])
        right = [r for r in points if cost(r) is not None and not r.get("problems")]
        if right:
            values = [cost(r) for r in right]
            style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4}
            axis.plot([r[name] for r in right], values, label=variant, linewidth=1.4, **style)
        for row in points:
            if "failed" in row:
                place = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                style = {"color": colour, "marker": "x", "linestyle": "none"}
                axis.plot([row[name]], [0.03], label="failed", **style, **place)
    return sorted({row[name] for row in of_axis})


# --- roofline ------------------------------------------------------------------------------------


def roofline(
    kernels: Results, flows: Results, conditioners: Results, path: Path, source: str
) -> None:
    """Rates of whole flows and of single conditioners beside those of a copy and of a product.

    Each panel names its machine and has that one's product; the copy's is named if it is another. The
    intensity counts the least traffic, a kernel per coupling, for all variants: eager's lies lower for
    moving more than that, and for its rate of arithmetic.
    """
    copy = kernels["copy"]["gb_s"]
    panels = {
        "whole flows": (flows, list(_of_flows(flows))),
        "conditioners alone": (conditioners, list(_of_conditioners(conditioners))),
    }
    size = (10.4, 4.6)
    with _figure(path, source, ncols=len(panels), figsize=size, sharey=True) as (figure, axes):
        for axis, (title, (results, points)) in zip(axes[0], panels.items(), strict=True):
            product = max(row["matmul_gflop_s"] for row in results["rows"])
            where = "" if _where(kernels) == _where(results) else f" ({_where(kernels)})"
            _roofs(axis, [x for x, *_ in points], copy, product, where)
            _points(axis, points)
            axis.set_title(f"{title}: {_where(results)}", fontsize=10)
            axis.set_xlabel("FLOP per byte moved, at least")
        axes[0][0].set_ylabel("GFLOP/s")
        figure.suptitle("How far the machine's limits are", fontsize=11)


Point = tuple[float, str, dict[str, float]]  # FLOP per byte, name, GFLOP/s by variant


def _of_flows(results: Results) -> Iterator[Point]:
    for workload in FLOWS:
        for task in ("likelihood", "sampling"):
            variants = {
                row["variant"]: row
                for row in results["rows"]
                if (row["data"], row["task"]) == (workload.data, task)
                and row["batch"] == workload.batch
            }
            if variants:
                intensity = workload.flops(task) / workload.traffic(task)
                yield intensity, f"{workload.data}, {task}", _rates(variants)


def _of_conditioners(results: Results) -> Iterator[Point]:
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in results["rows"]:
        key = tuple(row[k] for k in ("data", "batch", "channels", "size", "hidden"))
        shapes.setdefault(key, {})[row["variant"]] = row
    for (data, batch, channels, size, hidden), variants in shapes.items():
        if data not in {workload.data for workload in FLOWS}:
            continue
        row = variants["fused"]
        weights = 9 * hidden * (channels // 2 + channels)
        # a twice and its gradient, params and their gradient, weights twice and their gradient
        moved = 4 * (batch * size**2 * (3 * channels // 2 + 2 * channels) + 3 * weights)
        flops = row["gflop_s"] * row["us"][1] * 1e3
        yield flops / moved, data, _rates(variants)


def _rates(variants: Mapping[str, Row]) -> dict[str, float]:
    """Of the better eager one and of the fused one, if right."""
    rates = {"eager": best_eager(variants)["gflop_s"]}
    fused = variants.get("fused")
    return rates | ({"fused": fused["gflop_s"]} if fused and not fused["problems"] else {})


def _roofs(
    axis: Any, intensities: Sequence[float], copy: float, product: float, where: str
) -> None:
    """The lines; `where` is added to the label of the copy."""
    ends = [0.4 * min([*intensities, product / copy]), 1.7 * max([*intensities, product / copy])]
    corner = product / copy
    axis.plot([ends[0], corner, ends[1]], [copy * ends[0], product, product], "k-", linewidth=1)
    axis.text(
        ends[1],
        1.04 * product,
        f"product of matrices, {product:.0f} GFLOP/s",
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(ends)
    middle = (ends[0] * corner) ** 0.5
    axis.text(1.1 * middle, copy * middle, f"copy, {copy:.0f} GB/s{where}", fontsize=8, va="top")
    axis.grid(color="0.92", which="both")


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _points(axis: Any, points: Sequence[Point]) -> None:
    """A line from the eager to the fused rate; its marker says which data."""
    names = list(dict.fromkeys(name for _, name, _ in points))
    colours = {"eager": _BLUE, "fused": _ORANGE}
    for x, name, rates in points:
        axis.plot([x] * len(rates), list(rates.values()), color="0.8", linewidth=1, zorder=1)
        for variant, rate in rates.items():
            marker = _MARKERS[names.index(name) % len(_MARKERS)]
            axis.plot(x, rate, marker, color=colours[variant], markersize=6)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="s", linestyle="", color=c, label=v) for v, c in colours.items()
    ]
    handles += [
        Line2D([], [], marker=_MARKERS[i % len(_MARKERS)], linestyle="", color="0.4", label=name)
        for i, name in enumerate(names)
    ]
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="lower left", ncols=1)


# --- samples in the plane ------------------------------------------------------------------------


def bridges(records: Sequence[Row], path: Path, source: str) -> None:
    """Samples of each class and, below, between two classes: a column per objective, of the first seed;
    data beside them."""
    from hybridflow.data import load_dataset

    seed = records[0]["results"]["seed"]
    shown = [r for r in records if r["results"]["seed"] == seed]
    dataset = load_dataset(shown[0]["results"]["dataset"])
    count = len(_points_of(shown[0]["samples"][0]))
    data = [dataset.test_x[dataset.test_y == k][:count] for k in range(dataset.classes)]
    options = {"nrows": 2, "ncols": 1 + len(shown), "sharex": True, "sharey": True}
    with _figure(path, source, figsize=(3.1 * (1 + len(shown)), 6.6), **options) as (figure, axes):
        _plane(axes[0][0], "data", data)
        axes[1][0].set_axis_off()
        for (above, below), record in zip(axes.T[1:], shown, strict=True):
            found = {name: f"{100 * value:.1f} %" for name, value in record["bridges"].items()}
            title = (
                f"{record['results']['objective']}: {found['mass_between_arms']} between the arms"
            )
            _plane(above, title, [_points_of(text) for text in record["samples"]])
            title = f"between two classes: {found['mass_between_arms_at_boundary']}"
            _plane(below, title, [_points_of(record["boundary_samples"])], color="0.3")
        figure.suptitle(f"{dataset.name}: samples of each class, seed {seed}", fontsize=11)


def _plane(axis: Any, title: str, classes: Sequence[Any], **options: Any) -> None:
    for points in classes:
        axis.scatter(*points.T, s=6, alpha=0.7, linewidths=0, **options)
    axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    axis.set_title(title, fontsize=9)


def _points_of(text: str) -> Any:
    """Points (N, 2) from their coordinates in turn."""
    import numpy as np

    return np.array(text.split(), dtype=float).reshape(-1, 2)
