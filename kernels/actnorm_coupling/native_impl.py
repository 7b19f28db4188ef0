"""Launchers of native.cpp: CPU tensors of 32 and 16 bits in the formats of op.py, as in reference.py."""

import functools
import math
from typing import get_args

import torch
from torch import Tensor

from .. import native
from .form import CouplingForm, Scale

__all__ = ["gradients", "identity", "identity_backward", "map"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # native.cpp: Type
_SCALES = get_args(Scale)  # native.cpp: Scale


@functools.cache
def _choices(form: str) -> tuple[int | float, ...]:
    """A form, by its key, as native.cpp wants it."""
    f = CouplingForm.parse(form)
    return (
        int(f.norm_shift_first),
        _SCALES.index(f.scale),
        int(f.shift_first),
        int(f.interleaved),
        int(f.leading == "shift"),
        float(f.clamp),
        float(f.eps),
        float(f.factor),
    )


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Samples, channels, and the numbers of positions outside and inside the channels' dimension."""
    samples, channels, *spatial = x.shape
    positions = math.prod(spatial)
    around = (1, positions) if x.is_contiguous() else (positions, 1)
    return samples, channels, *around


def _new(like: Tensor, channels: int) -> Tensor:
    """Memory in the type and format of `like` for so many channels."""
    shape = (like.shape[0], channels, *like.shape[2:])
    if like.is_contiguous():
        return like.new_empty(shape)
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _in(dtype: torch.dtype, v: Tensor) -> Tensor:
    return v if v.dtype == dtype else v.to(dtype)


def _float(v: Tensor | None) -> Tensor | None:
    return None if v is None else _in(torch.float32, v)


def _gradient_of(v: Tensor | None) -> Tensor | None:
    """Memory for the gradient of a per-channel parameter: float32, until `_as`."""
    if v is None or v.dtype == torch.float32:
        return None if v is None else torch.empty_like(v)
    return torch.empty_like(v, dtype=torch.float32)


def _as(grad: Tensor | None, v: Tensor | None) -> Tensor | None:
    """A gradient in the type of its operand."""
    return grad if grad is None or v is None else _in(v.dtype, grad)


def _refuse(index: Tensor | None) -> ValueError:
    given = [] if index is None else index.tolist()
    want = f"a permutation of the channels 0 to {len(given) - 1}"
    return ValueError(f"index: got {given}, want {want}")


def identity(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: CouplingForm,
    flip: bool,
) -> Tensor:
    a = _new(x, x.shape[1] - moved)
    accepted = native.load().accepts(
        "actnorm_identity",
        *(x, _float(log_scale), _float(bias), index, a),
        *(_TYPES[x.dtype], *_sizes(x), moved, int(flip), int(form.norm_shift_first)),
    )
    if not accepted:
        raise _refuse(index)
    return a


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
    grad_kept = torch.empty_like(a)
    grad_log_scale, grad_bias = _gradient_of(log_scale), _gradient_of(bias)
    samples, kept, *positions = _sizes(a)
    accepted = native.load().accepts(
        "actnorm_identity_backward",
        *(
            _in(a.dtype, grad),
            a,
            _float(log_scale),
            _float(bias),
            index,
            grad_kept,
            grad_log_scale,
            grad_bias,
        ),
        *(_TYPES[a.dtype], samples, kept + moved, *positions),
        *(moved, int(flip), int(form.norm_shift_first)),
    )
    if not accepted:
        raise _refuse(index)
    return grad_kept, _as(grad_log_scale, log_scale), _as(grad_bias, bias)  # type: ignore[return-value]


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
    out, total = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
    moved = 0 if params is None else params.shape[1] // 2
    accepted = native.load().accepts(
        "actnorm_coupling",
        *(x, params, _float(log_scale), _float(bias), _float(gain), log_det, index, out, total),
        *(_TYPES[x.dtype], 0 if params is None else _TYPES[params.dtype], *_sizes(x)),
        *(moved, int(flip), int(inverse), *_choices(form.key)),
    )
    if not accepted:
        raise _refuse(index)
    return out, total


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
    grad_x = torch.empty_like(out)
    grad_params = None if params is None else torch.empty_like(params)
    vectors = log_scale, bias, gain
    grads = [_gradient_of(v) for v in vectors]
    accepted = native.load().accepts(
        "actnorm_coupling_backward",
        *(
            _in(out.dtype, grad_out),
            _float(grad_log_det),
            out,
            params,
            *(_float(v) for v in vectors),
            index,
        ),
        *(grad_x, grad_params, *grads),
        *(_TYPES[out.dtype], 0 if params is None else _TYPES[params.dtype], *_sizes(out)),
        *(0 if params is None else params.shape[1] // 2, int(flip), int(inverse)),
        *_choices(form.key),
    )
    if not accepted:
        raise _refuse(index)
    return (
        grad_x,
        grad_params,
        *(_as(g, v) for g, v in zip(grads, vectors, strict=True)),  # type: ignore[return-value]
    )
