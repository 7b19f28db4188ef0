"""What the offline gate compiles: every Triton launch of the op for one shape."""

from collections.abc import Iterator

import torch

from .._triton import Launch, recording

__all__ = ["launches"]

_SAMPLES = 300
_CLASSES = (10, 100)  # one tile of classes, and several


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Every launch for z of this shape and type, means in float32; with it the bytes of the
    contiguous run that its main loads walk along."""
    from . import triton_impl as op

    size = torch.Size(shape).numel()
    for classes in _CLASSES:
        z = torch.empty(_SAMPLES, size, dtype=dtype, device="meta")
        means = torch.empty(classes, size, device="meta")
        log_prior, log_prob = means.new_empty(classes), means.new_empty(_SAMPLES)
        joint = means.new_empty(_SAMPLES, classes)
        labels = torch.empty(_SAMPLES, dtype=torch.int64, device="meta")
        with recording() as recorded:
            op.forward(z, means, log_prior, labels)
            op.backward(joint, log_prob, joint, z, means, log_prior, joint, labels)
        for launch in recorded:
            rows = "D" not in launch.options
            if size < 64:  # a tile of so few columns has less than 16 bytes for each thread
                yield launch, 1
            else:
                yield launch, 4 * classes if rows else z.element_size() * size
