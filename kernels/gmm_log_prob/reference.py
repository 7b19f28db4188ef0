"""The mixture's log-density in plain PyTorch: the specification of this op.

Works on any device and floating type. Arithmetic and results are float64 for float64 z and float32
for all others; gradients have the type of their operand. ‖z - μ‖² is expanded into products of z and
μ relative to the mean of the means c, so that B·K·d elements are never held and a distance from the
origin costs no digits. Symbols and derivation: README.md.
"""

import math

import torch
from torch import Tensor

__all__ = ["accumulate_dtype", "backward", "forward", "joint_gradient"]


def accumulate_dtype(z: Tensor) -> torch.dtype:
    """The type of arithmetic and results."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _centred(z: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(z)
    z, means = z.to(dtype), means.to(dtype)
    centre = means.mean(0)
    return z - centre, means - centre


def forward(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """joint (B, K), log_prob (B,), posterior (B, K)."""
    with torch.autocast(z.device.type, enabled=False):
        z, means = _centred(z, means)
        products = z @ means.T
    squared = z.square().sum(1, keepdim=True) - 2 * products + means.square().sum(1)
    constant = z.shape[1] * math.log(2 * math.pi)
    joint = log_prior.to(z.dtype) - 0.5 * (squared.clamp_min(0) + constant)
    log_prob = joint.logsumexp(1)
    if labels is not None:
        own = joint.gather(1, labels.clamp(0, means.shape[0] - 1)[:, None])[:, 0]
        log_prob = torch.where(labels < 0, log_prob, own)
    return joint, log_prob, joint.softmax(1)


def joint_gradient(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    posterior: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """G (B, K): what reaches the joint from all three outputs; None counts as zero."""
    total = torch.zeros_like(posterior) if grad_joint is None else grad_joint
    if grad_log_prob is not None:
        share = posterior
        if labels is not None:
            classes = torch.arange(posterior.shape[1], device=posterior.device)
            own = (classes == labels[:, None]).to(posterior.dtype)
            share = torch.where(labels[:, None] < 0, posterior, own)
        total = total + grad_log_prob[:, None] * share
    if grad_posterior is not None:
        mean = (posterior * grad_posterior).sum(1, keepdim=True)
        total = total + posterior * (grad_posterior - mean)
    return total


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
    """Gradients of z, means and log_prior."""
    total = joint_gradient(grad_joint, grad_log_prob, grad_posterior, posterior, labels)
    with torch.autocast(z.device.type, enabled=False):
        near, centres = _centred(z, means)
        grad_z = total @ centres - near * total.sum(1, keepdim=True)
        grad_means = total.T @ near - centres * total.sum(0)[:, None]
    return grad_z.to(z.dtype), grad_means.to(means.dtype), total.sum(0).to(log_prior.dtype)
