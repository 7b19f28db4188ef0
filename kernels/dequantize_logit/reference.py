"""Uniform dequantisation and the logit in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors. Arithmetic is float64 for float64 operands and
float32 for all others. Symbols and derivations: README.md.
"""

import math

import torch
from torch import Tensor

from .. import _philox

__all__ = [
    "accumulate_dtype",
    "dequantize",
    "inverse",
    "inverse_backward",
    "logit",
    "logit_backward",
]


def accumulate_dtype(x: Tensor | None) -> torch.dtype:
    """Type of the arithmetic and of log-dets: float64 for float64, else float32."""
    return torch.float64 if x is not None and x.dtype == torch.float64 else torch.float32


def _logit(v: Tensor, c: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    """ln(v/c), and the log-det of it; c is 1 - v, found without the cancellation."""
    terms = math.log(1 - 2 * alpha) - v.log() - c.log()
    own = terms.reshape(v.shape[0], v.shape[1:].numel()).sum(1)
    return (v / c).log(), own if log_det is None else log_det + own


def dequantize(
    x: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    log_det: Tensor | None,
    levels: int,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Either `seed` or `noise` is given."""
    dtype = accumulate_dtype(noise)
    samples, columns = x.shape[0], x.shape[1:].numel()
    if noise is None:
        assert seed is not None
        noise = _philox.uniforms(seed, samples, columns, dtype).view(x.shape)
    slope = (1 - 2 * alpha) / levels
    u, grey = noise.to(dtype), x.to(dtype)
    v = alpha + slope * (grey + u)
    c = alpha + slope * ((levels - 1 - grey) + (1 - u))
    return _logit(v, c, log_det, alpha)


def logit(x: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x))
    slope = 1 - 2 * alpha
    y, total = _logit(alpha + slope * wide, alpha + slope * (1 - wide), log_det, alpha)
    return y.to(x.dtype), total


def logit_backward(grad: Tensor, grad_log_det: Tensor, y: Tensor, alpha: float) -> Tensor:
    wide = y.to(accumulate_dtype(y))
    per_sample = grad_log_det.view(-1, *(1,) * (y.dim() - 1))
    grad_y = grad.to(wide) + per_sample * (wide / 2).tanh()
    return (grad_y * (1 - 2 * alpha) * (2 + 2 * wide.cosh())).to(y.dtype)


def inverse(y: Tensor, alpha: float) -> Tensor:
    wide = y.to(accumulate_dtype(y))
    return ((wide.sigmoid() - alpha) / (1 - 2 * alpha)).to(y.dtype)


def inverse_backward(grad: Tensor, y: Tensor, alpha: float) -> Tensor:
    wide = y.to(accumulate_dtype(y))
    slope = wide.sigmoid() * (-wide).sigmoid()
    return (grad.to(wide) * slope / (1 - 2 * alpha)).to(y.dtype)
