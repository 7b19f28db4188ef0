"""The op: implementations bound into custom operators, autograd and the public function."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, first_order, operator
from . import native_impl, reference

__all__ = ["GmmLogProb", "gmm_log_prob"]


class GmmLogProb(NamedTuple):
    """What `gmm_log_prob` returns, in nats: joint (B, K), log_prob (B,), posterior (B, K)."""

    joint: Tensor
    log_prob: Tensor
    posterior: Tensor


def _implementation(x: Tensor, *others: Tensor) -> ModuleType:
    backend = _backend.choose(x, *others)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_range(labels: Tensor, classes: int) -> None:
    """On the CPU only: elsewhere reading them would stop the host."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < -1 or high >= classes:
        wrong = low if low < -1 else high
        raise ValueError(f"labels: got {wrong}, want classes from 0 to {classes - 1}, or -1")


def _forward_body(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if labels is not None:
        _check_range(labels, means.shape[0])
    operands = z.contiguous(), means.contiguous(), log_prior.contiguous()
    return _implementation(*operands).forward(*operands, _contiguous(labels))


def _forward_fake(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, samples, classes = reference.accumulate_dtype(z), z.shape[0], means.shape[0]
    joint = z.new_empty(samples, classes, dtype=dtype)
    return joint, z.new_empty(samples, dtype=dtype), torch.empty_like(joint)


def _backward_body(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    z: Tensor,
    means: Tensor,
    log_prior: Tensor,
    posterior: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = z.contiguous(), means.contiguous(), log_prior, posterior.contiguous()
    return _implementation(*operands).backward(
        *map(_contiguous, (grad_joint, grad_log_prob, grad_posterior)),
        *operands,
        _contiguous(labels),
    )


def _backward_fake(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    z: Tensor,
    means: Tensor,
    log_prior: Tensor,
    posterior: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), means.new_empty(means.shape), log_prior.new_empty(log_prior.shape)


_forward = operator("gmm_log_prob", _forward_body, _forward_fake)
_backward = operator("gmm_log_prob_backward", _backward_body, _backward_fake)


class _GmmLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        results = _forward(z, means, log_prior, labels)
        ctx.save_for_backward(z, means, log_prior, results[2], labels)
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(*grads, *ctx.saved_tensors), None


def gmm_log_prob(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None = None
) -> GmmLogProb:
    """Log-density of a mixture with one Gaussian of unit covariance per class.

        joint[b, k]  = log π_k - (‖z_b - μ_k‖² + d·ln 2π) / 2
        log_prob[b]  = logsumexp_k joint[b, k], or joint[b, y_b] where the row has a label
        posterior[b] = softmax_k joint[b, k], label or not

    Differentiable once, with respect to z, means and log_prior, through all three results.

    Args:
        z: (B, d).
        means: μ, (K, d).
        log_prior: log π, (K,), in nats; taken as given, whatever it sums to.
        labels: (B,), int64: a class, or -1 for a row without a label; None: no row has one. On the
            CPU a label out of range is an error. On other devices it is not looked at, since that
            would stop the host: log_prob of its row then means nothing.

    Returns:
        joint (B, K), log_prob (B,) and posterior (B, K), in nats: float64 for float64 z and float32
        for all others.

    Raises:
        ValueError: a shape, type or device does not fit, or a label is out of range.

    Source: Izmailov et al., *Semi-supervised learning with normalizing flows*, ICML 2020.
    """
    if z.dim() != 2:
        raise ValueError(f"z: got shape {tuple(z.shape)}, want (B, d)")
    check_float("z", z)
    classes = means.shape[0] if means.dim() else 0
    if classes == 0:
        raise ValueError(f"means: got shape {tuple(means.shape)}, want (K, d) with K at least 1")
    check("means", means, (classes, z.shape[1]), z)
    check("log_prior", log_prior, (classes,), z)
    if labels is not None:
        check("labels", labels, (z.shape[0],), z, torch.int64)
    return GmmLogProb(*_GmmLogProb.apply(z, means, log_prior, labels))
