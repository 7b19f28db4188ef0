"""What the offline gate compiles of this op: every launch for one shape of a sample."""

from collections.abc import Iterator

import torch

from .._triton import Launch, recording
from . import triton_impl as op

__all__ = ["launches"]

_SAMPLES = 300


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Each launch for samples of this shape and type, and the bytes of a run that its loads walk
    along: a sample, or the whole array where samples do not matter."""
    grey = torch.empty(_SAMPLES, *shape, dtype=torch.uint8, device="meta")
    seed = grey.new_empty((), dtype=torch.int64)
    x = grey.new_empty(grey.shape, dtype=dtype)
    noise = grey.new_empty(grey.shape, dtype=torch.float32)
    log_det = grey.new_empty(_SAMPLES, dtype=torch.float32)
    columns = x.shape[1:].numel()
    row = columns * x.element_size()

    def recorded(run: int, function, *operands) -> Iterator[tuple[Launch, int]]:
        with recording() as made:
            function(*operands)
        for launch in made:
            yield launch, run

    # Grey levels are a fifth of the traffic and are read four at a time, for stores of 16 bytes.
    yield from recorded(1, op.dequantize, grey, seed, None, log_det, 256, 0.05)
    quarter = columns if columns % 4 == 0 else 1  # bytes of a quarter of the noise
    yield from recorded(quarter, op.dequantize, grey, None, noise, log_det, 256, 0.05)
    yield from recorded(row, op.logit, x, log_det, 0.05)
    yield from recorded(row, op.logit_backward, x, log_det, x, 0.05)
    whole = 16 if x.numel() % 16 == 0 else 1
    yield from recorded(whole, op.inverse, x, 0.05)
    yield from recorded(whole, op.inverse_backward, x, x, 0.05)
