"""A classifier that knows nothing of the run, to judge its class-conditional samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridflow.data import Batches, Dataset, iterate
from hybridflow.metrics import accuracy
from hybridflow.prediction import bin_centres

__all__ = ["CLASSIFIER_STEPS", "Classifier", "sample_accuracy", "train_classifier"]

CLASSIFIER_STEPS = 1000
_BATCH = 128


@dataclass(frozen=True)
class Classifier:
    """A trained classifier and how good it is."""

    network: nn.Module
    """x in [0, 1] (B, C, H, W), or (B, D) → logits (B, K); in evaluation mode."""
    levels: int | None
    """Grey levels of the images it was trained on."""
    test_accuracy: float
    """Its accuracy on the test images of its data set."""

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """The classes (N,) of grey levels, or of continuous data, (N, …); on the CPU."""
        device = next(self.network.parameters()).device
        batches = (bin_centres(b.to(device), self.levels) for b in x.split(1000))
        return torch.cat([self.network(b).argmax(1).cpu() for b in batches])


def train_classifier(
    dataset: Dataset, device: torch.device, *, steps: int = CLASSIFIER_STEPS, seed: int = 0
) -> Classifier:
    """Train a small network on all training images of a data set, with all their labels.

    Three 3×3 convolutions of stride 2 and 32, 64 and 128 channels, with batch normalisation; for
    vectors two dense layers of 128. Adam with a one-cycle learning rate up to 3e-3, batches of 128, no
    augmentation. The same seed gives the same network on the same device and
    number of threads; the random state is left as it was.
    """
    with _seeded(seed, device):
        network = _network(dataset.train_x.shape[1:], dataset.classes).to(device)
        batches = Batches(dataset.train_x, dataset.train_y, _BATCH, device=device)
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps + 1)
        for step in range(steps):
            if step % batches.steps_per_epoch == 0:
                batches.shuffle()
            x, y = batches.next()
            assert y is not None
            optimiser.zero_grad()
            F.cross_entropy(network(bin_centres(x, dataset.levels)), y).backward()
            optimiser.step()
            schedule.step()
    classifier = Classifier(network.eval(), dataset.levels, test_accuracy=0.0)
    predicted = [classifier.classify(x) for x, _ in iterate(dataset.test_x, dataset.test_y, 1000)]
    return Classifier(network, dataset.levels, accuracy(torch.cat(predicted), dataset.test_y))


def sample_accuracy(classifier: Classifier, samples: Tensor, labels: Tensor) -> float:
    """The share of samples that the classifier takes for the class they were drawn for.

    Samples are rounded down to the grey levels that the classifier was trained on. Bounded by what
    the classifier can do: its `test_accuracy` belongs beside it.

    Args:
        classifier: the judge.
        samples: (N, C, H, W) in [0, 1], what lies outside being clamped, or (N, D).
        labels: (N,), the class each was drawn for.

    Source: "GAN-test" of Shmelkov, Schmid and Alahari, "How good is my GAN?", ECCV 2018.
    """
    levels = classifier.levels
    if levels is not None:
        samples = (samples * levels).floor().clamp(0, levels - 1)
    return accuracy(classifier.classify(samples), labels.cpu())


def _network(shape: torch.Size, classes: int) -> nn.Module:
    if len(shape) == 1:
        hidden = [nn.Linear(shape[0], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(128, classes))
    layers: list[nn.Module] = []
    channels, height, width = shape
    for outputs in (32, 64, 128):
        conv = nn.Conv2d(channels, outputs, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        channels, height, width = outputs, -(-height // 2), -(-width // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own, and deterministic convolutions."""
    cuda = device.type == "cuda"
    with (
        torch.random.fork_rng([device] if cuda else []),
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
    ):
        torch.manual_seed(seed)
        yield
