"""Latents between two classes and their soft labels in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors. Arithmetic is float64 for float64 means and float32
for all others, and so are the results. Symbols and derivations: README.md.
"""

import math

import torch
from torch import Tensor

from .. import _philox

__all__ = ["accumulate_dtype", "backward", "forward", "spread"]

_CLASSES = 1  # the stream of random words; the normals are of stream 0


def accumulate_dtype(means: Tensor) -> torch.dtype:
    """Type of the arithmetic and of the results: float64 for float64, else float32."""
    return torch.float64 if means.dtype == torch.float64 else torch.float32


def spread(beta: float) -> float:
    """Standard deviation of β ε_a + (1 - β) ε_b."""
    return math.hypot(beta, 1 - beta)


def _draw_classes(seed: Tensor, count: int, classes: int) -> Tensor:
    """(count, 2): two different classes each."""
    block = torch.arange(count, device=seed.device)
    first, second, _, _ = _philox.philox(seed, block, _CLASSES)
    a = _philox.below(first, classes)
    b = (a + 1 + _philox.below(second, classes - 1)) % classes
    return torch.stack((a, b), dim=1)


def forward(means: Tensor, seed: Tensor, count: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """z' (count, d), y' (count, K) and the classes a and b (count, 2)."""
    mu = means.to(accumulate_dtype(means))
    pair = _draw_classes(seed, count, means.shape[0])
    noise = _philox.normals(seed, count, means.shape[1], mu.dtype)
    z = beta * mu[pair[:, 0]] + (1 - beta) * mu[pair[:, 1]] + spread(beta) * noise
    squared = (z[:, None] - mu).square().sum(2)
    return z, (-0.5 * squared).softmax(1), pair


def backward(
    grad_z: Tensor,
    grad_labels: Tensor,
    z: Tensor,
    labels: Tensor,
    pair: Tensor,
    means: Tensor,
    beta: float,
) -> Tensor:
    """The gradient of the means."""
    mu = means.to(accumulate_dtype(means))
    grad_logits = labels * (grad_labels - (labels * grad_labels).sum(1, keepdim=True))
    pull = grad_logits[:, :, None] * (mu - z[:, None])
    grad_z = grad_z + pull.sum(1)
    shares = torch.zeros_like(labels)
    shares.scatter_(1, pair[:, :1], beta).scatter_(1, pair[:, 1:], 1 - beta)
    return (shares.T @ grad_z - pull.sum(0)).to(means.dtype)
