"""What a classifier and a density are judged by.

torchmetrics takes one to two seconds to import, so the functions that use it import it themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.errors import InputError

__all__ = [
    "ReliabilityBins",
    "accuracy",
    "auroc",
    "bits_per_dim",
    "class_accuracy",
    "confusion_matrix",
    "expected_calibration_error",
    "fit_temperature",
    "mass_between_arms",
    "negative_log_likelihood",
    "reliability_bins",
]

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


def class_accuracy(confusion: Tensor) -> Tensor:
    r"""The accuracy on the images of each class, that is, the recall of the class.

    .. math:: a_k = \frac{M_{kk}}{\sum_b M_{kb}}

    Weighted by the classes' shares of the images they sum to the accuracy.

    Args:
        confusion: Counts M of shape (K, K), a row per true class, as `confusion_matrix` gives them.

    Returns:
        Fractions in [0, 1] of shape (K,), float64; NaN for a class without images.

    Example:
        >>> class_accuracy(torch.tensor([[3, 1], [0, 2]]))
        tensor([0.7500, 1.0000], dtype=torch.float64)
    """
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise InputError(f"confusion: wanted shape (K, K), got {tuple(confusion.shape)}")
    return confusion.diagonal().double() / confusion.sum(1)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    r"""The mean negative log-likelihood of the true class, in nats.

    .. math:: -\frac{1}{N} \sum_i \log \mathrm{softmax}(l_i)_{y_i}

    Args:
        logits: Logits l of shape (N, K).
        targets: True classes in [0, K), integers of shape (N,).

    Raises:
        InputError: The shapes do not fit, N is 0, or a class lies outside [0, K).

    Example:
        >>> negative_log_likelihood(torch.tensor([[0.0, 0.0]]), torch.tensor([1])) == math.log(2)
        True
    """
    _check_logits(logits, targets)
    return F.cross_entropy(logits.detach().double(), targets).item()


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    r"""The temperature that calibrates a classifier best, fitted on images it was not trained on.

    .. math:: T = \arg\min_T -\sum_i \log \mathrm{softmax}(l_i / T)_{y_i}

    It is above 1 for an overconfident classifier. Which class is the most probable does not depend
    on it, so the accuracy stays as it is. The objective is convex in 1/T, hence has one minimum in
    log T; this is sought in [-12, 12]. If each true class has the largest logit of its row, there
    is no minimum (the objective falls to 0 with T), and T is 1: nothing is changed.

    Args:
        logits: Logits l of shape (N, K).
        targets: True classes in [0, K), integers of shape (N,).

    Raises:
        InputError: The shapes do not fit, N is 0, or a class lies outside [0, K).

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    _check_logits(logits, targets)
    if torch.equal(logits.argmax(1), targets):
        return 1.0
    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits.double() / math.exp(log_t), targets),
        bounds=(-12, 12),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x)


def auroc(inside: Tensor, outside: Tensor) -> float:
    r"""How well a score tells two sets apart: the area under the ROC curve, in [0, 1].

    .. math:: P(s > s') + \tfrac{1}{2} P(s = s')

    for s drawn from `inside` and s' from `outside`: 1 if every score inside is larger than every
    score outside, 1/2 if the score tells nothing, below 1/2 if it is larger outside.

    Args:
        inside: Scores of shape (N,), N >= 1.
        outside: Scores of shape (M,), M >= 1.

    Raises:
        InputError: A shape does not fit, or a score is NaN.

    Example:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    from sklearn.metrics import roc_auc_score

    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or len(scores) == 0 or scores.isnan().any():
            raise InputError(
                f"{name}: wanted scores of shape (N,), at least one and none NaN, "
                f"got shape {tuple(scores.shape)}"
            )
    scores = torch.cat([inside, outside]).double()
    # scikit-learn takes no infinities; ranks are all that counts.
    ranks = scores.unique(return_inverse=True)[1]
    member = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(member.numpy(), ranks.cpu().numpy()))


def mass_between_arms(samples: Tensor, reference: Tensor, fresh: Tensor) -> float:
    r"""The share of samples that lie where the data have nothing, in [0, 1].

    .. math:: \frac{1}{N} \sum_i [d(x_i) > q], \qquad d(x) = \min_j \lVert x - r_j \rVert

    with r the reference points and q the 99.9 % quantile of d over fresh points of the data: of
    points of the data themselves about 0.1 % are so far from every other. Bridges between the arms
    of the data count, and so does what lies beyond their ends. The more reference points, the
    narrower their surroundings: compare figures of equally many only.

    Args:
        samples: Points of shape (N, D), N >= 1.
        reference: Many points of the data, of shape (R, D).
        fresh: Other points of the data, of shape (M, D).

    Raises:
        InputError: A shape does not fit, or a value is not finite.

    Example:
        >>> line = torch.linspace(0, 1, 101)[:, None]
        >>> mass_between_arms(torch.tensor([[0.5], [2.0]]), line, line + 0.003)
        0.5
    """
    from scipy.spatial import KDTree

    given = {"samples": samples, "reference": reference, "fresh": fresh}
    for name, points in given.items():
        fits = points.ndim == 2 and len(points) and points.shape[1] == reference.shape[-1]
        if not (fits and points.isfinite().all()):
            raise InputError(
                f"{name}: wanted finite points of shape (N, D), all of one D, "
                f"got shape {tuple(points.shape)}"
            )
    tree = KDTree(reference.detach().cpu().double().numpy())
    distances, of_data = (
        torch.from_numpy(tree.query(points.detach().cpu().double().numpy())[0])
        for points in (samples, fresh)
    )
    return (distances > of_data.quantile(0.999)).double().mean().item()


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows, for the bins of the confidence that hold images."""

    confidence: Tensor
    """Mean confidence of each bin: (b,), float64."""
    accuracy: Tensor
    """Accuracy of each bin: (b,), float64."""
    count: Tensor
    """Images in each bin: (b,), int64."""


def reliability_bins(probabilities: Tensor, targets: Tensor) -> ReliabilityBins:
    """Confidence and accuracy in the 15 bins of equal width of `expected_calibration_error`.

    Weighted by count, the distances |accuracy - confidence| have the calibration error as mean.

    Args:
        probabilities: Class probabilities of shape (N, K).
        targets: True classes in [0, K), integers of shape (N,).

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    _check_logits(probabilities, targets)
    confidence, predictions = probabilities.detach().double().max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    count = bins.bincount(minlength=CALIBRATION_BINS)
    hits = bins.bincount((predictions == targets).double(), minlength=CALIBRATION_BINS)
    total = bins.bincount(confidence, minlength=CALIBRATION_BINS)
    kept = count > 0
    return ReliabilityBins(total[kept] / count[kept], hits[kept] / count[kept], count[kept])


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


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    """Check floats of shape (N, K) and classes of shape (N,) in [0, K)."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise InputError(
            f"logits: wanted floats of shape (N, K), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    _check_classes("targets", targets, count=len(logits), classes=logits.shape[1])


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
