"""The op: implementations bound into custom operators, autograd and the public functions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backend
from . import native_impl, reference

__all__ = ["actnorm_coupling", "actnorm_coupling_inverse", "actnorm_identity"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _implementation(*tensors: Tensor | None) -> ModuleType:
    backend = _backend.choose(*tensors)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


def _operator(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `body` as hybridflow::name. The result calls it through the dispatcher only where
    the compiler has to see it: in eager mode the dispatcher costs more than a small kernel."""
    torch.library.custom_op(f"hybridflow::{name}", body, mutates_args=()).register_fake(fake)
    op = getattr(torch.ops.hybridflow, name).default

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else body(*args)

    return call


# --- bodies: contiguous operands to the implementation that fits them ---------------------------


def _identity_body(x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
    operands = [t.contiguous() for t in (x, log_scale, bias)]
    return _implementation(*operands).identity(*operands, flip)


def _identity_backward_body(
    grad: Tensor, a: Tensor, log_scale: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    operands = [t.contiguous() for t in (grad, a, log_scale, bias)]
    return _implementation(*operands).identity_backward(*operands, flip)


def _map_body(direction: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def body(
        x: Tensor,
        params: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        gain: Tensor,
        log_det: Tensor | None,
        flip: bool,
    ) -> tuple[Tensor, Tensor]:
        operands = [t.contiguous() for t in (x, params, log_scale, bias, gain)]
        given = None if log_det is None else log_det.contiguous()
        implementation = _implementation(*operands, given)
        return getattr(implementation, direction)(*operands, given, flip)

    return body


def _gradient_body(direction: str) -> Callable[..., _Gradients]:
    def body(
        grad: Tensor,
        grad_log_det: Tensor,
        out: Tensor,
        params: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        gain: Tensor,
        flip: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given = (grad, grad_log_det, out, params, log_scale, bias, gain)
        operands = [t.contiguous() for t in given]
        return getattr(_implementation(*operands), direction)(*operands, flip)

    return body


# --- what the compiler sees instead of a body: shapes and types ---------------------------------


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _identity_fake(x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - x.shape[1] // 2, *x.shape[2:])


def _identity_backward_fake(
    grad: Tensor, a: Tensor, log_scale: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = a.new_empty(a.shape[0], log_scale.shape[0], *a.shape[2:])
    return grad_x, _contiguous_like(log_scale), _contiguous_like(bias)


def _map_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    log_det = x.new_empty(x.shape[0], dtype=reference.accumulate_dtype(x))
    return _contiguous_like(x), log_det


def _gradient_fake(grad: Tensor, grad_log_det: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    return tuple(_contiguous_like(t) for t in operands[:5])


_identity = _operator("actnorm_identity", _identity_body, _identity_fake)
_identity_backward = _operator(
    "actnorm_identity_backward", _identity_backward_body, _identity_backward_fake
)
_forward = _operator("actnorm_coupling", _map_body("forward"), _map_fake)
_inverse = _operator("actnorm_coupling_inverse", _map_body("inverse"), _map_fake)
_forward_backward = _operator(
    "actnorm_coupling_backward", _gradient_body("backward"), _gradient_fake
)
_inverse_backward = _operator(
    "actnorm_coupling_inverse_backward", _gradient_body("inverse_backward"), _gradient_fake
)


# --- autograd: only the output and the conditioner's output are kept ----------------------------


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
        a = _identity(x, log_scale, bias, flip)
        ctx.save_for_backward(a, log_scale, bias)
        ctx.flip = flip
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_identity_backward(grad, *ctx.saved_tensors, ctx.flip), None


def _materialised(
    grad: Tensor | None, grad_log_det: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """A gradient that did not arrive is zero."""
    if grad is None:
        grad = torch.zeros_like(out)
    if grad_log_det is None:
        grad_log_det = out.new_zeros(out.shape[0], dtype=reference.accumulate_dtype(out))
    return grad, grad_log_det


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        params: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        gain: Tensor,
        log_det: Tensor | None,
        flip: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, total = _forward(x, params, log_scale, bias, gain, log_det, flip)
        ctx.save_for_backward(y, params, log_scale, bias, gain)
        ctx.flip, ctx.accumulates = flip, log_det is not None
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y = ctx.saved_tensors[0]
        grads = _forward_backward(
            *_materialised(grad_y, grad_total, y), *ctx.saved_tensors, ctx.flip
        )
        return *grads, grad_total if ctx.accumulates else None, None


class _CouplingInverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        params: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        gain: Tensor,
        log_det: Tensor | None,
        flip: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x, total = _inverse(y, params, log_scale, bias, gain, log_det, flip)
        ctx.save_for_backward(x, params, log_scale, bias, gain)
        ctx.flip, ctx.accumulates = flip, log_det is not None
        return x, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        grads = _inverse_backward(
            *_materialised(grad_x, grad_total, x), *ctx.saved_tensors, ctx.flip
        )
        return *grads, grad_total if ctx.accumulates else None, None


# --- public functions -----------------------------------------------------------------------------


def _check(
    name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None
) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {shape}")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want {x.device}")
    if dtype is None and value.dtype not in _FLOATS:
        raise ValueError(f"{name}: got {value.dtype}, want a floating type")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype}, want {dtype}")


def _check_input(name: str, x: Tensor, log_scale: Tensor, bias: Tensor) -> None:
    if x.dim() < 2 or x.shape[1] < 2:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, want (B, C, *spatial) with C at least 2"
        )
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: got {x.dtype}, want a floating type")
    _check("log_scale", log_scale, (x.shape[1],), x)
    _check("bias", bias, (x.shape[1],), x)


def _check_all(
    name: str,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
) -> None:
    _check_input(name, x, log_scale, bias)
    moved = x.shape[1] // 2
    _check("params", params, (x.shape[0], 2 * moved, *x.shape[2:]), x)
    _check("gain", gain, (moved,), x)
    if log_det is not None:
        _check("log_det", log_det, (x.shape[0],), x, reference.accumulate_dtype(x))


def actnorm_identity(x: Tensor, log_scale: Tensor, bias: Tensor, *, flip: bool = False) -> Tensor:
    """Actnorm of the identity half alone: the conditioner's input.

        a = x_i · exp(log_scale_i) + bias_i

    The identity half is the first ⌈C/2⌉ channels, or the last ⌈C/2⌉ with `flip`.

    Args:
        x: (B, C, *spatial), C at least 2; spatial may be empty.
        log_scale, bias: (C,).
        flip: which half is the identity half.

    Returns:
        a, (B, ⌈C/2⌉, *spatial), contiguous, in the type of x.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check_input("x", x, log_scale, bias)
    return _Identity.apply(x, log_scale, bias, flip)


def actnorm_coupling(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None = None,
    *,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Actnorm, then affine coupling, in one pass over memory.

        u   = x · exp(log_scale) + bias
        s   = gain · tanh(raw)                          raw, shift = the halves of params
        y_i = u_i,    y_t = u_t · exp(s) + shift
        log|det J| = Σ s + S · Σ log_scale              S = number of spatial positions

    The identity half (i) is the first ⌈C/2⌉ channels and the transformed half (t) the rest; with
    `flip` the transformed half comes first. Only y, params and the per-channel parameters are kept
    for the backward, which recomputes x from y.

    Args:
        x: (B, C, *spatial), C at least 2; spatial may be empty.
        params: the conditioner's output, (B, 2·⌊C/2⌋, *spatial): raw, then shift.
        log_scale, bias: (C,).
        gain: (⌊C/2⌋,).
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        flip: which half is transformed.

    Returns:
        y, in the shape and type of x, and the given log_det plus this step's: a fresh (B,) tensor.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check_all("x", x, params, log_scale, bias, gain, log_det)
    return _Coupling.apply(x, params, log_scale, bias, gain, log_det, flip)


def actnorm_coupling_inverse(
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None = None,
    *,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """The inverse of `actnorm_coupling`, given the same params.

        u_i = y_i,    u_t = (y_t − shift) · exp(−s)
        x   = (u − bias) · exp(−log_scale)
        log|det J| = −Σ s − S · Σ log_scale

    The conditioner's input is y's identity half, so `actnorm_identity` has no part here.

    Arguments, results and errors: as `actnorm_coupling`, with x and y exchanged; the log-det is
    that of the inverse.
    """
    _check_all("y", y, params, log_scale, bias, gain, log_det)
    return _CouplingInverse.apply(y, params, log_scale, bias, gain, log_det, flip)
