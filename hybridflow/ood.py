"""Out-of-distribution detection: how well scores tell images of the data set from those of another."""

from torch import Tensor

from hybridflow.data import Dataset
from hybridflow.errors import InputError
from hybridflow.metrics import auroc
from hybridflow.prediction import Prediction

__all__ = ["SCORES", "check_comparable", "ood_aurocs", "ood_scores"]

SCORES = ("log_prob", "typicality", "discriminator_lse")


def ood_scores(prediction: Prediction, mean_log_prob: float) -> dict[str, Tensor]:
    """Scores of images, each of shape (N,), larger for an image more like those of the data set.

    log_prob: log p(x), in nats. Simple images of another data set may score higher than the data's
        own (Nalisnick et al., 2019a).
    typicality: -|log p(x) - m|, in nats, m the mean of log p over images of the data set: the
        typicality test for one image (2019b).
    discriminator_lse: LSE(x) = logsumexp_k l_k(x), the logit of p_φ(real | x).

    Args:
        prediction: what the run says of the images.
        mean_log_prob: m, in nats, over images that were not trained on.

    Sources: Nalisnick et al., "Do Deep Generative Models Know What They Don't Know?", ICLR 2019 (a);
        "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality",
        arXiv:1906.02994, 2019 (b).
    """
    log_prob = prediction.log_prob.double()
    return {
        "log_prob": log_prob,
        "typicality": -(log_prob - mean_log_prob).abs(),
        "discriminator_lse": prediction.discriminator_logits.double().logsumexp(1),
    }


def ood_aurocs(inside: Prediction, outside: Prediction, reference: Prediction) -> dict[str, float]:
    """AUROC of each of `SCORES`, images of the data set being the positives.

    Args:
        inside: images of the data set.
        outside: images of another.
        reference: images of the data set that were held out; the mean of their log p(x) is the
            typical one.
    """
    mean_log_prob = reference.log_prob.double().mean().item()
    ours, theirs = ood_scores(inside, mean_log_prob), ood_scores(outside, mean_log_prob)
    return {name: auroc(ours[name], theirs[name]) for name in SCORES}


def check_comparable(dataset: Dataset, other: Dataset) -> None:
    """Check that the images of two data sets have one shape.

    Raises:
        InputError: they have not.
    """
    ours, theirs = tuple(dataset.test_x.shape[1:]), tuple(other.test_x.shape[1:])
    if ours != theirs:
        raise InputError(
            f"--against: got {other.name}, of shape {theirs}; "
            f"want a data set of the shape of {dataset.name}, {ours}"
        )
