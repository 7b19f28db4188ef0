"""The generative model: preprocessing, flow and Gaussian mixture, as one density."""

import torch
from torch import Tensor, nn

from hybridflow.flow.multiscale import MultiScaleFlow, VectorFlow
from hybridflow.flow.preprocess import LogitTransform
from hybridflow.flow.prior import GaussianMixture, standard_normal_log_prob

__all__ = ["MixtureFlow"]


class MixtureFlow(nn.Module):
    """A flow with one Gaussian per class in its class-dependent latent.

        log p(x | k) = log N(z_K; μ_k, I) + log N(z_N; 0, I) + log|det ∂(z_K, z_N)/∂x|
        log p(x)     = logsumexp_k [log p(x | k) + log π_k]
        p(k | x)     = softmax_k [log N(z_K; μ_k, I) + log π_k]

    Images are given as values in [0, 1] and pass a logit first; vectors enter the flow as they are.
    Source: Izmailov et al., *Semi-supervised learning with normalizing flows*, ICML 2020.

    Args:
        flow: the bijection.
        classes: K.
        logit: whether x passes a `LogitTransform` first.
    """

    def __init__(self, flow: MultiScaleFlow | VectorFlow, classes: int, logit: bool) -> None:
        super().__init__()
        self.flow = flow
        self.preprocess = LogitTransform() if logit else None
        self.prior = GaussianMixture(classes, flow.latent_sizes[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, …) → (z_K, z_N, log-det), data → latent."""
        if self.preprocess is None:
            return self.flow(x)
        x, own = self.preprocess(x)
        z_k, z_n, log_det = self.flow(x)
        return z_k, z_n, log_det + own

    def inverse(self, z_k: Tensor, z_n: Tensor) -> Tensor:
        """(z_K, z_N) → x, latent → data."""
        x = self.flow.inverse(z_k, z_n)
        return x if self.preprocess is None else self.preprocess.inverse(x)

    def joint_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | k) + log π_k for every k: (B, K), in nats; logsumexp gives log p(x)."""
        z_k, z_n, log_det = self(x)
        return self.prior.joint_log_prob(z_k) + (standard_normal_log_prob(z_n) + log_det)[:, None]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): (B,), in nats."""
        return self.joint_log_prob(x).logsumexp(1)

    def class_logits(self, x: Tensor) -> Tensor:
        """Logits of p(k | x): (B, K)."""
        return self.prior.joint_log_prob(self(x)[0])

    @torch.no_grad()
    def sample(self, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """One x per label (B,): z_K ~ N(μ_y, T²I), z_N ~ N(0, T²I)."""
        size = (len(labels), self.flow.latent_sizes[1])
        means = self.prior.means[labels]
        z_k = means + temperature * torch.randn_like(means)
        return self.inverse(z_k, temperature * torch.randn(size, device=means.device))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every actnorm of the flow from a batch x."""
        self.flow.initialise(x if self.preprocess is None else self.preprocess(x)[0])
