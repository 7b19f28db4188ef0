"""Per-channel mean and variance in plain PyTorch: the specification.

The map itself is that of `actnorm_coupling` without a coupling.
"""

import torch
from torch import Tensor

from ..actnorm_coupling.reference import accumulate_dtype

__all__ = ["moments"]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x (B, C, *spatial): two (C,)."""
    axes = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x.to(accumulate_dtype(x)), dim=axes, correction=0)
    return mean, variance
