"""The standard normal's log-density in plain PyTorch: the specification of this op.

Works on any device and floating type. Arithmetic and the result are float64 for float64 z and
float32 for all others; the gradient has the type and the memory format of z.
"""

import math

import torch
from torch import Tensor

__all__ = ["accumulate_dtype", "backward", "forward"]


def accumulate_dtype(z: Tensor) -> torch.dtype:
    """The type of arithmetic and of the result."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def forward(z: Tensor, log_det: Tensor | None) -> Tensor:
    """log N(z; 0, I), plus log_det: (B,)."""
    size = z.shape[1:].numel()
    squared = z.to(accumulate_dtype(z)).square().reshape(z.shape[0], size).sum(1)
    log_prob = -0.5 * (squared + size * math.log(2 * math.pi))
    return log_prob if log_det is None else log_prob + log_det


def backward(grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of z from that of the result, (B,)."""
    per_sample = grad.reshape(-1, *(1 for _ in z.shape[1:]))
    return (-z.to(grad.dtype) * per_sample).to(z.dtype)
