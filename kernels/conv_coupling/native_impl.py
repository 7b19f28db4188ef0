"""Launchers of native.cpp: float32 CPU tensors in, tensors out, as in reference.py.

Contiguous x is used as it is, channels-last x copied to it and back. The hidden layer is never stored.
`products` is float32 like all else.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..actnorm_coupling.form import CouplingForm
from ..actnorm_coupling.native_impl import layout_for

__all__ = ["gradients", "gradients_from", "map", "map_keeping"]


def _call(
    x: Tensor, weight2: Tensor, form: str, flip: bool, inverse: bool
) -> tuple[native.Argument, ...]:
    """What a call is like, beside its operands."""
    outputs, hidden, size, _ = weight2.shape
    layout = layout_for(x.shape, True, x.dtype, x.dtype, outputs // 2, form, flip, inverse)
    return layout, x.shape[2], x.shape[3], hidden, size


def _like(x: Tensor, v: Tensor) -> Tensor:
    """In the memory format of x."""
    return v if x.is_contiguous() else v.contiguous(memory_format=torch.channels_last)


def map_keeping(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`map` of contiguous operands, and what the conditioner made: (B, 2T, h, w)."""
    out, total = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
    params = x.new_empty((x.shape[0], weight2.shape[0], *x.shape[2:]))
    native.load().call(
        "conv_coupling",
        *(x, weight1, bias1, weight2, bias2, log_scale, bias, gain, log_det, out, params, total),
        *_call(x, weight2, form, flip, inverse),
    )
    return out, total, params


def map(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    operands = weight1, bias1, weight2, bias2, log_scale, bias, gain, log_det
    out, total, _ = map_keeping(x.contiguous(), *operands, form.key, flip, inverse)
    return _like(x, out), total


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    layers: tuple[Tensor, Tensor, Tensor, Tensor] = weight1, bias1, weight2, bias2
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None] = log_scale, bias, gain
    choices: tuple[str, bool, bool] = form.key, flip, inverse
    given: tuple[Tensor, Tensor, Tensor] = grad_out.contiguous(), grad_log_det, out.contiguous()
    grad_x, *grads = gradients_from(*given, None, *layers, *vectors, *choices)
    return _like(out, grad_x), *grads


def gradients_from(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor | None,
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
) -> list[Any]:
    """`gradients` of contiguous operands, from what the conditioner made or, without it, made anew."""
    parameters = weight1, bias1, weight2, bias2, log_scale, bias, gain
    grads = [None if v is None else torch.empty_like(v) for v in (out, *parameters)]
    native.load().call(
        "conv_coupling_backward",
        *(grad_out, grad_log_det, out, params, *parameters, *grads),
        *_call(out, weight2, form, flip, inverse),
    )
    return grads
