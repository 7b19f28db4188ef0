"""The op: implementations bound into custom operators, autograd and the public functions."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, contiguous, first_order, operator
from .._philox import choose_seed
from . import native_impl, reference

__all__ = ["dequantize_logit", "logit_transform", "logit_transform_inverse"]


def _implementation(x: Tensor, *others: Tensor | None) -> ModuleType:
    backend = _backend.choose(x, *others)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


# --- bodies, and what the compiler sees instead of them ------------------------------------------


def _dequantize_body(
    x: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    log_det: Tensor | None,
    levels: int,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    operands = contiguous(x, seed, noise, log_det)
    return _implementation(*operands).dequantize(*operands, levels, alpha)


def _logit_body(x: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    operands = contiguous(x, log_det)
    return _implementation(*operands).logit(*operands, alpha)


def _logit_backward_body(grad: Tensor, grad_log_det: Tensor, y: Tensor, alpha: float) -> Tensor:
    operands = contiguous(grad, grad_log_det, y)
    return _implementation(*operands).logit_backward(*operands, alpha)


def _inverse_body(y: Tensor, alpha: float) -> Tensor:
    # A copy even where the type stays: an operator never returns its own input.
    return _implementation(y).inverse(y.contiguous(), alpha)


def _inverse_backward_body(grad: Tensor, y: Tensor, alpha: float) -> Tensor:
    operands = contiguous(grad, y)
    return _implementation(*operands).inverse_backward(*operands, alpha)


def _dequantize_fake(
    x: Tensor, seed: Tensor | None, noise: Tensor | None, log_det: Tensor | None, *choices: Any
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(noise)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _logit_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=reference.accumulate_dtype(x))


def _logit_backward_fake(grad: Tensor, grad_log_det: Tensor, y: Tensor, alpha: float) -> Tensor:
    return y.new_empty(y.shape)


def _inverse_fake(y: Tensor, alpha: float) -> Tensor:
    return y.new_empty(y.shape)


def _inverse_backward_fake(grad: Tensor, y: Tensor, alpha: float) -> Tensor:
    return y.new_empty(y.shape)


_dequantize = operator("dequantize_logit", _dequantize_body, _dequantize_fake)
_logit = operator("logit_transform", _logit_body, _logit_fake)
_logit_backward = operator("logit_transform_backward", _logit_backward_body, _logit_backward_fake)
_inverse = operator("logit_transform_inverse", _inverse_body, _inverse_fake)
_inverse_backward = operator(
    "logit_transform_inverse_backward", _inverse_backward_body, _inverse_backward_fake
)


# --- autograd ------------------------------------------------------------------------------------


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        noise: Tensor | None,
        log_det: Tensor | None,
        *choices: Any,
    ) -> tuple[Tensor, Tensor]:
        y, total = _dequantize(x, seed, noise, log_det, *choices)
        ctx.mark_non_differentiable(y)
        return y, total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, grad_total, None, None


class _Logit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, total = _logit(x, log_det, alpha)
        ctx.save_for_backward(y)
        ctx.alpha, ctx.accumulates = alpha, log_det is not None
        return y, total

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            given = (
                torch.zeros_like(y) if grad is None else grad,
                y.new_zeros(y.shape[0], dtype=reference.accumulate_dtype(y))
                if grad_total is None
                else grad_total,
            )
            grad_x = _logit_backward(*given, y, ctx.alpha)
        return grad_x, grad_total if ctx.accumulates else None, None


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.alpha = alpha
        return _inverse(y, alpha)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _inverse_backward(grad, y, ctx.alpha), None


# --- public functions ----------------------------------------------------------------------------


def _check(name: str, x: Tensor, log_det: Tensor | None, dtype: torch.dtype, alpha: float) -> None:
    if x.dim() == 0:
        raise ValueError(f"{name}: got shape (), want (B, *dims)")
    if log_det is not None:
        check("log_det", log_det, (x.shape[0],), x, dtype)
    _check_alpha(alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 0.5:
        raise ValueError(f"alpha: got {alpha}, want at least 0 and below 1/2")


def dequantize_logit(
    x: Tensor,
    *,
    levels: int = 256,
    alpha: float = 0.05,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
    log_det: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Uniform dequantisation of grey levels, then the logit, in one pass over memory.

        v = α + (1 - 2α)·(x + u)/levels,   u ~ U[0, 1)
        y = ln(v / (1 - v))
        log|det J| = Σ ln(1 - 2α) - ln v - ln(1 - v)

    The log-det is that of the logit transform, per value (x + u)/levels in [0, 1]: the constant
    -D·ln(levels) of the scaling is not in it. Gradients reach log_det only.

    Args:
        x: grey levels 0 … levels-1, (B, *dims), uint8. One out of range gives NaN.
        levels: from 2 to 256.
        alpha: α, at least 0 and below 1/2.
        seed: a scalar int64 tensor on the device of x; the same seed gives the same result in every
            implementation. Drawn from torch's default generator if None.
        noise: u, of the shape of x, in place of random numbers.
        log_det: (B,) in nats, float32; None counts as zero.

    Returns:
        y, float32, in the shape of x, and the given log_det plus this step's: a fresh (B,) tensor in
        nats, float32. With float64 noise both are float64, and so is log_det.

    Raises:
        ValueError: a shape, type, device or number does not fit.

    Source: Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, ICLR
    2016; Dinh et al., *Density estimation using Real NVP*, ICLR 2017, section 4.1.
    """
    if x.dtype != torch.uint8:
        raise ValueError(f"x: got {x.dtype}, want torch.uint8")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: got {levels}, want from 2 to 256")
    _check("x", x, log_det, reference.accumulate_dtype(noise), alpha)
    if noise is None:
        seed = choose_seed(seed, x)
    else:
        if seed is not None:
            raise ValueError("seed: got one beside noise, want one of the two")
        check("noise", noise, tuple(x.shape), x)
        noise = noise.detach()
    return _Dequantize.apply(x, seed, noise, log_det, levels, float(alpha))


def logit_transform(
    x: Tensor, *, alpha: float = 0.05, log_det: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The logit of values in [0, 1], and its log-det. Only y is kept for the backward.

        v = α + (1 - 2α)·x
        y = ln(v / (1 - v))
        log|det J| = Σ ln(1 - 2α) - ln v - ln(1 - v)

    Args:
        x: (B, *dims), floating. Where v leaves [0, 1], y and the log-det are NaN; at its ends, infinite.
        alpha: α, at least 0 and below 1/2.
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.

    Returns:
        y, in the shape and type of x, and the given log_det plus this step's: a fresh (B,) tensor.

    Raises:
        ValueError: a shape, type, device or number does not fit.

    Source: Dinh et al., *Density estimation using Real NVP*, ICLR 2017, section 4.1 (α = 0.05).
    """
    check_float("x", x)
    _check("x", x, log_det, reference.accumulate_dtype(x), alpha)
    return _Logit.apply(x, log_det, float(alpha))


def logit_transform_inverse(y: Tensor, *, alpha: float = 0.05) -> Tensor:
    """The inverse of `logit_transform`: x = (σ(y) - α)/(1 - 2α).

    Args:
        y: of any shape, floating.
        alpha: α, at least 0 and below 1/2.

    Returns:
        x, in the shape and type of y; it lies in [-α/(1 - 2α), 1 + α/(1 - 2α)].

    Raises:
        ValueError: y's type or alpha does not fit.
    """
    check_float("y", y)
    _check_alpha(alpha)
    return _Inverse.apply(y, float(alpha))
