"""Flows as chains of steps: multi-scale for images, a plain chain for vectors."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from hybridflow.flow.coupling import FlowStep, conv_conditioner, dense_conditioner
from hybridflow.flow.reshape import depth_to_space, space_to_depth

__all__ = ["MultiScaleFlow", "StepChain", "VectorFlow"]


class StepChain(nn.Module):
    """Steps one after the other; `forward` and `inverse` as those of a step."""

    def __init__(self, steps: Iterable[FlowStep]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise each step from what those before it make of x; returns what all make of it."""
        for step in self._steps():
            step.initialise(x)
            x, _ = step(x)
        return x

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if log_det is None:
            log_det = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for step in self.steps:
            x, log_det = step(x, log_det)
        return x, log_det

    def inverse(self, y: Tensor) -> Tensor:
        for step in reversed(self._steps()):
            y, _ = step.inverse(y)
        return y

    def _steps(self) -> list[FlowStep]:
        return cast(list[FlowStep], list(self.steps))


class MultiScaleFlow(nn.Module):
    """Multi-scale RealNVP for images.

    Each scale: space-to-depth, then n steps (actnorm and coupling, the split alternating). Between
    two scales half of the channels is factored out into z_N. After the last scale: space-to-depth and
    one wide coupling, whose output, flattened, is z_K.

    Shapes: x (B, C, H, W) with H and W divisible by 2^(scales+1); z_K (B, d_K), z_N (B, d_N) with
    d_K = C·H·W / 2^(scales-1) and d_K + d_N = C·H·W; log-det (B,) in nats.
    Source: Dinh et al., *Density estimation using Real NVP*, ICLR 2017, section 3.6; sizes as in
    tables A.1–A.3 of the thesis the method comes from.

    Args:
        shape: (C, H, W) of one image.
        scales: number of scales, at least 1.
        couplings: steps per scale, n.
        hidden: channels of the conditioners' hidden layer.
        last_hidden: the same, in the last, wide coupling.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        scales: int,
        couplings: int,
        hidden: int,
        last_hidden: int,
    ) -> None:
        super().__init__()
        if scales < 1:
            raise ValueError(f"scales: got {scales}, want at least 1")
        channels, height, width = shape
        factor = 2 ** (scales + 1)
        if height % factor or width % factor:
            raise ValueError(
                f"shape: got {height}x{width} pixels, want multiples of {factor} for {scales} scales"
            )
        self.shape = shape
        self.scales = nn.ModuleList()
        for scale in range(scales):
            size = 2 ** (scale + 2) * channels
            self.scales.append(
                StepChain(_conv_step(size, hidden, flip=bool(i % 2)) for i in range(couplings))
            )
        self.last = _conv_step(2 ** (scales + 3) * channels, last_hidden, flip=False)

    @property
    def latent_sizes(self) -> tuple[int, int]:
        """(d_K, d_N)."""
        size = torch.Size(self.shape).numel()
        class_dependent = size >> (len(self.scales) - 1)
        return class_dependent, size - class_dependent

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every actnorm, each from what the layers before it make of x."""
        for i, chain in enumerate(self._chains()):
            if i > 0:
                x, _ = x.chunk(2, dim=1)
            x = chain.initialise(space_to_depth(x))
        self.last.initialise(space_to_depth(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x → (z_K, z_N, log|det ∂(z_K, z_N)/∂x|)."""
        log_det, rest = None, [x.new_empty(len(x), 0)]
        for i, chain in enumerate(self._chains()):
            if i > 0:
                x, out = x.chunk(2, dim=1)
                rest.append(out.flatten(1))
            x, log_det = chain(space_to_depth(x), log_det)
        x, log_det = self.last(space_to_depth(x), log_det)
        return x.flatten(1), torch.cat(rest, dim=1), log_det

    def inverse(self, z_k: Tensor, z_n: Tensor) -> Tensor:
        """(z_K, z_N) → x, the inverse of `forward`."""
        _, height, width = self.shape
        shrink = 2 ** (len(self.scales) + 1)
        x, _ = self.last.inverse(z_k.view(len(z_k), -1, height // shrink, width // shrink))
        x, end = depth_to_space(x), z_n.shape[1]
        for i, chain in reversed(list(enumerate(self._chains()))):
            x = depth_to_space(chain.inverse(x))
            if i > 0:
                start = end - x.shape[1:].numel()
                x = torch.cat((x, z_n[:, start:end].view(x.shape)), dim=1)
                end = start
        return x

    def _chains(self) -> list[StepChain]:
        return cast(list[StepChain], list(self.scales))


class VectorFlow(nn.Module):
    """A chain of steps with dense conditioners for vectors; nothing is factored out, so z_N is empty.

    Shapes: x (B, D); z_K (B, D), z_N (B, 0); log-det (B,) in nats.

    Args:
        size: D, at least 2.
        couplings: number of steps.
        hidden: width of the conditioners' two hidden layers.
    """

    def __init__(self, size: int, couplings: int, hidden: int) -> None:
        super().__init__()
        self.size = size
        identity, transformed = (size + 1) // 2, size // 2
        self.chain = StepChain(
            FlowStep(size, dense_conditioner(identity, hidden, 2 * transformed), flip=bool(i % 2))
            for i in range(couplings)
        )

    @property
    def latent_sizes(self) -> tuple[int, int]:
        """(d_K, d_N) = (D, 0)."""
        return self.size, 0

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every actnorm, each from what the layers before it make of x."""
        self.chain.initialise(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x → (z_K, z_N, log|det ∂z_K/∂x|)."""
        z, log_det = self.chain(x)
        return z, x.new_empty(len(x), 0), log_det

    def inverse(self, z_k: Tensor, z_n: Tensor) -> Tensor:
        """(z_K, z_N) → x, the inverse of `forward`."""
        return self.chain.inverse(z_k)


def _conv_step(channels: int, hidden: int, flip: bool) -> FlowStep:
    identity, transformed = (channels + 1) // 2, channels // 2
    return FlowStep(channels, conv_conditioner(identity, hidden, 2 * transformed), flip)
