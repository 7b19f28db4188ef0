import math

import pytest
import torch

from hybridflow.data import PLANAR, fresh_points
from hybridflow.errors import InputError
from hybridflow.metrics import (
    accuracy,
    bits_per_dim,
    confusion_matrix,
    expected_calibration_error,
    mass_between_arms,
)


def two_classes(confidence, right, wrong):
    """`right` + `wrong` predictions of class 0 at one confidence, and their true classes."""
    row = torch.tensor([confidence, 1 - confidence])
    return row.repeat(right + wrong, 1), torch.tensor([0] * right + [1] * wrong)


def test_accuracy_is_the_exact_fraction():
    assert accuracy(torch.tensor([1, 2, 0]), torch.tensor([1, 0, 0])) == 2 / 3


def test_accuracy_averages_over_images_not_over_classes():
    predictions = torch.zeros(10, dtype=torch.long)
    targets = torch.tensor([0] * 9 + [1])
    assert accuracy(predictions, targets) == 0.9


def test_confusion_matrix_has_a_row_per_true_class():
    predictions, targets = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 2])
    matrix = confusion_matrix(predictions, targets, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [0, 1, 0]]


def test_confusion_matrix_sums_agree_with_counts_and_accuracy():
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randint(0, 7, (2, 500), generator=generator)
    matrix = confusion_matrix(predictions, targets, 7)
    assert torch.equal(matrix.sum(dim=1), targets.bincount(minlength=7))
    assert torch.equal(matrix.sum(dim=0), predictions.bincount(minlength=7))
    assert matrix.trace() / 500 == accuracy(predictions, targets)


def test_calibrated_predictions_have_no_calibration_error():
    first, first_targets = two_classes(0.75, right=75, wrong=25)
    second, second_targets = two_classes(0.5625, right=9, wrong=7)
    probabilities = torch.cat([first, second])
    targets = torch.cat([first_targets, second_targets])
    assert expected_calibration_error(probabilities, targets) == pytest.approx(0, abs=1e-6)


def test_calibration_error_of_two_bins_is_the_weighted_mean_of_their_gaps():
    first, first_targets = two_classes(0.9, right=6, wrong=4)
    second, second_targets = two_classes(0.6, right=30, wrong=0)
    error = expected_calibration_error(
        torch.cat([first, second]), torch.cat([first_targets, second_targets])
    )
    assert error == pytest.approx(0.25 * (0.9 - 0.6) + 0.75 * (1.0 - 0.6))


def test_there_are_fifteen_bins():
    # 0.52 and 0.53 lie in bin 8 of 15, [0.467, 0.533): their errors cancel.
    low, low_targets = two_classes(0.52, right=100, wrong=0)
    high, high_targets = two_classes(0.53, right=5, wrong=95)
    error = expected_calibration_error(
        torch.cat([low, high]), torch.cat([low_targets, high_targets])
    )
    assert error == pytest.approx(0, abs=1e-6)
    # 0.54 lies in bin 9: they do not.
    high, high_targets = two_classes(0.54, right=5, wrong=95)
    error = expected_calibration_error(
        torch.cat([low, high]), torch.cat([low_targets, high_targets])
    )
    assert error == pytest.approx((0.48 + 0.49) / 2)


def test_a_confidence_of_exactly_one_shares_the_last_bin():
    sure, sure_targets = two_classes(1.0, right=5, wrong=5)
    high, high_targets = two_classes(0.96, right=10, wrong=0)
    error = expected_calibration_error(
        torch.cat([sure, high]), torch.cat([sure_targets, high_targets])
    )
    assert error == pytest.approx(0.98 - 0.75)


def test_rounding_above_one_changes_nothing():
    probabilities, targets = two_classes(1.0, right=1, wrong=3)
    assert expected_calibration_error(probabilities * (1 + 1e-6), targets) == pytest.approx(0.75)


def test_bits_per_dim_of_a_uniform_density_is_the_bits_of_a_grey_level():
    for levels in (2, 17, 256):
        bits = bits_per_dim(torch.zeros(3, dtype=torch.float64), dims=784, levels=levels)
        assert bits.tolist() == [math.log2(levels)] * 3


def test_bits_per_dim_of_continuous_data_converts_nats_only():
    log_prob = torch.tensor([-2 * math.log(2), 4 * math.log(2)], dtype=torch.float64)
    assert bits_per_dim(log_prob, dims=2, levels=None).tolist() == pytest.approx([1, -2])


def test_bits_per_dim_is_the_entropy_of_a_discrete_source():
    # Grey levels 0, 1, 2, 3 with these probabilities: the dequantised density is 4 p on a quarter.
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    bits = bits_per_dim((4 * probabilities).log(), dims=1, levels=4)
    assert (probabilities * bits).sum().item() == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(torch.zeros(3).long(), torch.zeros(2).long()), "predictions: .*(2,)"),
        (lambda: accuracy(torch.zeros(0).long(), torch.zeros(0).long()), "targets: .*at least one"),
        (lambda: accuracy(torch.zeros(2), torch.zeros(2).long()), "predictions: .*float32"),
        (
            lambda: confusion_matrix(torch.tensor([3]), torch.tensor([0]), 3),
            r"predictions: wanted classes in \[0, 3\), got values from 3",
        ),
        (lambda: confusion_matrix(torch.tensor([0]), torch.tensor([-1]), 3), "targets: .*-1"),
        (
            lambda: expected_calibration_error(torch.tensor([[3.0, -2.0]]), torch.tensor([0])),
            "probabilities: .*least value of -2",
        ),
        (
            lambda: expected_calibration_error(torch.full((1, 2), math.nan), torch.tensor([0])),
            "probabilities: .*nan",
        ),
        (
            lambda: expected_calibration_error(torch.tensor([[3.0, 2.0]]), torch.tensor([0])),
            "probabilities: .*sums from 5",
        ),
        (
            lambda: expected_calibration_error(torch.ones(2), torch.tensor([0, 0])),
            "probabilities: .*shape",
        ),
        (
            lambda: expected_calibration_error(torch.eye(2), torch.tensor([0, 2])),
            r"targets: .*\[0, 2\)",
        ),
        (lambda: bits_per_dim(torch.zeros(1), dims=0, levels=256), "dims: .*got 0"),
        (lambda: bits_per_dim(torch.zeros(1), dims=1, levels=1), "levels: .*got 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", PLANAR)
def test_a_mixture_of_data_and_bridges_has_the_mass_of_its_bridges(name):
    reference, fresh, data = (fresh_points(name, 20_000, seed) for seed in (2, 3, 4))
    bridge = torch.tensor([0.0, 5.0]) + 0.1 * torch.randn(2000, 2)
    of_data = mass_between_arms(data, reference, fresh)
    assert 0.0005 < of_data < 0.002
    assert mass_between_arms(bridge, reference, fresh) == 1
    mixed = torch.cat([data, bridge])
    wanted = (20_000 * of_data + 2000) / 22_000
    assert mass_between_arms(mixed, reference, fresh) == pytest.approx(wanted)


def test_the_gap_of_the_moons_counts_as_between_and_scaling_changes_nothing():
    sets = [fresh_points("two-moons", 20_000, seed) for seed in (2, 3)]
    gap = torch.tensor([[0.0, 0.3]])  # under the upper moon, above the lower
    assert mass_between_arms(gap, *sets) == 1
    assert mass_between_arms(7 * gap, *(7 * points for points in sets)) == 1


@pytest.mark.parametrize(
    ("samples", "reference", "fresh", "name"),
    [
        (torch.zeros(3), torch.zeros(4, 2), torch.zeros(4, 2), "samples"),
        (torch.zeros(3, 3), torch.zeros(4, 2), torch.zeros(4, 2), "samples"),
        (torch.zeros(3, 2), torch.zeros(0, 2), torch.zeros(4, 2), "reference"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.full((4, 2), math.nan), "fresh"),
    ],
)
def test_mass_between_arms_names_what_does_not_fit(samples, reference, fresh, name):
    with pytest.raises(InputError, match=f"{name}: wanted finite points"):
        mass_between_arms(samples, reference, fresh)
