"""What a classifier and a density are judged by.

torchmetrics takes one to two seconds to import, so the functions that use it import it themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridflow.errors import InputError

__all__ = ["accuracy", "bits_per_dim", "confusion_matrix", "expected_calibration_error"]

CALIBRATION_BINS = 15


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    r"""The fraction of predictions that are right, in [0, 1].

    .. math:: \frac{1}{N} \sum_i [\hat y_i = y_i]

    Args:
        predictions: Predicted classes, integers of shape (N,).
        targets: True classes, integers of shape (N,).

    Raises:
        InputError: The shapes differ, N is 0, or either does not hold integers.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    _check_classes("targets", targets)
    _check_classes("predictions", predictions, count=len(targets))
    # torchmetrics rounds this one to float32, which shows in a report.
    return (predictions == targets).double().mean().item()


def confusion_matrix(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    r"""How often each class was taken for each other.

    .. math:: M_{ab} = \sum_i [y_i = a] \, [\hat y_i = b]

    Args:
        predictions: Predicted classes in [0, K), integers of shape (N,).
        targets: True classes in [0, K), integers of shape (N,).
        classes: K.

    Returns:
        Counts of shape (K, K), int64: a row per true class, a column per predicted class.

    Raises:
        InputError: The shapes differ, N is 0, or a class lies outside [0, K).

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    _check_classes("targets", targets, classes=classes)
    _check_classes("predictions", predictions, count=len(targets), classes=classes)
    # Its own validation counts distinct values and lets classes outside [0, K) through.
    return multiclass_confusion_matrix(predictions, targets, classes, validate_args=False)


def expected_calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    r"""The expected calibration error (ECE) of the most probable class, in [0, 1].

    .. math:: \sum_{b=1}^{15} \frac{n_b}{N} \, |\mathrm{acc}_b - \mathrm{conf}_b|

    over 15 bins of equal width on the confidence :math:`\max_k p_k`: in a bin, its share of the
    images times the distance between their accuracy and their mean confidence (Guo et al., 2017,
    "On Calibration of Modern Neural Networks", equation 3).

    Args:
        probabilities: Class probabilities of shape (N, K), each row of sum 1.
        targets: True classes in [0, K), integers of shape (N,).

    Raises:
        InputError: The shapes do not fit, N is 0, a row is no distribution (logits, for example),
            or a class lies outside [0, K).

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        0.25
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if probabilities.ndim != 2 or not probabilities.is_floating_point():
        raise InputError(
            "probabilities: wanted floats of shape (N, K), got "
            f"{probabilities.dtype} of shape {tuple(probabilities.shape)}"
        )
    classes = probabilities.shape[1]
    _check_classes("targets", targets, count=len(probabilities), classes=classes)
    rows = probabilities.detach().cpu().float()
    sums = rows.sum(dim=1)
    if not (rows.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)):
        raise InputError(
            "probabilities: wanted rows that are >= 0 and sum to 1, got a least value of "
            f"{rows.min().item():.4g} and sums from {sums.min().item():.4g} "
            f"to {sums.max().item():.4g}"
        )
    # torchmetrics gives a confidence of exactly 1 a sixteenth bin, and takes the softmax of
    # everything if any value exceeds 1 by a rounding error.
    below_one = rows.clamp(max=1 - 2**-24)
    error = multiclass_calibration_error(
        below_one, targets.cpu(), num_classes=classes, n_bins=CALIBRATION_BINS, norm="l1"
    )
    return error.item()


def bits_per_dim(log_prob: Tensor, dims: int, levels: int | None) -> Tensor:
    r"""Negative log-likelihood in bits per dimension.

    .. math:: \frac{-\log p(x)}{D \ln 2} + \log_2 L

    With `levels` L, x in [0, 1]^D is an image of L grey levels after uniform dequantisation,
    x = (v + u) / L, and the value bounds from above the bits per dimension of the discrete image v
    (Theis et al., 2016, "A note on the evaluation of generative models", section 3.1). With None, x
    is continuous: the second term is absent and the value may be negative.

    Args:
        log_prob: Log-densities log p(x) in nats, of any shape.
        dims: D, the dimensions of one x (C·H·W of an image).
        levels: L, 256 for 8-bit images; None for continuous data.

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Raises:
        InputError: `dims` is below 1, or `levels` below 2.

    Example:
        >>> bits_per_dim(torch.zeros(2), dims=784, levels=256)
        tensor([8., 8.])
    """
    if dims < 1:
        raise InputError(f"dims: wanted at least 1, got {dims}")
    bits = -log_prob / (dims * math.log(2))
    if levels is None:
        return bits
    if levels < 2:
        raise InputError(f"levels: wanted at least 2 or None, got {levels}")
    return bits + math.log2(levels)


def _check_classes(
    name: str, values: Tensor, *, count: int | None = None, classes: int | None = None
) -> None:
    """Check integers of shape (N,), N = `count` if given, in [0, `classes`) if given."""
    integral = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.ndim != 1 or not integral or len(values) == 0 or count not in (None, len(values)):
        wanted = f"({'N' if count is None else count},)"
        raise InputError(
            f"{name}: wanted integers of shape {wanted}, at least one, "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    if classes is not None and not (values.min() >= 0 and values.max() < classes):
        raise InputError(
            f"{name}: wanted classes in [0, {classes}), "
            f"got values from {values.min().item()} to {values.max().item()}"
        )
