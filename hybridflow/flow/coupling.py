"""Affine coupling with a bounded log-scale, and the flow's step: actnorm, then coupling."""

import torch
from torch import Tensor, nn

from hybridflow.flow.actnorm import ActNorm, per_channel

__all__ = ["AffineCoupling", "FlowStep", "conv_conditioner", "dense_conditioner"]


def conv_conditioner(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, ReLU, 3x3 convolution; the last layer starts at zero (an identity coupling)."""
    net = nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    )
    return _zero_last(net)


def dense_conditioner(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of ReLU units, for vectors; the last layer starts at zero."""
    net = nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )
    return _zero_last(net)


def _zero_last(net: nn.Sequential) -> nn.Sequential:
    last = net[-1]
    assert isinstance(last, nn.Conv2d | nn.Linear) and last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


def _sum_per_sample(s: Tensor) -> Tensor:
    return s.flatten(1).sum(1, dtype=torch.promote_types(s.dtype, torch.float32))


class AffineCoupling(nn.Module):
    """One half of the channels moves the other half by a scale and a shift.

        raw, shift = conditioner(x_i)
        s   = gain · tanh(raw)
        y_i = x_i,    y_t = x_t · exp(s) + shift,    log|det J| = Σ s

    The trained per-channel gain bounds the log-scale: |s| ≤ |gain|. With C channels, ⌈C/2⌉ are the
    identity half (i) and ⌊C/2⌋ are transformed (t); the transformed half comes last, or first with
    `flip`.

    Shapes: x, y (B, C, *spatial); conditioner's output (B, 2·⌊C/2⌋, *spatial), raw before shift;
    log-det (B,), in nats.
    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017, eq. 7–8.
    """

    def __init__(self, channels: int, conditioner: nn.Module, flip: bool = False) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(
                f"channels: got {channels}, want at least 2 (one half moves the other)"
            )
        self.channels = channels
        self.flip = flip
        self.conditioner = conditioner
        self.gain = nn.Parameter(torch.ones(channels // 2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Identity half (B, ⌈C/2⌉, *spatial) and transformed half (B, ⌊C/2⌋, *spatial) of x."""
        transformed = self.channels // 2
        if self.flip:
            return x[:, transformed:], x[:, :transformed]
        return x[:, : self.channels - transformed], x[:, self.channels - transformed :]

    def merge(self, identity: Tensor, transformed: Tensor) -> Tensor:
        """The inverse of `split`."""
        halves = (transformed, identity) if self.flip else (identity, transformed)
        return torch.cat(halves, dim=1)

    def scale_and_shift(self, identity: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale s and the shift that this identity half asks for."""
        raw, shift = self.conditioner(identity).to(identity.dtype).chunk(2, dim=1)
        return per_channel(self.gain, raw) * raw.tanh(), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        identity, transformed = self.split(x)
        s, shift = self.scale_and_shift(identity)
        return self.merge(identity, transformed * s.exp() + shift), _sum_per_sample(s)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        identity, transformed = self.split(y)
        s, shift = self.scale_and_shift(identity)
        return self.merge(identity, (transformed - shift) * (-s).exp()), -_sum_per_sample(s)


class FlowStep(nn.Module):
    """Actnorm, then affine coupling: the step a flow repeats.

    `forward` (data → latent) and `inverse` (latent → data) return the result and the log-det of the
    direction executed, added to `log_det` where one is given.

    Shapes: x, y (B, C, *spatial); log_det (B,), in nats.
    """

    def __init__(self, channels: int, conditioner: nn.Module, flip: bool = False) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.coupling = AffineCoupling(channels, conditioner, flip)

    def initialise(self, x: Tensor) -> None:
        """Initialise the actnorm from x, unless it is already."""
        if not self.actnorm.initialised:
            self.actnorm.initialise(x)

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, own = self.coupling(self.actnorm(x))
        own = own + self.actnorm.log_det(x)
        return y, own if log_det is None else log_det + own

    def inverse(self, y: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, own = self.coupling.inverse(y)
        own = own - self.actnorm.log_det(y)
        return self.actnorm.inverse(u), own if log_det is None else log_det + own
