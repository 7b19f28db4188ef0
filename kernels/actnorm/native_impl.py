"""Launcher of native.cpp: a contiguous or channels-last float CPU tensor in, tensors out."""

import torch
from torch import Tensor

from .. import native

__all__ = ["moments"]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    samples, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    if x.dtype != torch.float32:
        x = x.float()
    mean, variance = x.new_empty(channels), x.new_empty(channels)
    outer, inner = (1, positions) if x.is_contiguous() else (positions, 1)
    native.load().call("moments", x, samples * outer, channels, inner, mean, variance)
    return mean, variance
