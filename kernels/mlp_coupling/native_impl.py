"""Launchers of native.cpp: contiguous float32 CPU tensors in, tensors out, as in reference.py."""

import torch
from torch import Tensor

from .. import native
from ..actnorm_coupling.form import CouplingForm
from ..actnorm_coupling.native_impl import layout_for
from .reference import Gradients

__all__ = ["gradients", "map"]


def _layout(
    x: Tensor, weight3: Tensor, form: CouplingForm, flip: bool, inverse: bool
) -> native.Reference:
    moved = weight3.shape[0] // 2
    return layout_for(x.shape, True, x.dtype, x.dtype, moved, form.key, flip, inverse)


def map(
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
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
    native.load().call(
        "mlp_coupling",
        *(x, weight1, bias1, weight2, bias2, weight3, bias3, log_scale, bias, gain, log_det),
        *(out, total, _layout(x, weight3, form, flip, inverse)),
        *(weight2.shape[1], weight2.shape[0]),
    )
    return out, total


def gradients(
    grad_out: Tensor,
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
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> Gradients:
    layers = weight1, bias1, weight2, bias2, weight3, bias3
    vectors = log_scale, bias, gain
    grads = [None if v is None else torch.empty_like(v) for v in (out, *layers, *vectors)]
    native.load().call(
        "mlp_coupling_backward",
        *(grad_out, grad_log_det, out, *layers, *vectors, *grads),
        *(_layout(out, weight3, form, flip, inverse), weight2.shape[1], weight2.shape[0]),
    )
    return tuple(grads)  # type: ignore[return-value]
