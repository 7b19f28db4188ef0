"""Launchers of native.cpp: dense CPU tensors in, tensors out, as in reference.py."""

import math

import torch
from torch import Tensor

from .. import native

__all__ = ["backward", "forward"]


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # native.cpp: Type


def forward(z: Tensor, log_det: Tensor | None) -> Tensor:
    samples, *dims = z.shape
    out = torch.empty(samples, dtype=torch.float32)
    operands = (z, log_det, _TYPES[z.dtype], samples, math.prod(dims), out)
    native.load().call("standard_normal_log_prob", *operands)
    return out


def backward(grad: Tensor, z: Tensor) -> Tensor:
    samples, *dims = z.shape
    out = torch.empty_like(z)
    operands = (grad, z, _TYPES[z.dtype], samples, math.prod(dims), out)
    native.load().call("standard_normal_log_prob_backward", *operands)
    return out
