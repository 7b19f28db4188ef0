"""The op: implementations bound into custom operators, autograd and the public functions."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, contiguous, first_order, operator
from ..actnorm_coupling.form import PLAIN, CouplingForm
from ..actnorm_coupling.op import _arranged, _check_input, _new
from ..actnorm_coupling.reference import accumulate_dtype
from . import native_impl, reference

__all__ = ["apply", "conv_coupling", "conv_coupling_inverse"]

_SIZES = (1, 3)  # of the convolutions' kernels
_NARROW = (torch.float16, torch.bfloat16)


def _implementation(products: torch.dtype, x: Tensor, *others: Tensor | None) -> ModuleType:
    """Native code takes float32 alone; float64 on a GPU, whose tiles do not fit the registers, takes the
    reference."""
    backend = _backend.choose(x, *others)
    if backend == "triton" and not (x.is_cuda and x.dtype is torch.float64):
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    if backend == "native" and products is torch.float32:
        if all(t is None or t.dtype is torch.float32 for t in (x, *others)):
            return native_impl
    return reference


def _without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body outside autocast, which would choose other types for what the reference calls."""

    @functools.wraps(body)
    def call(x: Tensor, *others: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return body(x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return body(x, *others)

    return call


# --- bodies: arranged operands to the implementation that fits them ------------------------------


@_without_autocast
def _map_body(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    parameters = weight1, bias1, weight2, bias2, log_scale, bias, gain
    operands = (*_arranged(x), *contiguous(*parameters, log_det))
    implementation = _implementation(products, *operands)
    return implementation.map(*operands, CouplingForm.parse(form), flip, inverse, products)


@_without_autocast
def _gradients_body(
    grad: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = weight1, bias1, weight2, bias2, log_scale, bias, gain
    out, grad = _arranged(out, grad)
    operands = (grad, grad_log_det.contiguous(), out, *contiguous(*parameters))
    implementation = _implementation(products, *operands[2:])
    choices = CouplingForm.parse(form), flip, inverse, products
    grads = implementation.gradients(*operands, *choices)
    # An operator returns tensors only: an empty one stands for that of an operand not given.
    return tuple(out.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


# --- what the compiler sees instead of a body: shapes, types and strides -------------------------


def _map_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _new(x, x.shape[1]), x.new_empty(x.shape[0], dtype=accumulate_dtype(x))


def _gradients_fake(
    grad: Tensor, grad_log_det: Tensor, out: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = others[:-4]
    grads = (out.new_empty(0) if v is None else v.new_empty(v.shape) for v in parameters)
    return _new(out, out.shape[1]), *grads  # type: ignore[return-value]


map_operator = operator("conv_coupling", _map_body, _map_fake)
gradients_operator = operator("conv_coupling_backward", _gradients_body, _gradients_fake)


# --- autograd: of the activations only the output is kept ----------------------------------------


class _ConvCoupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        log_scale: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        log_det: Tensor | None,
        form: str,
        flip: bool,
        inverse: bool,
        products: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        parameters = weight1, bias1, weight2, bias2, log_scale, bias, gain
        out, total = map_operator(x, *parameters, log_det, form, flip, inverse, products)
        ctx.save_for_backward(out, *parameters)
        ctx.choices = form, flip, inverse, products
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
        return (grad_x, *present, grad_total if ctx.accumulates else None, *(None,) * 4)


class _Keeping(torch.autograd.Function):
    """The same on the CPU in one native call each way, where nothing has to be arranged: raw and shift,
    as large as x, are kept, so that the backward need not run the conditioner for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, total, params = native_impl.map_keeping(x, *others)
        *parameters, log_det, form, flip, inverse = others
        ctx.save_for_backward(out, params, *parameters)
        ctx.choices = form, flip, inverse
        ctx.accumulates = log_det is not None
        return out, total

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        given = (
            torch.zeros_like(out) if grad is None else grad.contiguous(),
            out.new_zeros(out.shape[0]) if grad_total is None else grad_total.contiguous(),
        )
        grads = native_impl.gradients_from(*given, out, *saved, *ctx.choices)
        return *grads, grad_total if ctx.accumulates else None, None, None, None


def _is_ready(*operands: Tensor | None) -> bool:
    """Whether the native library can take all of these as they are."""
    x = operands[0]
    assert x is not None
    if torch.compiler.is_compiling() or _backend.choose(x) != "native":
        return False
    return all(t is None or (t.dtype is torch.float32 and t.is_contiguous()) for t in operands)


def apply(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    inverse: bool = False,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The op without the checks, for callers whose operands fit by construction."""
    operands = (x, weight1, bias1, weight2, bias2, log_scale, bias, gain, log_det)
    products = x.dtype if products is None else products
    if products is x.dtype and _is_ready(*operands):
        return _Keeping.apply(*operands, form.key, flip, inverse)
    return _ConvCoupling.apply(*operands, form.key, flip, inverse, products)


# --- public functions ----------------------------------------------------------------------------


def _check_all(
    name: str,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    products: torch.dtype | None,
) -> None:
    if x.dim() != 4 or x.shape[1] < 2 or 0 in x.shape[2:]:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, want (B, C, h, w) with C at least 2 and h and w "
            "at least 1"
        )
    _check_input(name, x, log_scale, bias, None, least=2)
    channels = x.shape[1]
    outputs = weight2.shape[0] if weight2.dim() == 4 else 0
    if outputs % 2 or not 2 <= outputs <= 2 * (channels - 1):
        raise ValueError(
            f"weight2: got shape {tuple(weight2.shape)}, want (2T, H, K, K) with T, the number of "
            f"transformed channels, from 1 to {channels - 1}"
        )
    moved, hidden, size = outputs // 2, weight2.shape[1], weight2.shape[2]
    if size not in _SIZES or hidden < 1:
        raise ValueError(
            f"weight2: got shape {tuple(weight2.shape)}, want (2T, H, K, K) with H at least 1 and K "
            f"one of {_SIZES}"
        )
    check("weight2", weight2, (outputs, hidden, size, size), x)
    check("bias2", bias2, (outputs,), x)
    check("weight1", weight1, (hidden, channels - moved, size, size), x)
    check("bias1", bias1, (hidden,), x)
    if gain is not None:
        check("gain", gain, (moved,), x)
    if log_det is not None:
        check("log_det", log_det, (x.shape[0],), x, accumulate_dtype(x))
    wanted = [x.dtype] if x.dtype in _NARROW else [x.dtype, *_NARROW]
    if products is not None and products not in wanted:
        types = " or ".join(map(str, wanted))
        raise ValueError(f"products: got {products}, want {types} for {name} of {x.dtype}")


def conv_coupling(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Actnorm, then affine coupling with a convolutional conditioner, whose hidden layer is never stored.

        u   = x · exp(log_scale) + bias
        h   = relu(conv(u_i, weight1) + bias1)
        raw, shift = conv(h, weight2) + bias2
        s   = gain · f(raw)
        y_i = u_i,    y_t = u_t · exp(s) + shift
        log|det J| = Σ s + S · Σ log_scale              S = h·w, the number of positions

    Convolutions have stride 1 and zeros around the image, so that h and w stay. `form` chooses f
    (tanh by default), the order of scale and shift, and which outputs of the second convolution are
    raw and which shift. The transformed part (t) is the last T channels of x, or the first T with
    `flip`; the identity part (i) is the rest. Of the activations only y is kept for the backward.

    Args:
        x: (B, C, h, w), contiguous or channels-last; any other is copied. On a GPU channels-last is
            used as it is, and contiguous tensors are copied to it and back.
        weight1: (H, C - T, K, K), with K 1 or 3.
        bias1: (H,).
        weight2: (2T, H, K, K), 1 ≤ T < C.
        bias2: (2T,).
        log_scale, bias: (C,); None for both leaves actnorm out.
        gain: (T,); None counts as one.
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        form: the compile-time choices.
        flip: whether the transformed part comes first.
        products: float16 or bfloat16: the type of the operands of both convolutions, of which a wider
            x and wider weights are rounded copies, as autocast has it. Sums, results and gradients keep
            their types. None: that of x.

    Returns:
        y, in the shape, type and memory format of x, and the given log_det plus this step's: a
        fresh (B,) tensor.

    Raises:
        ValueError: a shape, type or device does not fit.

    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017, eq. 7–8.
    """
    operands = (weight1, bias1, weight2, bias2, log_scale, bias, gain, log_det)
    _check_all("x", x, *operands, products)
    return apply(x, *operands, form, flip, products=products)


def conv_coupling_inverse(
    y: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `conv_coupling`.

        h   = relu(conv(y_i, weight1) + bias1)
        raw, shift = conv(h, weight2) + bias2,    s = gain · f(raw)
        u_i = y_i,    u_t = (y_t - shift) · exp(-s)
        x   = (u - bias) · exp(-log_scale)
        log|det J| = -Σ s - S · Σ log_scale

    Arguments, results and errors: as `conv_coupling`, with x and y exchanged; the log-det is that of
    the inverse.
    """
    operands = (weight1, bias1, weight2, bias2, log_scale, bias, gain, log_det)
    _check_all("y", y, *operands, products)
    return apply(y, *operands, form, flip, inverse=True, products=products)
