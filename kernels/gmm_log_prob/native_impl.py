"""Launchers of native.cpp: contiguous CPU tensors in, tensors out, as in reference.py.

The library computes in float32; 16-bit operands are converted on the way in and their gradients on
the way out.
"""

import torch
from torch import Tensor

from .. import native

__all__ = ["backward", "forward"]


def forward(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    z, means, log_prior = z.float(), means.float(), log_prior.float()
    samples, classes = z.shape[0], means.shape[0]
    joint = z.new_empty(samples, classes)
    log_prob, posterior = z.new_empty(samples), z.new_empty(samples, classes)
    native.load().call(
        *("gmm_log_prob", z, means, log_prior, labels, samples, classes, z.shape[1]),
        *(joint, log_prob, posterior),
    )
    return joint, log_prob, posterior


def _chunk_rows(samples: int, classes: int) -> int:
    """Samples of which the first stage adds up the gradients of the means: by shape alone, so that
    sums do not depend on threads, and so many that its results take less memory than z."""
    return max(128, 2 * classes, -(-samples // 64))


def backward(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    z: Tensor,
    means: Tensor,
    log_prior: Tensor,
    posterior: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, size, classes = *z.shape, means.shape[0]
    values, centres = z.float(), means.float()
    rows = _chunk_rows(samples, classes)
    chunks = -(-samples // rows)
    scratch = values.new_empty(samples * classes + chunks * classes * (size + 1))
    grad_z, grad_means = torch.empty_like(values), torch.empty_like(centres)
    grad_log_prior = values.new_empty(classes)
    native.load().call(
        *("gmm_log_prob_backward", grad_joint, grad_log_prob, grad_posterior),
        *(values, centres, posterior, labels, samples, classes, size, rows, scratch),
        *(grad_z, grad_means, grad_log_prior),
    )
    return grad_z.to(z.dtype), grad_means.to(means.dtype), grad_log_prior.to(log_prior.dtype)
