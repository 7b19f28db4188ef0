"""Pictures of a run, as PNG files: samples, latents, confusion matrices, training curves.

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
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from hybridflow.checkpoint import atomic_write_bytes
from hybridflow.errors import InputError
from hybridflow.metrics import ReliabilityBins

__all__ = [
    "confusion_picture",
    "curves",
    "latent_picture",
    "reliability_picture",
    "sample_grid",
    "scatter_panels",
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
    low, high = together.min(axis=0), together.max(axis=0)
    centre, reach = (low + high) / 2, 0.525 * (high - low).max() or 1.0
    figure = Figure(figsize=(4 * len(panels) + 1, 4), dpi=DPI, layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, (points, labels)) in zip(row, checked.items(), strict=True):
        _scatter(axes, points, labels, len(class_names))
        _plain(axes)
        axes.set(title=title, xlabel="$x_1$", aspect="equal")
    row[0].set(
        ylabel="$x_2$",
        xlim=(centre[0] - reach, centre[0] + reach),
        ylim=(centre[1] - reach, centre[1] + reach),
    )
    _legend(figure, class_names)
    _write(figure, path)


def latent_picture(
    latents: Array, labels: Array, means: Array, path: FilePath, *, class_names: Sequence[str]
) -> None:
    """Draw latents coloured by class, with the mixture's means as crosses that bear the names.

    Two dimensions are drawn as they are. More are projected to the first two principal components
    of the latents; the axes then say how much of their variance each explains.

    Args:
        latents: Class-dependent latents z_K of shape (N, d), N >= 2 and d >= 2.
        labels: True classes in [0, K), shape (N,).
        means: The mixture's means of shape (K, d).
        path: The PNG file to write.
        class_names: K names.

    Raises:
        InputError: A shape or a class does not fit, a value is not finite, or the file cannot be
            written.
    """
    points = _points("latents", latents)
    count, dims = points.shape
    if count < 2 or dims < 2:
        raise InputError(f"latents: wanted shape (N, d) with N, d >= 2, got {points.shape}")
    centres = _points("means", means, wanted_dims=dims)
    _check_names(class_names, len(centres))
    classes = _labels("labels", labels, points, class_names)
    names = ["$z_1$", "$z_2$"]
    if dims > 2:
        from sklearn.decomposition import PCA

        pca = PCA(n_components=2, random_state=0).fit(points)
        points, centres = pca.transform(points), pca.transform(centres)
        shares = pca.explained_variance_ratio_
        names = [
            f"principal component {axis} ({share:.1%} of variance)"
            for axis, share in enumerate(shares, start=1)
        ]

    figure = Figure(figsize=(7, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal", adjustable="datalim")
    _scatter(axes, points, classes, len(class_names))
    axes.scatter(
        centres[:, 0], centres[:, 1], s=130, c="black", marker="X", edgecolors="white", zorder=3
    )
    for (x, y), name in zip(centres, class_names, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(7, 6),
            textcoords="offset points",
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=4,
        )
    axes.set(xlabel=names[0], ylabel=names[1])
    _plain(axes)
    _legend(figure, class_names)
    _write(figure, path)


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


def _write(figure: Figure, path: FilePath) -> None:
    """Write the figure as PNG; without the library's version, so that files can be compared."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())


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
