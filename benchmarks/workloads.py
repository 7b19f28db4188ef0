"""The flows of the presets at the sizes that the benchmarks measure, and the work that is in them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hybridflow.config import PRESETS, Config
from hybridflow.networks import build_model

__all__ = ["CLASSES", "FLOWS", "Workload", "stir"]

CLASSES = 10
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Workload:
    """A preset at a batch size, on images of this shape; a step takes `images` labelled and unlabelled
    ones, or as many as the preset says."""

    data: str
    preset: str
    batch: int
    shape: tuple[int, int, int]
    images: tuple[int, int] | None = None

    @property
    def config(self) -> Config:
        config = PRESETS[self.preset]
        if self.images is None:
            return config
        labelled, unlabelled = self.images
        return replace(config, batch_labelled=labelled, batch_unlabelled=unlabelled)

    def flops(self, task: str) -> int:
        """Of the conditioners, taps outside of the image counted: three times as many with a backward."""
        one = sum(2 * positions * layer.weight.numel() for layer, positions in self._layers())
        return one * self.batch * (1 if task == "sampling" else 3)

    def traffic(self, task: str) -> int:
        """Least bytes to be moved in float32, a kernel per coupling: forward its input, its output and
        the weights; backward its output and both gradients, the weights and their gradient."""
        backward = task != "sampling"
        elements = weights = 0
        for i, (layer, positions) in enumerate(self._layers()):
            weights += layer.weight.numel()
            if i % 2 == 0:  # the conditioner's first layer, which sees half of the channels
                elements += 2 * layer.in_channels * positions
        passes, uses = (5, 3) if backward else (2, 1)
        return _FLOAT * (passes * self.batch * elements + uses * weights)

    def _layers(self) -> list[tuple[nn.Conv2d, int]]:
        """The convolutions in the order of their use, and the positions of each one's output."""
        found: list[tuple[nn.Conv2d, int]] = []

        def note(layer: nn.Module, _: object, y: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d)
            found.append((layer, y[0, 0].numel()))

        flow = build_model(self.config.flow, torch.Size(self.shape), CLASSES).flow
        for module in flow.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        with torch.no_grad():
            flow(torch.zeros(1, *self.shape))
        return found


FLOWS = (
    Workload("MNIST", "mnist", 300, (1, 32, 32)),
    Workload("CIFAR-10", "cifar10", 64, (3, 32, 32)),
    Workload("SVHN", "svhn", 64, (3, 32, 32)),
    Workload("digits", "digits", 300, (1, 8, 8)),
)


@torch.no_grad()
def stir(flow: nn.Module) -> None:
    """Make the weights random, since as a flow is born its couplings do nothing: mildly, for a flow of
    dozens of wild couplings makes a rounding as large as its results."""
    for parameter in flow.parameters():
        fan_in = parameter[0].numel() if parameter.dim() == 4 else 100
        parameter += 0.2 * torch.randn_like(parameter) / fan_in**0.5
