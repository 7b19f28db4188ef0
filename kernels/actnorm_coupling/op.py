"""The op: implementations bound into custom operators, autograd and the public functions."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, contiguous, first_order, operator
from . import native_impl, reference
from .form import PLAIN, CouplingForm

__all__ = ["actnorm_coupling", "actnorm_coupling_inverse", "actnorm_identity", "apply"]


def _implementation(x: Tensor, *others: Tensor | None) -> ModuleType:
    backend = _backend.choose(x, *others)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


# --- memory formats: x decides, and everything of its shape follows ------------------------------


def _is_channels_last(x: Tensor) -> bool:
    return (
        not x.is_contiguous()
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _arranged(x: Tensor, *others: Tensor | None) -> list[Any]:
    """In the memory format of x: channels-last or contiguous."""
    if x.is_contiguous():
        return [x, *(None if t is None else t.contiguous() for t in others)]
    if not _is_channels_last(x):
        return _arranged(x.contiguous(), *others)
    last = torch.channels_last
    return [x, *(None if t is None else t.contiguous(memory_format=last) for t in others)]


# --- bodies: arranged operands to the implementation that fits them ------------------------------


def _identity_body(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: str,
    flip: bool,
) -> Tensor:
    operands = (*_arranged(x), *contiguous(log_scale, bias, index))
    implementation = _implementation(*operands[:3])
    return implementation.identity(*operands, moved, CouplingForm.parse(form), flip)


def _identity_backward_body(
    grad: Tensor,
    a: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: str,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, grad = _arranged(a, grad)
    operands = (grad, a, *contiguous(log_scale, bias, index))
    implementation = _implementation(*operands[:4])
    return implementation.identity_backward(*operands, moved, CouplingForm.parse(form), flip)


def _map_body(
    x: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    index: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    operands = (*_arranged(x, params), *contiguous(log_scale, bias, gain, log_det, index))
    implementation = _implementation(*operands[:6])
    return implementation.map(*operands, CouplingForm.parse(form), flip, inverse)


def _gradients_eager(
    grad: Tensor, grad_log_det: Tensor, out: Tensor, params: Tensor | None, *others: Any
) -> tuple[Tensor | None, ...]:
    *vectors, form, flip, inverse = others
    out, grad, params = _arranged(out, grad, params)
    operands = (
        *(grad, grad_log_det.contiguous(), out, params),
        *contiguous(*vectors),
    )
    implementation = _implementation(*operands[:7])
    return implementation.gradients(*operands, CouplingForm.parse(form), flip, inverse)


def _gradients_body(
    grad: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    index: Tensor | None,
    form: str,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: an empty one stands for that of an operand not given."""
    operands = (params, log_scale, bias, gain, index)
    grads = _gradients_eager(grad, grad_log_det, out, *operands, form, flip, inverse)
    return tuple(out.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


# --- what the compiler sees instead of a body: shapes, types and strides -------------------------


def _new(like: Tensor, channels: int) -> Tensor:
    """Memory in the type and format of `like` for so many channels."""
    shape = (like.shape[0], channels, *like.shape[2:])
    if _is_channels_last(like):
        return like.new_empty(shape).to(memory_format=torch.channels_last)
    return like.new_empty(shape)


def _identity_fake(
    x: Tensor, log_scale: Tensor, bias: Tensor, index: Tensor | None, moved: int, *choices: Any
) -> Tensor:
    return _new(x, x.shape[1] - moved)


def _identity_backward_fake(
    grad: Tensor,
    a: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    *choices: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(a, a.shape[1]), _flat(log_scale), _flat(bias)


def _flat(v: Tensor | None, otherwise: Tensor | None = None) -> Tensor:
    if v is None:
        assert otherwise is not None
        return otherwise.new_empty(0)
    return v.new_empty(v.shape)


def _map_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    log_det = x.new_empty(x.shape[0], dtype=reference.accumulate_dtype(x))
    return _new(x, x.shape[1]), log_det


def _gradients_fake(
    grad: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    *choices: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if params is None:
        grad_params = out.new_empty(0)
    else:
        grad_params = _new(out, params.shape[1]).to(params.dtype)
    vectors = (_flat(v, otherwise=out) for v in (log_scale, bias, gain))
    return _new(out, out.shape[1]), grad_params, *vectors  # type: ignore[return-value]


identity_operator = operator("actnorm_identity", _identity_body, _identity_fake)
identity_backward_operator = operator(
    "actnorm_identity_backward", _identity_backward_body, _identity_backward_fake
)
map_operator = operator("actnorm_coupling", _map_body, _map_fake)
gradients_operator = operator(
    "actnorm_coupling_backward", _gradients_body, _gradients_fake, eager=_gradients_eager
)


# --- autograd: only the output and the conditioner's output are kept -----------------------------


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        index: Tensor | None,
        *choices: Any,
    ) -> Tensor:
        a = identity_operator(x, log_scale, bias, index, *choices)
        ctx.save_for_backward(a, log_scale, bias, index)
        ctx.choices = choices
        return a

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, index = ctx.saved_tensors
        moved, _, flip = ctx.choices
        grad_a, *grads = identity_backward_operator(grad, *saved, index, *ctx.choices)
        nothing = _new(grad_a, moved).zero_()
        grad_x = reference.merge(grad_a, nothing, index, flip)
        return grad_x, *grads, None, *(None for _ in ctx.choices)


class _Tap(torch.autograd.Function):
    """The conditioner's input a, and x again for the coupling, which has to be its only user.

    The two gradients are then known together, and neither a zero-padded one nor a sum of two whole
    ones is formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        moved: int,
        form: str,
        flip: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if log_scale is None or bias is None:
            a = reference.split(x, moved, index, flip)[0]
            ctx.save_for_backward(index)
        else:
            a = identity_operator(x, log_scale, bias, index, moved, form, flip)
            ctx.save_for_backward(index, a, log_scale, bias)
        ctx.shape, ctx.choices = x.shape, (moved, form, flip)
        return a, x

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_a: Tensor | None, grad_x: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        index, *saved = ctx.saved_tensors
        moved, _, flip = ctx.choices
        if grad_a is None:
            return grad_x, *(None,) * 6
        grads: tuple[Tensor | None, ...] = (None, None)
        if saved:
            grad_a, *grads = identity_backward_operator(grad_a, *saved, index, *ctx.choices)
        if grad_x is None:
            grad_x = grad_a.new_zeros(ctx.shape)
        # Written to in place: it comes from the coupling's backward, and nobody else has seen it.
        if index is not None:
            grad_x.index_add_(1, index[: grad_a.shape[1]], grad_a)
        else:
            grad_x.narrow(1, moved if flip else 0, grad_a.shape[1]).add_(grad_a)
        return grad_x, *grads, *(None,) * 4


def tap(
    x: Tensor,
    moved: int,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    form: CouplingForm = PLAIN,
    flip: bool = False,
) -> tuple[Tensor, Tensor]:
    """The conditioner's input, and x as `apply` is then given it, with a cheaper backward than that
    of taking the first out of x."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        if log_scale is None or bias is None:
            return reference.split(x, moved, index, flip)[0], x
        return _Identity.apply(x, log_scale, bias, index, moved, form.key, flip), x
    return _Tap.apply(x, log_scale, bias, index, moved, form.key, flip)


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        params: Tensor | None,
        log_scale: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        log_det: Tensor | None,
        index: Tensor | None,
        form: str,
        flip: bool,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        operands = (params, log_scale, bias, gain)
        out, total = map_operator(x, *operands, log_det, index, form, flip, inverse)
        ctx.save_for_backward(out, *operands, index)
        ctx.choices = form, flip, inverse
        ctx.accumulates = log_det is not None
        return out, total

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, *operands, index = ctx.saved_tensors
        given = (
            torch.zeros_like(out) if grad is None else grad,
            out.new_zeros(out.shape[0], dtype=reference.accumulate_dtype(out))
            if grad_total is None
            else grad_total,
        )
        grad_x, *grads = gradients_operator(*given, out, *operands, index, *ctx.choices)
        present = (g if v is not None else None for g, v in zip(grads, operands, strict=True))
        return (grad_x, *present, grad_total if ctx.accumulates else None, None, *(None,) * 3)


class _Affine(torch.autograd.Function):
    """Actnorm alone where nothing has to be arranged (`_is_ready`): the two native calls and no more.

    It computes what `_Coupling` does; the handling of operands that actnorm has not costs as much there
    as its kernels do on a small batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        log_det: Tensor | None,
        form: str,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, total = native_impl.affine(x, log_scale, bias, log_det, form, inverse)
        ctx.save_for_backward(out, log_scale, bias)
        ctx.choices = form, inverse
        ctx.accumulates = log_det is not None
        return out, total

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, log_scale, bias = ctx.saved_tensors
        form, inverse = ctx.choices
        given = (
            torch.zeros_like(out) if grad is None else grad.contiguous(),
            out.new_zeros(out.shape[0]) if grad_total is None else grad_total.contiguous(),
        )
        grads = native_impl.affine_gradients(*given, out, log_scale, bias, form, inverse)
        return *grads, grad_total if ctx.accumulates else None, None, None


def _is_ready(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the native library can take all of these as they are."""
    if torch.compiler.is_compiling() or _backend.choose(x, *others) != "native":
        return False
    for t in (x, *others):
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous()):
            return False
    return True


def apply(
    x: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    index: Tensor | None = None,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op without the checks, for callers whose operands fit by construction."""
    if params is None and log_scale is not None and bias is not None:
        if _is_ready(x, log_scale, bias, log_det):
            return _Affine.apply(x, log_scale, bias, log_det, form.key, inverse)
    operands = (x, params, log_scale, bias, gain, log_det, index)
    return _Coupling.apply(*operands, form.key, flip, inverse)


# --- public functions ----------------------------------------------------------------------------


def _check_input(
    name: str,
    x: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    least: int,
) -> None:
    if x.dim() < 2 or x.shape[1] < least:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, want (B, C, *spatial) with C at least {least}"
        )
    check_float(name, x)
    if (log_scale is None) != (bias is None):
        missing = "log_scale" if log_scale is None else "bias"
        raise ValueError(f"{missing}: got None, want both log_scale and bias, or neither")
    if log_scale is not None and bias is not None:
        check("log_scale", log_scale, (x.shape[1],), x)
        check("bias", bias, (x.shape[1],), x)
    if index is not None:
        check("index", index, (x.shape[1],), x, torch.int64)


def _check_all(
    name: str,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    index: Tensor | None,
    flip: bool,
) -> None:
    _check_input(name, x, log_scale, bias, index, least=1)
    channels = params.shape[1] if params.dim() > 1 else 0
    if channels % 2 or not 2 <= channels <= 2 * x.shape[1]:
        raise ValueError(
            f"params: got shape {tuple(params.shape)}, want (B, 2T, *spatial) with T, the number "
            f"of transformed channels, from 1 to {x.shape[1]}"
        )
    check("params", params, (x.shape[0], channels, *x.shape[2:]), x)
    if gain is not None:
        check("gain", gain, (channels // 2,), x)
    if log_det is not None:
        check("log_det", log_det, (x.shape[0],), x, reference.accumulate_dtype(x))
    if index is not None and flip:
        raise ValueError("flip: got True with an index, want one of the two: the index says it all")


def actnorm_identity(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    form: CouplingForm = PLAIN,
    transformed: int | None = None,
    flip: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """Actnorm of the identity part alone: the conditioner's input.

        a = x_i · exp(log_scale_i) + bias_i

    Args:
        x: (B, C, *spatial); spatial may be empty.
        log_scale, bias: (C,).
        form: says in which order actnorm scales and shifts.
        transformed: T, the number of channels that are not in the identity part; ⌊C/2⌋ by default.
        flip, index: as in `actnorm_coupling`.

    Returns:
        a, (B, C - T, *spatial), in the type and memory format of x.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check_input("x", x, log_scale, bias, index, least=2)
    moved = x.shape[1] // 2 if transformed is None else transformed
    if not 1 <= moved < x.shape[1]:
        raise ValueError(f"transformed: got {transformed}, want from 1 to {x.shape[1] - 1}")
    return _Identity.apply(x, log_scale, bias, index, moved, form.key, flip)


def actnorm_coupling(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Actnorm, then affine coupling, in one pass over memory.

        u   = x · exp(log_scale) + bias
        s   = gain · f(raw)                             raw and shift from params
        y_i = u_i,    y_t = u_t · exp(s) + shift
        log|det J| = Σ s + S · Σ log_scale              S = number of spatial positions

    `form` chooses f (tanh by default), the order of scale and shift, and the layout of params. The
    transformed part (t) is the last T channels of x, or the first T with `flip`, or the channels
    that `index` names; the identity part (i) is the rest. Only y, params and the per-channel
    parameters are kept for the backward, which recomputes what it needs of x from y.

    Args:
        x: (B, C, *spatial); spatial may be empty. Contiguous and channels-last tensors are used as
            they are, any other is copied.
        params: the conditioner's output, (B, 2T, *spatial), 1 ≤ T ≤ C.
        log_scale, bias: (C,); None for both leaves actnorm out.
        gain: (T,); None counts as one.
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        form: the compile-time choices.
        flip: whether the transformed part comes first.
        index: (C,), int64: a permutation of the channels, those of the identity part before those of
            the transformed part. That it is one is not checked: it would read the device.

    Returns:
        y, in the shape, type and memory format of x, and the given log_det plus this step's: a
        fresh (B,) tensor.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check_all("x", x, params, log_scale, bias, gain, log_det, index, flip)
    return apply(x, params, log_scale, bias, gain, log_det, index, form, flip)


def actnorm_coupling_inverse(
    y: Tensor,
    params: Tensor,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    log_det: Tensor | None = None,
    *,
    form: CouplingForm = PLAIN,
    flip: bool = False,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `actnorm_coupling`, given the same params.

        u_i = y_i,    u_t = (y_t - shift) · exp(-s)
        x   = (u - bias) · exp(-log_scale)
        log|det J| = -Σ s - S · Σ log_scale

    The conditioner's input is y's identity part, so `actnorm_identity` has no part here.

    Arguments, results and errors: as `actnorm_coupling`, with x and y exchanged; the log-det is
    that of the inverse.
    """
    _check_all("y", y, params, log_scale, bias, gain, log_det, index, flip)
    return apply(y, params, log_scale, bias, gain, log_det, index, form, flip, inverse=True)
