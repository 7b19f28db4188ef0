"""Launchers of native.cpp: contiguous CPU tensors in, tensors out, as in reference.py.

Arithmetic is float32; 16-bit tensors are converted on their way in and out.
"""

import torch
from torch import Tensor

from .. import native

__all__ = ["dequantize", "inverse", "inverse_backward", "logit", "logit_backward"]


def dequantize(
    x: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    log_det: Tensor | None,
    levels: int,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    samples = x.shape[0]
    y = torch.empty_like(x, dtype=torch.float32)
    total = y.new_empty(samples)
    noise = None if noise is None else noise.float()
    sizes = samples, x.shape[1:].numel()
    native.load().call("dequantize_logit", x, seed, noise, log_det, y, total, *sizes, levels, alpha)
    return y, total


def logit(x: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    y = torch.empty_like(wide)
    total = y.new_empty(x.shape[0])
    sizes = x.shape[0], x.shape[1:].numel()
    native.load().call("logit_transform", wide, log_det, y, total, *sizes, alpha)
    return y.to(x.dtype), total


def logit_backward(grad: Tensor, grad_log_det: Tensor, y: Tensor, alpha: float) -> Tensor:
    wide = y.float()
    grad_x = torch.empty_like(wide)
    operands = grad.float(), grad_log_det, wide, grad_x
    sizes = y.shape[0], y.shape[1:].numel()
    native.load().call("logit_transform_backward", *operands, *sizes, alpha)
    return grad_x.to(y.dtype)


def inverse(y: Tensor, alpha: float) -> Tensor:
    wide = y.float()
    x = torch.empty_like(wide)
    native.load().call("logit_transform_inverse", wide, x, x.numel(), alpha)
    return x.to(y.dtype)


def inverse_backward(grad: Tensor, y: Tensor, alpha: float) -> Tensor:
    wide = y.float()
    grad_y = torch.empty_like(wide)
    operands = grad.float(), wide, grad_y
    native.load().call("logit_transform_inverse_backward", *operands, y.numel(), alpha)
    return grad_y.to(y.dtype)
