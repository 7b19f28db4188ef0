"""What the offline gate compiles of this op: see kernels/check.py."""

from collections.abc import Iterator

import torch

from .._triton import Launch, recording
from . import triton_impl

__all__ = ["launches"]

SAMPLES = 300


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Every launch for one shape, with the bytes of a contiguous run that its loads walk along."""
    x = torch.empty(SAMPLES, *shape, dtype=dtype, device="meta")
    with recording() as launched:
        triton_impl.moments(x)
    columns, channels = launched
    yield columns, x.element_size() * x.shape[1:].numel()
    yield channels, 4 * x.shape[2:].numel()
