"""Launchers of native.cpp: contiguous CPU tensors in, tensors out, as in reference.py."""

import torch
from torch import Tensor

from .. import native
from .reference import spread

__all__ = ["backward", "forward"]


def forward(means: Tensor, seed: Tensor, count: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    mu = means.float()
    classes, size = mu.shape
    z, labels = mu.new_empty(count, size), mu.new_empty(count, classes)
    pair = seed.new_empty(count, 2)
    sizes = count, classes, size
    native.load().call("boundary_sample", mu, seed, z, labels, pair, *sizes, beta, spread(beta))
    return z, labels, pair


def backward(
    grad_z: Tensor,
    grad_labels: Tensor,
    z: Tensor,
    labels: Tensor,
    pair: Tensor,
    means: Tensor,
    beta: float,
) -> Tensor:
    mu = means.float()
    count, sizes = z.shape[0], mu.shape
    chunk = max(64, -(-count // 32))  # of the shape alone, so that sums do not depend on threads
    partials = mu.new_empty(-(-count // chunk), *sizes)
    grad_means = torch.empty_like(mu)
    operands = grad_z, grad_labels, z, labels, pair, mu
    scratch = torch.empty_like(labels), partials
    native.load().call(
        "boundary_sample_backward", *operands, *scratch, grad_means, count, *sizes, chunk, beta
    )
    return grad_means.to(means.dtype)
