"""Activation normalisation with data-dependent initialisation."""

import torch
from torch import Tensor, nn

__all__ = ["ActNorm", "per_channel"]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts over x of shape (B, C, *spatial)."""
    return v.view(-1, *(1,) * (x.dim() - 2))


class ActNorm(nn.Module):
    """A per-channel affine map, initialised so that its first batch leaves it standardised.

        y = x · exp(log_scale) + bias,    log|det J| = S · Σ_c log_scale_c

    with S the number of spatial positions. `initialise` sets both parameters from a batch and raises
    the flag `initialised`, a buffer: it is saved with the parameters, so a loaded model is never
    initialised again. `forward` reads no flag, which keeps it free of host reads; until `initialise`
    is called the layer is the identity.

    The variance is floored, so a constant channel and a batch of one give a finite scale.

    Shapes: x, y (B, C, *spatial); log-det (B,), in nats.
    Source: Kingma and Dhariwal, *Glow*, NeurIPS 2018, section 3.1.

    Args:
        channels: C.
        variance_floor: smallest variance a channel is divided by.
    """

    initialised: Tensor

    def __init__(self, channels: int, variance_floor: float = 1e-4) -> None:
        super().__init__()
        self.variance_floor = variance_floor
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set scale and bias so that this batch (B, C, *spatial) has mean 0 and variance 1 per channel."""
        axes = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, dim=axes, correction=0)
        log_scale = -0.5 * variance.clamp_min(self.variance_floor).log()
        self.log_scale.copy_(log_scale)
        self.bias.copy_(-mean * log_scale.exp())
        self.initialised.fill_(True)

    def log_det(self, x: Tensor) -> Tensor:
        """Log-det of `forward`, the same for every sample: a 0-d tensor, in nats."""
        return self.log_scale.sum() * x.shape[2:].numel()

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel(self.log_scale.exp(), x) + per_channel(self.bias, x)

    def inverse(self, y: Tensor) -> Tensor:
        return (y - per_channel(self.bias, y)) * per_channel((-self.log_scale).exp(), y)
