"""Actnorm followed by affine coupling in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors and works on any device and floating type. Arithmetic
is float64 for float64 inputs and float32 for all others; results have the type and the memory format
of the tensor they belong to. The backward functions know only what the kernels save: the output, and
the conditioner's output. Symbols and derivation: README.md.

Operands that may be absent: `params` (no coupling: all channels are the identity part), `log_scale`
with `bias` (no actnorm), `gain` (1), `log_det` (0), and `index` (the split is by position).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import CouplingForm

__all__ = [
    "accumulate_dtype",
    "gradients",
    "identity",
    "identity_backward",
    "map",
    "merge",
    "split",
]

_ATAN = 0.636  # FrEIA's rounding of 2/π: part of the definition of that scale


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Type of the arithmetic and of log-dets: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x))


def _like(value: Tensor, x: Tensor) -> Tensor:
    """In the type and memory format of x."""
    if value.dim() != 4 or x.is_contiguous():
        return value.to(x.dtype).contiguous()
    return value.to(x.dtype, memory_format=torch.channels_last)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(accumulate_dtype(x)).view(-1, *(1,) * (x.dim() - 2))


def split(x: Tensor, moved: int, index: Tensor | None, flip: bool) -> tuple[Tensor, Tensor]:
    """Identity part, then transformed part, of channels (dimension 1, or 0 of a vector)."""
    axis = min(1, x.dim() - 1)
    kept = x.shape[axis] - moved
    if index is not None:
        return x.index_select(axis, index[:kept]), x.index_select(axis, index[kept:])
    first, second = x.split((moved, kept) if flip else (kept, moved), dim=axis)
    return (second, first) if flip else (first, second)


def merge(kept: Tensor, moved: Tensor, index: Tensor | None, flip: bool) -> Tensor:
    axis = min(1, kept.dim() - 1)
    if index is not None:
        return torch.cat((kept, moved), dim=axis).index_select(axis, index.argsort())
    return torch.cat((moved, kept) if flip else (kept, moved), dim=axis)


def _affine(v: Tensor, s: Tensor, t: Tensor, inverse: bool, shift_first: bool) -> Tensor:
    """v·exp(s) + t or (v + t)·exp(s), or the inverse of either."""
    if inverse:  # the inverse of one order is the other order with both signs changed
        s, t, shift_first = -s, -t, not shift_first
    return (v + t) * s.exp() if shift_first else v * s.exp() + t


def _affine_backward(
    out: Tensor, grad: Tensor, s: Tensor, t: Tensor, inverse: bool, shift_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input v of `_affine`, and the gradients of v, s and t, from its output."""
    sign = -1 if inverse else 1
    if inverse:
        s, t, shift_first = -s, -t, not shift_first
    grad_v = grad * s.exp()
    if shift_first:
        return out * (-s).exp() - t, grad_v, sign * grad * out, sign * grad_v
    scaled = out - t
    return scaled * (-s).exp(), grad_v, sign * grad * scaled, sign * grad


def _raw_and_shift(params: Tensor, x: Tensor, form: CouplingForm) -> tuple[Tensor, Tensor]:
    params = params.to(accumulate_dtype(x))
    if form.factor != 1:
        params = form.factor * params
    if form.interleaved:
        first, second = params[:, 0::2], params[:, 1::2]
    else:
        first, second = params.chunk(2, dim=1)
    return (first, second) if form.leading == "scale" else (second, first)


def _join(raw: Tensor, shift: Tensor, form: CouplingForm) -> Tensor:
    """The inverse of `_raw_and_shift`, for gradients."""
    pair = (raw, shift) if form.leading == "scale" else (shift, raw)
    joined = torch.stack(pair, dim=2).flatten(1, 2) if form.interleaved else torch.cat(pair, dim=1)
    return form.factor * joined if form.factor != 1 else joined


def _squash(raw: Tensor, form: CouplingForm) -> Tensor:
    """f of the form, without the gain."""
    match form.scale:
        case "exp":
            return raw
        case "tanh":
            return form.clamp * raw.tanh()
        case "atan":
            return form.clamp * _ATAN * raw.atan()
        case "two_sigmoid":
            return form.clamp * (0.5 * raw).tanh()  # 2σ(r) - 1
        case "soft_clamp":
            return raw / (1 + raw.abs() / form.clamp)
    s = (raw + 2).sigmoid().add(form.eps).log() if form.eps else F.logsigmoid(raw + 2)
    return s if form.scale == "sigmoid" else -s


def _squash_derivative(raw: Tensor, form: CouplingForm) -> Tensor:
    match form.scale:
        case "exp":
            return torch.ones_like(raw)
        case "tanh":
            return form.clamp * (1 - raw.tanh().square())
        case "atan":
            return form.clamp * _ATAN / (1 + raw.square())
        case "two_sigmoid":
            return 2 * form.clamp * raw.sigmoid() * (-raw).sigmoid()
        case "soft_clamp":
            return (1 + raw.abs() / form.clamp).square().reciprocal()
    other = (-raw - 2).sigmoid()
    if form.eps:
        scale = (raw + 2).sigmoid()
        other = other * scale / (scale + form.eps)
    return other if form.scale == "sigmoid" else -other


def _channel_sum(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def identity(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: CouplingForm,
    flip: bool,
) -> Tensor:
    """Actnorm of the identity part (B, C - moved, *spatial)."""
    kept, _ = split(_wide(x), moved, index, flip)
    lam, b = (split(_wide(v), moved, index, flip)[0] for v in (log_scale, bias))
    lam, b = _per_channel(lam, x), _per_channel(b, x)
    return _like(_affine(kept, lam, b, False, form.norm_shift_first), x)


def identity_backward(
    grad: Tensor,
    a: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: CouplingForm,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x's identity part (B, C - moved, *spatial), of log_scale and of bias from the
    gradient of `identity`'s output a. Those of the other part are zero."""
    lam, b = (split(_wide(v), moved, index, flip)[0] for v in (log_scale, bias))
    _, grad_kept, grad_lam, grad_b = _affine_backward(
        *(_wide(a), _wide(grad), _per_channel(lam, a), _per_channel(b, a)),
        *(False, form.norm_shift_first),
    )
    none = grad_kept.new_zeros(moved)
    return (
        _like(grad_kept, a),
        merge(_channel_sum(grad_lam), none, index, flip).to(log_scale.dtype),
        merge(_channel_sum(grad_b), none, index, flip).to(bias.dtype),
    )


def map(
    x: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    index: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output of the chosen direction and the accumulated log-det."""
    v = _wide(x)
    own = v.new_zeros(x.shape[0])
    if log_scale is not None:
        own = own + x.shape[2:].numel() * log_scale.to(v.dtype).sum()
    if not inverse:
        v = _actnorm(v, log_scale, bias, form, inverse)
    if params is not None:
        raw, t = _raw_and_shift(params, x, form)
        s = _squash(raw, form)
        if gain is not None:
            s = _per_channel(gain, x) * s
        kept, moved = split(v, s.shape[1], index, flip)
        v = merge(kept, _affine(moved, s, t, inverse, form.shift_first), index, flip)
        own = own + s.flatten(1).sum(1)
    if inverse:
        v, own = _actnorm(v, log_scale, bias, form, inverse), -own
    return _like(v, x), own if log_det is None else log_det + own


def _actnorm(
    v: Tensor, log_scale: Tensor | None, bias: Tensor | None, form: CouplingForm, inverse: bool
) -> Tensor:
    if log_scale is None or bias is None:
        return v
    parameters = _per_channel(log_scale, v), _per_channel(bias, v)
    return _affine(v, *parameters, inverse, form.norm_shift_first)


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    index: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `map`'s x, params, log_scale, bias and gain, from its output."""
    v, g = _wide(out), _wide(grad_out)
    g_log_det = (-1 if inverse else 1) * grad_log_det.to(v.dtype)
    grad_params = grad_log_scale = grad_bias = grad_gain = None

    def norm_backward(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal grad_log_scale, grad_bias
        if log_scale is None or bias is None:
            return v, g
        parameters = _per_channel(log_scale, v), _per_channel(bias, v)
        v, g, grad_lam, grad_b = _affine_backward(v, g, *parameters, inverse, form.norm_shift_first)
        through_log_det = g_log_det.sum() * out.shape[2:].numel()
        grad_log_scale = (_channel_sum(grad_lam) + through_log_det).to(log_scale.dtype)
        grad_bias = _channel_sum(grad_b).to(bias.dtype)
        return v, g

    if inverse:
        v, g = norm_backward(v, g)
    if params is not None:
        raw, t = _raw_and_shift(params, out, form)
        f, slope = _squash(raw, form), _squash_derivative(raw, form)
        bound = None if gain is None else _per_channel(gain, out)
        s = f if bound is None else bound * f
        kept, moved = split(v, s.shape[1], index, flip)
        g_kept, g_moved = split(g, s.shape[1], index, flip)
        moved, g_moved, grad_s, grad_t = _affine_backward(
            moved, g_moved, s, t, inverse, form.shift_first
        )
        v, g = merge(kept, moved, index, flip), merge(g_kept, g_moved, index, flip)
        grad_s = grad_s + g_log_det.view(-1, *(1,) * (out.dim() - 1))
        if gain is not None and bound is not None:
            grad_gain = _channel_sum(grad_s * f).to(gain.dtype)
            grad_s = grad_s * bound
        grad_params = _like(_join(grad_s * slope, grad_t, form), params)
    if not inverse:
        v, g = norm_backward(v, g)
    return _like(g, out), grad_params, grad_log_scale, grad_bias, grad_gain
