import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits

from hybridflow.errors import InputError
from hybridflow.interpolation import Paths
from hybridflow.pictures import (
    DPI,
    confusion_picture,
    curves,
    latent_picture,
    path_rows,
    paths_in_the_plane,
    sample_grid,
    scatter_panels,
    sweep_curves,
)
from hybridflow.sweep_table import summarise

NAMES = ["zero", "one", "two"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


def size(path):
    """Height and width in pixels of a PNG file, which is read whole."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path).shape[:2]


def inches(height, width):
    return int(height * DPI), int(width * DPI)


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grid_shows_every_pixel_as_a_block(path, channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 4, channels, 8, 8, generator=generator)
    sample_grid(images, path, class_names=NAMES)
    picture = imread(path)[..., :3]
    assert picture.shape[0] == 4 + 3 * 68
    tiles = picture[4:, -4 * 68 :].reshape(3, 68, 4, 68, 3)[:, :64, :, :64]
    blocks = tiles.reshape(3, 8, 8, 4, 8, 8, 3)
    assert (blocks == blocks[:, :, :1, :, :, :1]).all()
    wanted = images.permute(0, 3, 1, 4, 2).expand(-1, -1, -1, -1, 3).numpy()
    assert np.abs(blocks[:, :, 0, :, :, 0] - wanted).max() <= 1 / 255


def test_sample_grid_leaves_room_for_long_names_at_the_left(path):
    images = torch.zeros(1, 1, 1, 64, 64)
    sample_grid(images, path, class_names=["a"])
    narrow = size(path)
    sample_grid(images, path, class_names=["a much longer name"])
    wide = size(path)
    assert wide[0] == narrow[0] == 72 and wide[1] > narrow[1] + 100
    margin = imread(path)[:, : -68 - 4, :3]
    assert (margin[:, 0] == 1).all() and margin.min() < 0.5


def test_sample_grid_clamps_and_draws_nan_black(path):
    values = torch.tensor([-2.0, 2.0, math.nan, math.inf])
    sample_grid(values.view(1, 4, 1, 1, 1).expand(1, 4, 1, 64, 64), path, class_names=["a"])
    row = imread(path)[30, -4 * 68 :, 0].reshape(4, 68)[:, 30]
    assert row.tolist() == [0, 1, 0, 1]


def test_scatter_panels_grow_with_their_number(path):
    points, labels = torch.randn(30, 2), torch.arange(30) % 3
    scatter_panels({"data": (points, labels)}, path, class_names=NAMES)
    assert size(path) == inches(4, 5)
    scatter_panels(
        {"data": (points, labels), "samples": (points.numpy(), labels.numpy())},
        path,
        class_names=NAMES,
    )
    assert size(path) == inches(4, 9)


def test_scatter_panels_draw_a_single_point(path):
    scatter_panels({"data": (torch.zeros(1, 2), torch.tensor([2]))}, path, class_names=NAMES)
    assert size(path) == inches(4, 5)


@pytest.mark.parametrize("dims", [2, 64])
def test_latent_picture_of_any_dimension(path, dims):
    digits = load_digits()
    latents = torch.tensor(digits.data[:, 20 : 20 + dims] if dims == 2 else digits.data)
    labels = torch.tensor(digits.target)
    means = torch.stack([latents[labels == k].mean(dim=0) for k in range(10)])
    names = list("0123456789")
    start = latents.bfloat16(), means.clone().requires_grad_()
    latent_picture({"start": start}, labels, path, class_names=names)
    assert size(path) == inches(5.5, 6.5)
    latent_picture({"start": start, "end": (latents, means)}, labels, path, class_names=names)
    assert size(path) == inches(5.5, 12)


def paths_of(count: int, steps: int, *shape: int) -> Paths:
    generator = torch.Generator().manual_seed(0)
    return Paths(
        x=torch.rand(count, steps, *shape, generator=generator),
        beta=torch.linspace(1, 0, steps),
        flow=torch.rand(count, steps, 2, generator=generator),
        discriminator=torch.rand(count, steps, 3, generator=generator),
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_path_is_a_strip_of_its_images(path, channels):
    paths = paths_of(2, 3, channels, 16, 16)
    path_rows(paths, path, ends=(2, 0), class_names=NAMES)
    picture = imread(path)[..., :3]
    assert picture.shape[:2] == inches(0.85 + 2 * (0.75 + 0.5 + 0.2) + 0.45, 0.5 + 3 * 0.75 + 0.2)
    tile = int(0.75 * DPI)  # 96 pixels, six for each of the image's
    strip = picture[round(0.85 * DPI) :][:tile, int(0.5 * DPI) :][:, : 3 * tile]
    shown = strip.reshape(16, 6, 3, 16, 6, 3)[:, 3, :, :, 3]
    wanted = paths.x[0].expand(-1, 3, -1, -1).permute(2, 0, 3, 1).numpy()
    assert np.abs(shown - wanted).max() <= 1 / 255 + 1e-6


def test_paths_in_the_plane_show_where_they_run(path):
    pictures = []
    for shift in (0.0, 0.5):
        paths = paths_of(2, 5, 2)
        paths.x.add_(shift)
        data = torch.rand(30, 2, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3
        paths_in_the_plane(paths, data, path, ends=(0, 2), class_names=NAMES)
        assert size(path) == inches(5.5, 11)
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]


def swept(option: str, values: list[str], seeds: int, **others: str) -> list[dict]:
    """The table of a sweep whose accuracies rise with the value."""
    return summarise(
        {
            "preset": "digits",
            "options": {option: value, **others},
            "seed": seed,
            "results": {
                "flow_accuracy": 0.5 + 0.1 * float(value) + 0.01 * seed,
                "discriminator_accuracy": 0.9,
                "bits_per_dim": 2 - float(value),
            },
        }
        for value in values
        for seed in range(seeds)
    )


def test_sweep_curves_have_a_row_per_configuration_and_bits_for_w_nll(path):
    sweep_curves(swept("terms.beta", ["0", "0.5", "1"], 2), path, option="terms.beta")
    height, width = inches(3.6, 6.4)
    assert size(path) == (height, width)
    table = swept("terms.w_nll", ["1", "0", "0.01"], 2, objective="full")
    sweep_curves(table, path, option="terms.w_nll")
    assert size(path) == inches(3.6, 11.2)
    table += swept("terms.w_nll", ["1", "0", "0.01"], 2, objective="nll")
    sweep_curves(table, path, option="terms.w_nll")
    assert size(path) == inches(7, 11.2)


def test_sweep_curves_are_the_same_in_any_order_and_leave_out_what_is_not_finished(path):
    table = swept("terms.beta", ["0", "0.5", "1"], 1)
    sweep_curves(table, path, option="terms.beta")
    first = path.read_bytes()
    missing = {**table[0], "options": {"terms.beta": "0.7"}, "finished": 0}
    sweep_curves([missing, *reversed(table)], path, option="terms.beta")
    assert path.read_bytes() == first
    with pytest.raises(InputError, match="table: wanted a finished run, got none"):
        sweep_curves([missing], path, option="terms.beta")


def test_confusion_picture_holds_a_panel_per_head(path):
    matrix = torch.tensor([[5, 1, 0], [0, 0, 0], [2, 0, 9]])
    confusion_picture({"flow": matrix}, path, class_names=NAMES)
    single = size(path)
    confusion_picture({"flow": matrix, "discriminator": matrix.numpy()}, path, class_names=NAMES)
    assert size(path) == (single[0], single[1] + int(3.4 * DPI))


def test_curves_join_the_neighbours_of_missing_and_infinite_entries(path):
    pictures = set()
    for absent in (None, math.nan, math.inf):
        columns = {"step": [0, 10, 20], "nll": [3000.0, absent, -2000.0], "flow": [0.1, absent, 1]}
        curves(columns, path, losses=["nll"], accuracies=["flow"])
        assert size(path) == inches(4, 13)
        pictures.add(path.read_bytes())
    columns = {"step": [0, 20], "nll": [3000.0, -2000.0], "flow": [0.1, 1]}
    curves(columns, path, losses=["nll"], accuracies=["flow"])
    assert pictures == {path.read_bytes()}


def test_curves_of_no_steps_are_empty_panels(path):
    curves({"step": [], "loss": []}, path, losses=["loss"], accuracies=[])
    assert size(path) == inches(4, 13)


def test_equal_input_gives_equal_files_without_date_or_version(tmp_path):
    latents, labels = torch.randn(600, 600), torch.arange(600) % 3
    for name in ("a.png", "b.png"):
        panels = {"end": (latents, latents[:3])}
        latent_picture(panels, labels, tmp_path / name, class_names=NAMES)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert b"tEXt" not in data and b"tIME" not in data
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png"}


def latents(points, labels, means, path):
    latent_picture({"end": (points, means)}, labels, path, class_names=NAMES)


POINTS, LABELS = torch.zeros(6, 2), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: sample_grid(torch.zeros(3, 1, 8, 8), p, class_names=NAMES), "images: .*8, 8"),
        (lambda p: sample_grid(torch.zeros(3, 1, 2, 8, 8), p, class_names=NAMES), "images: "),
        (lambda p: sample_grid(torch.zeros(3, 0, 1, 8, 8), p, class_names=NAMES), "images: "),
        (
            lambda p: sample_grid(torch.zeros(2, 1, 1, 8, 8), p, class_names=NAMES),
            "class_names: wanted 2 names, got 3",
        ),
        (lambda p: scatter_panels({}, p, class_names=NAMES), "panels: "),
        (
            lambda p: scatter_panels({"new": (torch.zeros(6, 3), LABELS)}, p, class_names=NAMES),
            r"panels: 'new' .*\(N, 2\), got \(6, 3\)",
        ),
        (
            lambda p: scatter_panels({"new": (POINTS / 0, LABELS)}, p, class_names=NAMES),
            "panels: 'new' .*finite",
        ),
        (
            lambda p: latents(POINTS, LABELS[:5], POINTS[:3], p),
            r"labels: .*\(6,\), got int64 of shape \(5,\)",
        ),
        (
            lambda p: latents(POINTS, LABELS + 1, POINTS[:3], p),
            r"labels: wanted classes in \[0, 3\).* from 1 to 3",
        ),
        (
            lambda p: latents(POINTS, LABELS.float(), POINTS[:3], p),
            "labels: wanted integer",
        ),
        (
            lambda p: latents(POINTS, LABELS, torch.zeros(3, 4), p),
            r"panels: 'end' means: .*\(N, 2\), got \(3, 4\)",
        ),
        (
            lambda p: latents(POINTS, LABELS, POINTS[:2], p),
            "class_names: wanted 2 names, got 3",
        ),
        (
            lambda p: latents(POINTS[:, :1], LABELS, POINTS[:3, :1], p),
            "panels: 'end' latents: .*d >= 2",
        ),
        (lambda p: latent_picture({}, LABELS, p, class_names=NAMES), "panels: wanted at least one"),
        (
            lambda p: path_rows(paths_of(1, 2, 8, 8), p, ends=(0, 1), class_names=NAMES),
            r"paths: wanted x of shape .*got \(1, 2, 8, 8\)",
        ),
        (
            lambda p: paths_in_the_plane(
                paths_of(1, 2, 3), (POINTS, LABELS), p, ends=(0, 1), class_names=NAMES
            ),
            r"paths: wanted points of shape \(N, 2\)",
        ),
        (lambda p: confusion_picture({}, p, class_names=NAMES), "matrices: "),
        (
            lambda p: confusion_picture({"flow": torch.eye(2)}, p, class_names=NAMES),
            r"matrices: 'flow' .*\(3, 3\), got shape \(2, 2\)",
        ),
        (
            lambda p: confusion_picture({"flow": torch.zeros(3, 3)}, p, class_names=NAMES),
            "matrices: 'flow' .*sum 0",
        ),
        (
            lambda p: curves({"step": [1]}, p, losses=["nll"], accuracies=[]),
            r"columns: 'nll' is missing, got \['step'\]",
        ),
        (
            lambda p: curves({"step": [1], "nll": []}, p, losses=["nll"], accuracies=[]),
            "columns: 'nll' has 0 entries, 'step' has 1",
        ),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(path, draw, message):
    with pytest.raises(InputError, match=message):
        draw(path)
    assert not path.exists()


def test_pictures_leave_pyplot_and_its_figures_alone(path):
    from matplotlib import pyplot

    scatter_panels({"data": (POINTS, LABELS)}, path, class_names=NAMES)
    assert pyplot.get_fignums() == []
