"""The op: implementations bound into custom operators, autograd and the public function."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check_float, first_order, operator
from .._philox import choose_seed
from . import native_impl, reference

__all__ = ["boundary_sample"]


def _implementation(x: Tensor, *others: Tensor) -> ModuleType:
    backend = _backend.choose(x, *others)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


def _forward_body(
    means: Tensor, seed: Tensor, count: int, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(means).forward(means.contiguous(), seed, count, beta)


def _backward_body(
    grad_z: Tensor,
    grad_labels: Tensor,
    z: Tensor,
    labels: Tensor,
    pair: Tensor,
    means: Tensor,
    beta: float,
) -> Tensor:
    operands = [t.contiguous() for t in (grad_z, grad_labels, z, labels, pair, means)]
    return _implementation(means).backward(*operands, beta)


def _forward_fake(
    means: Tensor, seed: Tensor, count: int, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulate_dtype(means)
    z = means.new_empty(count, means.shape[1], dtype=dtype)
    return z, z.new_empty(count, means.shape[0]), seed.new_empty(count, 2)


def _backward_fake(
    grad_z: Tensor,
    grad_labels: Tensor,
    z: Tensor,
    labels: Tensor,
    pair: Tensor,
    means: Tensor,
    beta: float,
) -> Tensor:
    return means.new_empty(means.shape)


_forward = operator("boundary_sample", _forward_body, _forward_fake)
_backward = operator("boundary_sample_backward", _backward_body, _backward_fake)


class _BoundarySample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, means: Tensor, seed: Tensor, count: int, beta: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        z, labels, pair = _forward(means, seed, count, beta)
        ctx.save_for_backward(z, labels, pair, means)
        ctx.beta = beta
        return z, labels

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_labels: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z, labels, pair, means = ctx.saved_tensors
        grad_z = torch.zeros_like(z) if grad_z is None else grad_z
        grad_labels = torch.zeros_like(labels) if grad_labels is None else grad_labels
        grad_means = _backward(grad_z, grad_labels, z, labels, pair, means, ctx.beta)
        return grad_means, None, None, None


def boundary_sample(
    means: Tensor, count: int, *, beta: float = 0.5, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Latents between two classes of a mixture, and the classes they belong to.

        a ≠ b uniform,  z_a ~ N(μ_a, I),  z_b ~ N(μ_b, I)
        z' = β z_a + (1 - β) z_b,    y' = softmax_k log N(z'; μ_k, I)

    Differentiable with respect to the means, through both results.

    Args:
        means: μ, (K, d), floating, K at least 2.
        count: number of samples, B.
        beta: β; ½ is half way, 1 is sampling from one class.
        seed: a scalar int64 tensor on the device of means; the same seed gives the same samples in
            every implementation, to rounding. Drawn from torch's default generator if None.

    Returns:
        z' (B, d) and y' (B, K), float32 (float64 for float64 means).

    Raises:
        ValueError: a shape, type, device or number does not fit.

    Source: V. Sham, *Semi-Supervised Learning with Hybrid Generative Models*, 2025, Eq. 4.6.
    """
    if means.dim() != 2 or means.shape[0] < 2 or means.shape[1] < 1:
        raise ValueError(f"means: got shape {tuple(means.shape)}, want (K, d) with K at least 2")
    check_float("means", means)
    if count < 0:
        raise ValueError(f"count: got {count}, want at least 0")
    if not abs(beta) < float("inf"):
        raise ValueError(f"beta: got {beta}, want a finite number")
    return _BoundarySample.apply(means, choose_seed(seed, means), count, float(beta))
