"""From grey levels to the real line: uniform dequantisation, then the logit."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LogitTransform", "dequantise"]


def dequantise(x: Tensor, levels: int | None) -> Tensor:
    """(x + u) / levels with u ~ U[0, 1): grey levels 0 … levels-1 (uint8) → float32 in [0, 1).

    Continuous data (`levels` None) are returned as they are.
    Source: Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, ICLR 2016.
    """
    if levels is None:
        return x
    return (x.float() + torch.rand(x.shape, device=x.device)) / levels


class LogitTransform(nn.Module):
    """y = logit(α + (1 - 2α)·x), x in [0, 1].

        log|det J| = Σ ln(1 - 2α) + softplus(y) + softplus(-y)

    Shapes: x, y (B, …); log-det (B,), in nats.
    Source: Dinh et al., *Density estimation using Real NVP*, ICLR 2017, section 4.1 (α = 0.05).
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = 1 - 2 * self.alpha
        y = (self.alpha + slope * x).logit()
        log_slope = math.log(slope)
        return y, (F.softplus(y) + F.softplus(-y) + log_slope).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """y → x; x lies in [-α/(1-2α), 1 + α/(1-2α)]."""
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
