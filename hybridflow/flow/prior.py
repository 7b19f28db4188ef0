"""The latent prior: a Gaussian mixture over z_K and a standard normal over z_N."""

import math

import torch
from torch import Tensor, nn

__all__ = ["GaussianMixture", "standard_normal_log_prob"]


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) = -(‖z‖² + d·ln 2π) / 2 for z (B, d); returns (B,), in nats."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


class GaussianMixture(nn.Module):
    """A mixture with one Gaussian of unit covariance per class.

        log p(z, k) = log π_k - (‖z - μ_k‖² + d·ln 2π) / 2,    π = softmax(logits)

    Means and class prior are trained.

    Shapes: z (B, d); means (K, d); logits (K,).
    Source: Izmailov et al., *Semi-supervised learning with normalizing flows*, ICML 2020.
    """

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(classes, size))
        self.logits = nn.Parameter(torch.zeros(classes))

    def component_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; μ_k, I) for every k: (B, K), in nats.

        ‖z - μ‖² is expanded as ‖z‖² - 2 zμᵀ + ‖μ‖², both taken relative to the mean of the means:
        far from the origin the expansion would cancel. Autocast is off, for the same reason.
        """
        with torch.autocast(z.device.type, enabled=False):
            centre = self.means.mean(0)
            z, means = z - centre, self.means - centre
            squared = z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)
        return -0.5 * (squared + z.shape[1] * math.log(2 * math.pi))

    def log_prior(self) -> Tensor:
        """log π_k: (K,)."""
        return self.logits.log_softmax(0)

    def joint_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; μ_k, I) + log π_k for every k: (B, K), in nats. Its softmax is p(k | z)."""
        return self.component_log_prob(z) + self.log_prior()

    @torch.no_grad()
    def initialise(self, means: Tensor) -> None:
        """Start from these means (K, d)."""
        self.means.copy_(means)
