"""Strong views: what each range does, and what stays as it was."""

import pytest
import torch

from hybridflow.config import StrongConfig
from hybridflow.data import strong_view

NOTHING = StrongConfig(rotate=0, zoom=0, shear=0, shift=0, contrast=0, brightness=0, cutout=0)
IMAGES = torch.randint(0, 17, (7, 1, 9, 12), dtype=torch.uint8)


def one(**ranges) -> StrongConfig:
    return StrongConfig(**vars(NOTHING) | ranges)


@pytest.mark.parametrize(("levels", "channels"), [(17, 1), (256, 3)])
def test_empty_ranges_leave_images_as_they_are(levels: int, channels: int):
    x = torch.randint(0, levels, (5, channels, 8, 11), dtype=torch.uint8)
    assert torch.equal(strong_view(x, NOTHING, levels), x)


@pytest.mark.parametrize("range_", ["rotate", "zoom", "shear", "shift", "contrast", "brightness"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_range_changes_each_image_by_itself(range_: str, channels: int):
    x = torch.randint(0, 256, (1, channels, 16, 16), dtype=torch.uint8).expand(6, -1, -1, -1)
    before = x.clone()
    view = strong_view(x, one(**{range_: 40 if range_ == "rotate" else 0.5}), 256)
    assert view.dtype == torch.uint8 and view.shape == x.shape and torch.equal(x, before)
    assert len(view.flatten(1).unique(dim=0)) == 6


def test_levels_are_kept():
    view = strong_view(IMAGES, StrongConfig(contrast=1, brightness=1), 17)
    assert view.max() <= 16 and view.min() == 0


def test_a_half_turn_is_found_among_rotations():
    x = torch.zeros(400, 1, 5, 5, dtype=torch.uint8)
    x[:, :, 0, 2] = 255
    view = strong_view(x, one(rotate=180), 256)
    where = view.flatten(1).argmax(1)
    assert {0 * 5 + 2, 2 * 5 + 0, 2 * 5 + 4, 4 * 5 + 2} <= set(where.tolist())  # all four sides


def test_shifts_reach_their_share_of_the_side_and_no_further():
    x = torch.zeros(500, 1, 20, 40, dtype=torch.uint8)
    x[:, :, 10, 20] = 255
    view = strong_view(x, one(shift=0.2), 256).float()
    total = view.sum((1, 2, 3))
    rows = (view.sum(3)[:, 0] @ torch.arange(20.0)) / total - 10
    columns = (view.sum(2)[:, 0] @ torch.arange(40.0)) / total - 20
    assert 3.5 < rows.abs().max() <= 4.1 and 7 < columns.abs().max() <= 8.1


@pytest.mark.parametrize(("channels", "outside"), [(1, 0), (3, 200)])
def test_outside_is_black_for_grey_images_and_mirrored_for_colour(channels: int, outside: int):
    x = torch.full((50, channels, 8, 8), 200, dtype=torch.uint8)
    assert strong_view(x, one(shift=0.5), 256).min() == outside


def test_cutout_covers_a_square_of_its_side_with_the_mean():
    x = torch.randint(0, 2, (200, 1, 20, 20), dtype=torch.uint8) * 254
    covered = (strong_view(x, one(cutout=0.5), 256) != x).flatten(1).sum(1)
    assert 95 <= covered.max() <= 121 and covered.min() >= 25


def test_views_are_reproducible():
    torch.manual_seed(1)
    first = strong_view(IMAGES, StrongConfig(cutout=0.3), 17)
    torch.manual_seed(1)
    assert torch.equal(first, strong_view(IMAGES, StrongConfig(cutout=0.3), 17))
