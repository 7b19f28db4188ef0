"""Launchers of native.cpp: contiguous float32 CPU tensors in, tensors out, as in reference.py."""

import torch
from torch import Tensor

from .. import native

__all__ = [
    "backward",
    "forward",
    "identity",
    "identity_backward",
    "inverse",
    "inverse_backward",
]


def identity(x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
    library = native.load()
    shape = library.shape(x, flip)
    a = x.new_empty(x.shape[0], x.shape[1] - x.shape[1] // 2, *x.shape[2:])
    scratch = library.scratch(shape, x)
    library.call("actnorm_identity", shape, x, log_scale, bias, scratch, a)
    return a


def identity_backward(
    grad: Tensor, a: Tensor, log_scale: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    library = native.load()
    grad_x = a.new_empty(a.shape[0], log_scale.shape[0], *a.shape[2:])
    shape = library.shape(grad_x, flip)
    grads = grad_x, torch.empty_like(log_scale), torch.empty_like(bias)
    scratch = library.scratch(shape, a)
    library.call("actnorm_identity_backward", shape, grad, a, log_scale, bias, scratch, *grads)
    return grads


def forward(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    return _map("actnorm_coupling", x, params, log_scale, bias, gain, log_det, flip)


def inverse(
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    return _map("actnorm_coupling_inverse", y, params, log_scale, bias, gain, log_det, flip)


def backward(
    grad_y: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = "actnorm_coupling_backward"
    return _gradients(name, grad_y, grad_log_det, y, params, log_scale, bias, gain, flip)


def inverse_backward(
    grad_x: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = "actnorm_coupling_inverse_backward"
    return _gradients(name, grad_x, grad_log_det, x, params, log_scale, bias, gain, flip)


def _map(
    name: str,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    library = native.load()
    shape = library.shape(x, flip)
    out = torch.empty_like(x), x.new_empty(x.shape[0])
    scratch = library.scratch(shape, x)
    library.call(name, shape, x, params, log_scale, bias, gain, log_det, scratch, *out)
    return out


def _gradients(
    name: str,
    grad: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    library = native.load()
    shape = library.shape(out, flip)
    grads = (
        torch.empty_like(out),
        torch.empty_like(params),
        torch.empty_like(log_scale),
        torch.empty_like(bias),
        torch.empty_like(gain),
    )
    inputs = (grad, grad_log_det, out, params, log_scale, bias, gain)
    library.call(name, shape, *inputs, library.scratch(shape, out), *grads)
    return grads
