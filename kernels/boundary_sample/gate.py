"""What the offline gate compiles of this op: every launch for one shape of a sample."""

import math
from collections.abc import Iterator

import torch

from .._triton import Launch, recording
from . import triton_impl as op

__all__ = ["launches"]

_SAMPLES, _CLASSES, _BETA = 300, 10, 0.5


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Each launch for ten means of this shape and type, and the bytes of a run that its loads walk
    along: a quarter of a mean in the forward, a row of partial sums at the end. The means of samples
    of less than 128 values are fewer bytes than a warp could take sixteen each of."""
    size = math.prod(shape)
    means = torch.empty(_CLASSES, size, dtype=dtype, device="meta")
    seed = means.new_empty((), dtype=torch.int64)
    with recording() as made:
        z, labels, pair = op.forward(means, seed, _SAMPLES, _BETA)
        op.backward(z, labels, z, labels, pair, means, _BETA)
    for launch in made:
        if "SPREAD" in launch.options:
            whole = size % 4 == 0 and size >= 128
            yield launch, means.element_size() * size // 4 if whole else 1
        else:
            yield launch, size * (4 if "GROUPS" in launch.options else means.element_size())
