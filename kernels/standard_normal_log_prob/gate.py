"""What the offline gate compiles: every Triton launch of the op for one shape."""

from collections.abc import Iterator

import torch

from .._triton import Launch, recording

__all__ = ["launches"]

_SAMPLES = 300


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Every launch for z of this shape and type, with the bytes of the contiguous run that its
    loads walk along: a sample."""
    from . import triton_impl as op

    z = torch.empty(_SAMPLES, *shape, dtype=dtype, device="meta")
    log_det = z.new_empty(_SAMPLES, dtype=torch.float32)
    with recording() as recorded:
        op.forward(z, log_det)
        op.backward(log_det, z)
    for launch in recorded:
        yield launch, z.element_size() * torch.Size(shape).numel()
