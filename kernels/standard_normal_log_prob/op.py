"""The op: implementations bound into custom operators, autograd and the public function."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, first_order, operator
from . import native_impl, reference

__all__ = ["standard_normal_log_prob"]


def _implementation(x: Tensor, *others: Tensor | None) -> ModuleType:
    backend = _backend.choose(x, *others)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


def _dense(z: Tensor) -> Tensor:
    """With the elements of a sample side by side: in which order they lie is all one to a sum."""
    if z.is_contiguous():
        return z
    if z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last):
        return z
    return z.contiguous()


def _forward_body(z: Tensor, log_det: Tensor | None) -> Tensor:
    z = _dense(z)
    return _implementation(z, log_det).forward(z, None if log_det is None else log_det.contiguous())


def _forward_fake(z: Tensor, log_det: Tensor | None) -> Tensor:
    return z.new_empty(z.shape[0], dtype=reference.accumulate_dtype(z))


def _backward_body(grad: Tensor, z: Tensor) -> Tensor:
    z = _dense(z)
    return _implementation(z, grad).backward(grad.contiguous(), z)


def _backward_fake(grad: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(_dense(z))


_forward = operator("standard_normal_log_prob", _forward_body, _forward_fake)
_backward = operator("standard_normal_log_prob_backward", _backward_body, _backward_fake)


class _StandardNormalLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_det: Tensor | None) -> Tensor:
        ctx.save_for_backward(z)
        return _forward(z, log_det)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        needs_z, needs_log_det = ctx.needs_input_grad
        return (
            _backward(grad, *ctx.saved_tensors) if needs_z else None,
            grad if needs_log_det else None,
        )


def standard_normal_log_prob(z: Tensor, log_det: Tensor | None = None) -> Tensor:
    """Log-density of the standard normal, added to a log-det.

        log N(z; 0, I) + log_det = -(‖z‖² + d·ln 2π) / 2 + log_det

    Differentiable once, with respect to z and log_det.

    Args:
        z: (B, *dims), with d elements a sample. Contiguous and channels-last tensors are used as
            they are, any other is copied.
        log_det: (B,) in nats, float32 (float64 for float64 z); None counts as zero.

    Returns:
        (B,), in nats: float64 for float64 z and float32 for all others.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    if z.dim() == 0:
        raise ValueError("z: got shape (), want (B, *dims)")
    check_float("z", z)
    if log_det is not None:
        check("log_det", log_det, (z.shape[0],), z, reference.accumulate_dtype(z))
    return _StandardNormalLogProb.apply(z, log_det)
