"""Pictures of runs, as PNG files: samples, latents, paths, confusion matrices, curves.

Every function draws on a figure of its own, with the Agg canvas and without pyplot, so none needs
a display or leaves state behind. The same input gives the same file, written atomically. Arrays may
be tensors on any device, or NumPy arrays. Classes are told apart by marker as well as by colour;
the colours are Petroff's ten (2021, arXiv:2107.02270), chosen for colour-vision deficiency.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from hybridflow.checkpoint import atomic_write_bytes
from hybridflow.errors import InputError
from hybridflow.interpolation import Paths
from hybridflow.metrics import ReliabilityBins

__all__ = [
    "confusion_picture",
    "curves",
    "latent_picture",
    "path_rows",
    "paths_in_the_plane",
    "reliability_picture",
    "sample_grid",
    "scatter_panels",
    "sweep_curves",
]

Array: TypeAlias = torch.Tensor | NDArray
Floats: TypeAlias = NDArray[np.float64]
FilePath: TypeAlias = str | os.PathLike[str]

DPI = 128  # a power of two, so that a whole number of pixels is exact in inches
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
MARKERS = "o^sDvP*"
GREY = "#555555"
_HEADS = {"flow": (COLOURS[0], MARKERS[0]), "discriminator": (COLOURS[2], MARKERS[2])}
_HALO = [withStroke(linewidth=3, foreground="white")]


def sample_grid(images: Array, path: FilePath, *, class_names: Sequence[str]) -> None:
    """Draw images in a grid: a row per class, its name at the left.

    Pixels are repeated, never interpolated, so that an image's longer side covers about 64 pixels
    or more. Values are clamped to [0, 1]; NaN is drawn black.

    Args:
        images: Images of shape (K, n, C, H, W) in [0, 1]; C is 1 (grey) or 3 (RGB).
        path: The PNG file to write.
        class_names: K names.

    Raises:
        InputError: A shape does not fit, or the file cannot be written.
    """
    pixels = _floats(images)
    if pixels.ndim != 5 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise InputError(f"images: wanted shape (K, n, 1 or 3, H, W), got {pixels.shape}")
    rows, columns, _, height, width = pixels.shape
    _check_names(class_names, rows)
    scale = max(1, math.ceil(64 / max(height, width)))
    gap = 4
    tiles = np.nan_to_num(pixels, nan=0.0).clip(0, 1).transpose(0, 1, 3, 4, 2)
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    border = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(tiles, border, constant_values=1.0).transpose(0, 2, 1, 3, 4)
    tall, wide = rows * (height * scale + gap), columns * (width * scale + gap)
    canvas = np.broadcast_to(tiles.reshape(tall, wide, -1), (tall, wide, 3))

    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    names = [figure.text(0, 0, name, ha="right", va="center", fontsize=10) for name in class_names]
    margin = 2 * gap + math.ceil(max(name.get_window_extent(renderer).width for name in names))
    full_width, full_height = margin + wide, gap + tall
    figure.set_size_inches(full_width / DPI, full_height / DPI)
    for row, name in enumerate(names):
        middle = gap + row * (height * scale + gap) + height * scale / 2
        name.set_position(((margin - gap) / full_width, 1 - middle / full_height))
    figure.figimage(canvas, xo=margin, yo=0, origin="upper")
    _write(figure, path)


def scatter_panels(
    panels: Mapping[str, tuple[Array, Array]], path: FilePath, *, class_names: Sequence[str]
) -> None:
    """Draw sets of labelled points in the plane side by side, on the same axes.

    The axes hold the middle 99 % of all points, and a margin; a few may lie outside.

    Args:
        panels: By title, points of shape (N, 2) and their classes in [0, K) of shape (N,).
        path: The PNG file to write.
        class_names: K names.

    Raises:
        InputError: There is no panel, a shape or a class does not fit, a point is not finite, or
            the file cannot be written.

    Example:
        scatter_panels({"data": (x, y), "samples": (x_new, y_new)}, path, class_names=["0", "1"])
    """
    if not panels:
        raise InputError("panels: wanted at least one, got none")
    checked = {}
    for title, (points, labels) in panels.items():
        name = f"panels: {title!r}"
        checked[title] = (
            _points(f"{name} points", points, wanted_dims=2),
            _labels(f"{name} labels", labels, points, class_names),
        )
    together = np.concatenate([points for points, _ in checked.values()])
    figure = Figure(figsize=(4 * len(panels) + 1, 4), dpi=DPI, layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, (points, labels)) in zip(row, checked.items(), strict=True):
        _scatter(axes, points, labels, len(class_names))
        _plain(axes)
        axes.set(title=title, xlabel="$x_1$", aspect="equal")
    row[0].set(ylabel="$x_2$", **_frame(together))
    _legend(figure, class_names)
    _write(figure, path)


def latent_picture(
    panels: Mapping[str, tuple[Array, Array]],
    labels: Array,
    path: FilePath,
    *,
    class_names: Sequence[str],
) -> None:
    """Draw latents of the same images side by side, coloured by class, with the mixture's means.

    Two dimensions are drawn as they are. More are projected to the first two principal components
    of a panel's own latents; its axes then say how much of their variance each explains. The means
    are crosses that bear the names. A panel holds all means and the middle 99 % of the latents.

    Args:
        panels: By title, class-dependent latents z_K of shape (N, d), N >= 2 and d >= 2, and the
            mixture's means of shape (K, d).
        labels: True classes in [0, K), shape (N,), those of every panel.
        path: The PNG file to write.
        class_names: K names.

    Raises:
        InputError: There is no panel, a shape or a class does not fit, a value is not finite, or
            the file cannot be written.
    """
    if not panels:
        raise InputError("panels: wanted at least one, got none")
    checked = {}
    for title, (latents, means) in panels.items():
        points = _points(f"panels: {title!r} latents", latents)
        count, dims = points.shape
        if count < 2 or dims < 2:
            raise InputError(
                f"panels: {title!r} latents: wanted shape (N, d) with N, d >= 2, got {points.shape}"
            )
        centres = _points(f"panels: {title!r} means", means, wanted_dims=dims)
        _check_names(class_names, len(centres))
        checked[title] = points, centres, _labels("labels", labels, points, class_names)
    figure = Figure(figsize=(5.5 * len(panels) + 1, 5.5), dpi=DPI, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (points, centres, classes)) in zip(row, checked.items(), strict=True):
        points, centres, names = _in_the_plane(points, centres)
        _scatter(axes, points, classes, len(class_names))
        _crosses(axes, centres, class_names)
        axes.set(title=title, xlabel=names[0], ylabel=names[1], aspect="equal")
        axes.set(**_frame(points, centres))
        _plain(axes)
    _legend(figure, class_names)
    _write(figure, path)


def _in_the_plane(points: Floats, centres: Floats) -> tuple[Floats, Floats, list[str]]:
    """Points and centres as two coordinates, and what these are."""
    if points.shape[1] == 2:
        return points, centres, ["$z_1$", "$z_2$"]
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, random_state=0).fit(points)
    names = [
        f"principal component {axis} ({share:.1%} of variance)"
        for axis, share in enumerate(pca.explained_variance_ratio_, start=1)
    ]
    return pca.transform(points), pca.transform(centres), names


def _crosses(axes: Axes, centres: Floats, class_names: Sequence[str]) -> None:
    """Centres (K, 2) as crosses that bear the names of their classes."""
    x, y = centres.T
    axes.scatter(x, y, s=100, c="black", marker="X", edgecolors="white", zorder=3)
    for place, name in zip(centres, class_names, strict=True):
        axes.annotate(
            name,
            place,
            xytext=(7, 6),
            textcoords="offset points",
            fontweight="bold",
            path_effects=_HALO,
            zorder=4,
        )


def path_rows(
    paths: Paths, path: FilePath, *, ends: tuple[int, int], class_names: Sequence[str]
) -> None:
    """Draw images along paths between two classes, a row per path, and beneath each row the curves
    of both heads' probabilities; a point of a curve stands under the middle of its image.

    Args:
        paths: n paths of S images of shape (C, H, W), C 1 (grey) or 3 (RGB).
        path: The PNG file to write.
        ends: The two classes, a and b.
        class_names: K names.

    Raises:
        InputError: The shape does not fit, or the file cannot be written.
    """
    pixels = _floats(paths.x)
    if pixels.ndim != 5 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise InputError(f"paths: wanted x of shape (n, S, 1 or 3, H, W), got {pixels.shape}")
    rows, columns, channels, height, width = pixels.shape
    pixels = np.nan_to_num(pixels, nan=0.0).clip(0, 1).transpose(0, 3, 1, 4, 2)
    strips = pixels.reshape(rows, height, columns * width, channels).repeat(3 // channels, axis=3)
    colours = COLOURS[0], COLOURS[2]  # those of the classes may be alike
    curves, styles = _path_curves(paths, [class_names[end] for end in ends], colours)

    tile, left, right, above, below, gap = 0.75, 0.5, 0.2, 0.85, 0.45, 0.2  # inches
    image_height, curve_height = tile * height / width, 0.5
    row_height = image_height + curve_height + gap
    size = left + columns * tile + right, above + rows * row_height + below
    figure = Figure(figsize=size, dpi=DPI)

    def axes_at(top: float, tall: float) -> Axes:
        box = left / size[0], 1 - (top + tall) / size[1], columns * tile / size[0], tall / size[1]
        return figure.add_axes(box, xlim=(0, columns))

    middles = np.arange(columns) + 0.5
    for row, strip in enumerate(strips):
        top = above + row * row_height
        images = axes_at(top, image_height)
        images.imshow(strip, extent=(0, columns, 0, 1), aspect="auto", interpolation="nearest")
        images.vlines(range(1, columns), 0, 1, color="white", linewidth=2)
        images.set_axis_off()
        axes = axes_at(top + image_height, curve_height)
        for values, style in zip(curves[row].T, styles, strict=True):
            axes.plot(middles, values, linewidth=1.4, clip_on=False, **style)
        axes.set(ylim=(0, 1), yticks=[0, 1], xticks=middles, xticklabels=[])
        _plain(axes)
    axes.set_xticklabels([f"{beta:.2g}" for beta in paths.beta.tolist()])
    axes.set_xlabel("β")
    handles = [Line2D([], [], **style) for style in styles]
    handles.insert(2, Line2D([], [], linestyle="", label=""))  # a column for each head
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False)
    _write(figure, path)


def paths_in_the_plane(
    paths: Paths,
    data: tuple[Array, Array],
    path: FilePath,
    *,
    ends: tuple[int, int],
    class_names: Sequence[str],
) -> None:
    """Draw paths between two classes over the data, and both heads' probabilities along them.

    Args:
        paths: n paths of S points in the plane.
        data: Points of shape (N, 2) and their classes in [0, K) of shape (N,).
        path: The PNG file to write.
        ends: The two classes, a and b.
        class_names: K names.

    Raises:
        InputError: A shape or a class does not fit, a point is not finite, or the file cannot be
            written.
    """
    points = _points("data points", data[0], wanted_dims=2)
    labels = _labels("data labels", data[1], points, class_names)
    lines = _points("paths", paths.x.flatten(0, -2), wanted_dims=2).reshape(*paths.x.shape[:2], 2)
    colours = [COLOURS[end % len(COLOURS)] for end in ends]
    curves, styles = _path_curves(paths, [class_names[end] for end in ends], colours)
    figure = Figure(figsize=(11, 5.5), dpi=DPI, layout="constrained")
    panels = figure.subplot_mosaic([["plane", "flow"], ["plane", "discriminator"]])
    plane = panels["plane"]
    _scatter(plane, points, labels, len(class_names))
    for line in lines:
        plane.plot(*line.T, color="black", linewidth=1.2, zorder=3, path_effects=_HALO)
    for end, place, colour in zip(ends, (lines[:, 0], lines[:, -1]), colours, strict=True):
        marker = MARKERS[end % len(MARKERS)]
        plane.scatter(
            place[:, 0], place[:, 1], s=60, c=colour, marker=marker, edgecolors="black", zorder=4
        )
    plane.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", **_frame(points, *lines))
    for head, shown in (("flow", slice(0, 2)), ("discriminator", slice(2, 5))):
        axes = panels[head]
        for of_path in curves:
            for values, style in zip(of_path.T[shown], styles[shown], strict=True):
                axes.plot(paths.beta, values, linewidth=1, alpha=0.7, **style)
        axes.set(title=head, xlabel="β", xlim=(1, 0), ylim=(-0.02, 1.02))
        _plain(axes)
        handles = [Line2D([], [], **style) for style in styles[shown]]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _plain(plane)
    _write(figure, path)


def _path_curves(
    paths: Paths, names: Sequence[str], colours: Sequence[str]
) -> tuple[Floats, list[dict[str, Any]]]:
    """The five probabilities along n paths (n, S, 5), and how each is drawn."""
    curves = np.concatenate([_floats(paths.flow), _floats(paths.discriminator)], axis=2)
    styles: list[dict[str, Any]] = [
        {"label": f"{head}: p({name} | x)", "color": colour, "linestyle": dashes}
        for head, dashes in (("flow", "-"), ("discriminator", "--"))
        for name, colour in zip(names, colours, strict=True)
    ]
    generated = {"label": "discriminator: p(generated | x)", "color": "black", "linestyle": ":"}
    return curves, [*styles, generated]


def confusion_picture(
    matrices: Mapping[str, Array], path: FilePath, *, class_names: Sequence[str]
) -> None:
    """Draw confusion matrices side by side: counts in the cells, accuracies in the titles.

    The shade of a cell is its share of its row, that is, of the images of its true class.

    Args:
        matrices: By title, counts of shape (K, K): a row per true class, a column per predicted.
        path: The PNG file to write.
        class_names: K names.

    Raises:
        InputError: There is no matrix, a shape does not fit, a count is negative, a matrix is empty
            of counts, or the file cannot be written.
    """
    if not matrices:
        raise InputError("matrices: wanted at least one, got none")
    classes = len(class_names)
    counts = {title: _floats(matrix) for title, matrix in matrices.items()}
    for title, matrix in counts.items():
        if matrix.shape != (classes, classes) or not (matrix.min() >= 0 and matrix.sum() > 0):
            raise InputError(
                f"matrices: {title!r} must hold counts >= 0, not all 0, of shape "
                f"{(classes, classes)}, got shape {matrix.shape} and sum {matrix.sum():g}"
            )
    side = max(2.5, 0.42 * classes)
    figure = Figure(
        figsize=(len(counts) * (side + 0.9) + 0.9, side + 1.1), dpi=DPI, layout="constrained"
    )
    row = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (title, matrix) in zip(row, counts.items(), strict=True):
        shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (true, predicted), count in np.ndenumerate(matrix):
            colour = "white" if shares[true, predicted] > 0.5 else "black" if count else "#bbbbbb"
            axes.text(
                predicted, true, f"{count:.0f}", ha="center", va="center", color=colour, size=8
            )
        axes.set_title(f"{title}: accuracy {matrix.trace() / matrix.sum():.2%}")
        axes.set(xlabel="predicted class", ylabel="true class")
        long_names = max(map(len, class_names)) > 3
        axes.set_xticks(range(classes), class_names, rotation=90 if long_names else 0)
        axes.set_yticks(range(classes), class_names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(row), label="share of the true class", shrink=0.8)
    _write(figure, path)


def reliability_picture(
    panels: Mapping[str, Mapping[str, ReliabilityBins]], path: FilePath
) -> None:
    """Draw reliability diagrams side by side: accuracy against confidence, bin by bin.

    The diagonal is perfect calibration; below it a classifier is overconfident. A point's area is
    its bin's share of the images.

    Args:
        panels: By title, the bins of each curve by its name.
        path: The PNG file to write.

    Raises:
        InputError: There is no panel, or the file cannot be written.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, figure 4.
    """
    if not panels:
        raise InputError("panels: wanted at least one, got none")
    figure = Figure(figsize=(4 * len(panels), 4.5), dpi=DPI, layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, named) in zip(row, panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        for index, (name, bins) in enumerate(named.items()):
            x, y, count = map(_floats, (bins.confidence, bins.accuracy, bins.count))
            colour, marker = COLOURS[2 * index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(x, y, color=colour, linewidth=1)
            axes.scatter(x, y, s=15 + 150 * count / count.sum(), color=colour, marker=marker)
            axes.plot([], [], color=colour, marker=marker, label=name)
        axes.set(title=title, xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, loc="upper left")
        _plain(axes)
    row[0].set_ylabel("accuracy")
    _write(figure, path)


def curves(
    columns: Mapping[str, Sequence[float | None]],
    path: FilePath,
    *,
    losses: Sequence[str],
    accuracies: Sequence[str],
) -> None:
    """Draw losses and accuracies against the training step, in two panels.

    The losses share an asinh scale: linear within about 0.1 of zero, logarithmic outside, for
    either sign. An entry that is None, NaN or infinite is left out, and its neighbours are joined.

    Args:
        columns: By name, one number per logged step; "step" holds the steps.
        path: The PNG file to write.
        losses: The columns of the left panel.
        accuracies: The columns of the right panel, fractions in [0, 1].

    Raises:
        InputError: A column is missing or differs in length from "step", or the file cannot be
            written.
    """
    for name in ("step", *losses, *accuracies):
        if name not in columns:
            raise InputError(f"columns: {name!r} is missing, got {sorted(columns)}")
        if len(columns[name]) != len(columns["step"]):
            raise InputError(
                f"columns: {name!r} has {len(columns[name])} entries, "
                f"'step' has {len(columns['step'])}"
            )
    steps = np.array(columns["step"], dtype=float)
    figure = Figure(figsize=(13, 4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, names in ((left, losses), (right, accuracies)):
        for index, name in enumerate(names):
            values = np.array(columns[name], dtype=float)
            kept = np.isfinite(values)
            axes.plot(
                steps[kept],
                values[kept],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markevery=max(1, kept.sum() // 10),
                markersize=5,
                label=name,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(color="#dddddd", linewidth=0.6)
        _plain(axes)
        if names:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    left.set_title("losses")
    left.set_yscale("asinh", linear_width=0.1)
    left.yaxis.set_major_formatter("{x:.3g}")
    right.set_title("validation accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    _write(figure, path)


def sweep_curves(table: Sequence[Mapping[str, Any]], path: FilePath, *, option: str) -> None:
    """Draw the test accuracy of both heads against a swept number: mean and standard deviation over
    the seeds. A sweep of terms.w_nll also shows it against bits/dim.

    A row of panels per preset and values of the other options. The number's axis is logarithmic where
    its largest value is 20 times the smallest above 0 or more, and linear up to that smallest.

    Args:
        table: Rows as `hybridflow.sweep_table.summarise` gives them.
        path: The PNG file to write.
        option: The option whose values, all of them numbers, are swept.

    Raises:
        InputError: No run is finished, or the file cannot be written.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(table, key=lambda row: float(row["options"][option])):
        if row["finished"]:
            others = [f"{k}={v}" for k, v in row["options"].items() if k != option]
            groups.setdefault(", ".join([row["preset"], *others]), []).append(row)
    if not groups:
        raise InputError("table: wanted a finished run, got none")
    columns = 2 if option == "terms.w_nll" else 1
    figure = Figure(
        figsize=(4.8 * columns + 1.6, 3.4 * len(groups) + 0.2), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(len(groups), columns, squeeze=False, sharey="row")
    for (title, rows), line in zip(groups.items(), panels, strict=True):
        numbers = [float(row["options"][option]) for row in rows]
        values, against = line[0], line[-1]
        for head, (colour, marker) in _HEADS.items():
            look = {"color": colour, "marker": marker, "capsize": 3, "label": head}
            mean, std = _spreads(rows, f"{head}_accuracy")
            values.errorbar(numbers, mean, std, **look)
            if columns == 2:
                bits, bits_std = _spreads(rows, "bits_per_dim")
                against.errorbar(bits, mean, std, bits_std, **look)
        _number_axis(values, numbers)
        values.set(title=title, xlabel=option, ylabel="test accuracy")
        if columns == 2:
            for x, y, number in zip(bits, mean, numbers, strict=True):
                against.annotate(
                    f"{number:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8
                )
            against.set(title=f"{title}: each point a {option}", xlabel="bits/dim")
        for axes in line:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.grid(color="#dddddd", linewidth=0.6)
            _plain(axes)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="head")
    _write(figure, path)


def _spreads(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[Floats, Floats]:
    """Means and standard deviations of a metric; NaN where there is none."""
    pairs = [(row["metrics"][metric]["mean"], row["metrics"][metric]["std"]) for row in rows]
    mean, std = np.array(pairs, dtype=float).T
    return mean, std


def _number_axis(axes: Axes, numbers: Sequence[float]) -> None:
    """Ticks at the numbers, on a logarithmic axis where they span more than a decade or so."""
    positive = [number for number in numbers if number > 0]
    if positive and min(numbers) >= 0 and max(positive) >= 20 * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())


def _write(figure: Figure, path: FilePath) -> None:
    """Write the figure as PNG; without the library's version, so that files can be compared."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())


def _frame(points: Floats, *within: Floats) -> dict[str, tuple[float, float]]:
    """Limits of both axes: a square around the middle 99 % of points (N, 2) and all of `within`."""
    ends = np.concatenate([np.quantile(points, [0.005, 0.995], axis=0), *within])
    low, high = ends.min(axis=0), ends.max(axis=0)
    centre, reach = (low + high) / 2, 0.55 * (high - low).max() or 1.0
    x, y = ((float(middle - reach), float(middle + reach)) for middle in centre)
    return {"xlim": x, "ylim": y}


def _scatter(axes: Axes, points: Floats, labels: NDArray[np.int64], classes: int) -> None:
    """Points (N, 2) by class, smaller and fainter the more there are."""
    size = float(np.clip(20_000 / len(points), 6, 24))
    for index in range(classes):
        chosen = points[labels == index]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            alpha=0.7,
            linewidths=0,
        )


def _legend(figure: Figure, class_names: Sequence[str]) -> None:
    """The classes' colours and markers, at the right of the figure."""
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            label=name,
        )
        for index, name in enumerate(class_names)
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, title="class")


def _plain(axes: Axes) -> None:
    """Take away the frame's right and upper sides."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY)


def _floats(values: Array) -> Floats:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _points(name: str, values: Array, *, wanted_dims: int | None = None) -> Floats:
    """Check finite points of shape (N, `wanted_dims`), of any dimension if that is None."""
    points = _floats(values)
    if points.ndim != 2 or len(points) == 0 or wanted_dims not in (None, points.shape[1]):
        raise InputError(
            f"{name}: wanted points of shape (N, {wanted_dims or 'd'}), got {points.shape}"
        )
    if not np.isfinite(points).all():
        raise InputError(f"{name}: wanted finite values, got NaN or infinity")
    return points


def _labels(
    name: str, values: Array, points: Array, class_names: Sequence[str]
) -> NDArray[np.int64]:
    """Check one class in [0, K) per point."""
    labels = torch.as_tensor(values).detach().cpu().numpy()
    classes = len(class_names)
    if labels.shape != (len(points),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{name}: wanted integer classes of shape ({len(points)},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if not (labels.min() >= 0 and labels.max() < classes):
        raise InputError(
            f"{name}: wanted classes in [0, {classes}), the number of class_names, "
            f"got values from {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


def _check_names(class_names: Sequence[str], classes: int) -> None:
    if len(class_names) != classes:
        raise InputError(f"class_names: wanted {classes} names, got {len(class_names)}")
