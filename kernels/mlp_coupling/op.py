"""The op: implementations bound into custom operators, autograd, checks and the public functions."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, contiguous, first_order, operator
from ..actnorm_coupling.form import PLAIN, CouplingForm
from ..actnorm_coupling.reference import accumulate_dtype
from . import native_impl, reference

__all__ = ["apply", "mlp_coupling", "mlp_coupling_inverse"]

_WIDEST = 128  # hidden layers and vectors that the Triton kernels take


def _implementation(x: Tensor, weight2: Tensor, *others: Tensor | None) -> ModuleType:
    """On AMD's chips the compiler's barrier does not wait for stores, which the Triton kernels rely on."""
    backend = _backend.choose(x, *others)
    wide = max(x.shape[1], *weight2.shape) > _WIDEST
    if backend == "triton" and not wide and torch.version.hip is None:
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    if backend == "native" and _is_float32(x, *others):
        return native_impl
    return reference


def _is_float32(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None and t.dtype is not torch.float32:
            return False
    return True


# --- bodies: contiguous operands to the implementation that fits them ----------------------------


def _map_body(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    layers = weight1, bias1, weight2, bias2, weight3, bias3
    operands = contiguous(x, *layers, log_scale, bias, gain, log_det)
    implementation = _implementation(x, weight2, *operands[1:])
    return implementation.map(*operands, CouplingForm.parse(form), flip, inverse)


def _gradients_eager(
    grad: Tensor, grad_log_det: Tensor, out: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    *parameters, form, flip, inverse = others
    operands = contiguous(grad, grad_log_det, out, *parameters)
    implementation = _implementation(out, parameters[2], *operands)
    return implementation.gradients(*operands, CouplingForm.parse(form), flip, inverse)


def _gradients_body(
    grad: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: an empty one stands for that of an operand not given."""
    parameters = weight1, bias1, weight2, bias2, weight3, bias3, log_scale, bias, gain
    grads = _gradients_eager(grad, grad_log_det, out, *parameters, form, flip, inverse)
    return tuple(out.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


# --- what the compiler sees instead of a body: shapes and types ----------------------------------


def _map_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=accumulate_dtype(x))


def _gradients_fake(
    grad: Tensor, grad_log_det: Tensor, out: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *parameters, _, _, _ = others
    grads = (out.new_empty(0) if v is None else v.new_empty(v.shape) for v in parameters)
    return out.new_empty(out.shape), *grads  # type: ignore[return-value]


map_operator = operator("mlp_coupling", _map_body, _map_fake)
gradients_operator = operator(
    "mlp_coupling_backward", _gradients_body, _gradients_fake, eager=_gradients_eager
)


# --- autograd: of the activations only the output is kept ----------------------------------------


class _MlpCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *parameters, log_det, form, flip, inverse = others
        ctx.set_materialize_grads(False)
        out, total = map_operator(x, *parameters, log_det, form, flip, inverse)
        ctx.save_for_backward(out, *parameters)
        ctx.choices = form, flip, inverse
        ctx.accumulates = log_det is not None
        return out, total

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, *parameters = ctx.saved_tensors
        given = (
            torch.zeros_like(out) if grad is None else grad,
            out.new_zeros(out.shape[0], dtype=accumulate_dtype(out))
            if grad_total is None
            else grad_total,
        )
        grad_x, *grads = gradients_operator(*given, out, *parameters, *ctx.choices)
        present = (g if v is not None else None for g, v in zip(grads, parameters, strict=True))
        return grad_x, *present, grad_total if ctx.accumulates else None, None, None, None


def apply(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op without the checks, for callers whose operands fit by construction."""
    layers = weight1, bias1, weight2, bias2, weight3, bias3
    operands = (x, *layers, log_scale, bias, gain, log_det)
    return _MlpCoupling.apply(*operands, form.key, flip, inverse)


# --- public functions ----------------------------------------------------------------------------


def _check_all(
    name: str,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (B, D) with D at least 2")
    check_float(name, x)
    size = x.shape[1]
    outputs = weight3.shape[0] if weight3.dim() == 2 else 0
    if outputs % 2 or not 2 <= outputs <= 2 * (size - 1):
        raise ValueError(
            f"weight3: got shape {tuple(weight3.shape)}, want (2T, H2) with T, the number of "
            f"transformed entries, from 1 to {size - 1}"
        )
    if weight2.dim() != 2 or 0 in weight2.shape:
        raise ValueError(
            f"weight2: got shape {tuple(weight2.shape)}, want (H2, H1), each at least 1"
        )
    second, first = weight2.shape
    check("weight1", weight1, (first, size - outputs // 2), x)
    check("bias1", bias1, (first,), x)
    check("weight2", weight2, (second, first), x)
    check("bias2", bias2, (second,), x)
    check("weight3", weight3, (outputs, second), x)
    check("bias3", bias3, (outputs,), x)
    if (log_scale is None) != (bias is None):
        missing = "log_scale" if log_scale is None else "bias"
        raise ValueError(f"{missing}: got None, want both log_scale and bias, or neither")
    if log_scale is not None and bias is not None:
        check("log_scale", log_scale, (size,), x)
        check("bias", bias, (size,), x)
    if gain is not None:
        check("gain", gain, (outputs // 2,), x)
    if log_det is not None:
        check("log_det", log_det, (x.shape[0],), x, accumulate_dtype(x))


def mlp_coupling(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Actnorm, then affine coupling with a dense conditioner, whose hidden layers are never stored.

        u   = x · exp(log_scale) + bias
        h1  = relu(u_i W1ᵀ + b1),    h2 = relu(h1 W2ᵀ + b2)
        raw, shift = h2 W3ᵀ + b3
        s   = gain · f(raw)
        y_i = u_i,    y_t = u_t · exp(s) + shift
        log|det J| = Σ s + Σ log_scale

    `form` chooses f (tanh by default), the order of scale and shift, and which outputs of the last
    layer are raw and which shift. The transformed part (t) is the last T entries of x, or the first T
    with `flip`; the identity part (i) is the rest. Of the activations only y is kept for the backward,
    which runs the conditioner again. Differentiable once, with respect to every tensor.

    Args:
        x: (B, D), D at least 2.
        weight1: W1, (H1, D - T).
        bias1: b1, (H1,).
        weight2: W2, (H2, H1).
        bias2: b2, (H2,).
        weight3: W3, (2T, H2), 1 ≤ T < D.
        bias3: b3, (2T,).
        log_scale, bias: (D,); None for both leaves actnorm out.
        gain: (T,); None counts as one.
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        form: the compile-time choices.
        flip: whether the transformed part comes first.

    Returns:
        y, in the shape and type of x, and the given log_det plus this step's: a fresh (B,) tensor.

    Raises:
        ValueError: a shape, type or device does not fit.

    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017, eq. 7–8.
    """
    layers = weight1, bias1, weight2, bias2, weight3, bias3
    operands = (*layers, log_scale, bias, gain, log_det)
    _check_all("x", x, *operands)
    return apply(x, *operands, form, flip)


def mlp_coupling_inverse(
    y: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """The inverse of `mlp_coupling`.

        h1  = relu(y_i W1ᵀ + b1),    h2 = relu(h1 W2ᵀ + b2)
        raw, shift = h2 W3ᵀ + b3,    s = gain · f(raw)
        u_i = y_i,    u_t = (y_t - shift) · exp(-s)
        x   = (u - bias) · exp(-log_scale)
        log|det J| = -Σ s - Σ log_scale

    Arguments, results and errors: as `mlp_coupling`, with x and y exchanged; the log-det is that of
    the inverse.
    """
    layers = weight1, bias1, weight2, bias2, weight3, bias3
    operands = (*layers, log_scale, bias, gain, log_det)
    _check_all("y", y, *operands)
    return apply(y, *operands, form, flip, inverse=True)
