"""Launchers of native.cpp: CPU tensors of 32 and 16 bits in the formats of op.py, as in reference.py."""

import ctypes
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


class _Layout(ctypes.Structure):
    """What a call is like, beside its operands: native.cpp's struct of this name."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("x_type", "params_type")),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "outer", "inner", "moved")),
        *((name, ctypes.c_int64) for name in ("flip", "inverse", "norm_shift_first", "scale")),
        *((name, ctypes.c_int64) for name in ("shift_first", "interleaved", "shift_leads")),
        *((name, ctypes.c_double) for name in ("clamp", "eps", "factor")),
    )


@functools.lru_cache(maxsize=1024)
def layout_for(
    shape: torch.Size,
    contiguous: bool,
    dtype: torch.dtype,
    params_dtype: torch.dtype,
    moved: int,
    form: str,
    flip: bool,
    inverse: bool,
) -> native.Reference:
    """A reference to the layout, which it keeps alive."""
    samples, channels, *spatial = shape
    positions = math.prod(spatial)
    f = CouplingForm.parse(form)
    layout = _Layout(
        *(_TYPES[dtype], _TYPES[params_dtype], samples, channels),
        *((1, positions) if contiguous else (positions, 1)),
        *(moved, flip, inverse, f.norm_shift_first, _SCALES.index(f.scale)),
        *(f.shift_first, f.interleaved, f.leading == "shift", f.clamp, f.eps, f.factor),
    )
    return ctypes.byref(layout)


def _layout_of(
    x: Tensor, params: Tensor | None, form: CouplingForm, flip: bool, inverse: bool
) -> native.Reference:
    moved, of_params = (0, x.dtype) if params is None else (params.shape[1] // 2, params.dtype)
    return layout_for(
        x.shape, x.is_contiguous(), x.dtype, of_params, moved, form.key, flip, inverse
    )


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
    layout = layout_for(x.shape, x.is_contiguous(), x.dtype, x.dtype, moved, form.key, flip, False)
    operands = (x, _float(log_scale), _float(bias), index, a)
    accepted = native.load().accepts("actnorm_identity", *operands, layout)
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
    grads = _gradient_of(log_scale), _gradient_of(bias)
    shape = torch.Size((a.shape[0], a.shape[1] + moved, *a.shape[2:]))
    layout = layout_for(shape, a.is_contiguous(), a.dtype, a.dtype, moved, form.key, flip, False)
    operands = (_in(a.dtype, grad), a, _float(log_scale), _float(bias), index)
    accepted = native.load().accepts(
        "actnorm_identity_backward", *operands, grad_kept, *grads, layout
    )
    if not accepted:
        raise _refuse(index)
    return grad_kept, _as(grads[0], log_scale), _as(grads[1], bias)  # type: ignore[return-value]


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
    accepted = native.load().accepts(
        "actnorm_coupling",
        *(x, params, _float(log_scale), _float(bias), _float(gain), log_det, index, out, total),
        _layout_of(x, params, form, flip, inverse),
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
    grads = _gradient_of(log_scale), _gradient_of(bias), _gradient_of(gain)
    accepted = native.load().accepts(
        "actnorm_coupling_backward",
        *(_in(out.dtype, grad_out), _float(grad_log_det), out, params),
        *(_float(log_scale), _float(bias), _float(gain), index),
        *(grad_x, grad_params, *grads),
        _layout_of(out, params, form, flip, inverse),
    )
    if not accepted:
        raise _refuse(index)
    return (
        grad_x,
        grad_params,
        *(_as(grads[0], log_scale), _as(grads[1], bias), _as(grads[2], gain)),
    )


def affine(
    x: Tensor, log_scale: Tensor, bias: Tensor, log_det: Tensor | None, form: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`map` without a coupling, for contiguous float32 operands."""
    out, total = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
    native.load().call(
        "actnorm_coupling",
        *(x, None, log_scale, bias, None, log_det, None, out, total),
        layout_for(x.shape, True, x.dtype, x.dtype, 0, form, False, inverse),
    )
    return out, total


def affine_gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    form: str,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients` without a coupling, for contiguous float32 operands."""
    grads = torch.empty_like(out), torch.empty_like(log_scale), torch.empty_like(bias)
    native.load().call(
        "actnorm_coupling_backward",
        *(grad_out, grad_log_det, out, None, log_scale, bias, None, None),
        *(grads[0], None, grads[1], grads[2], None),
        layout_for(out.shape, True, out.dtype, out.dtype, 0, form, False, inverse),
    )
    return grads
