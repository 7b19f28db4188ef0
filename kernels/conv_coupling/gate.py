"""Every launch of this op for the offline gate: the default form at each shape of an image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._triton import Launch, recording
from ..actnorm_coupling.form import CouplingForm
from . import triton_impl

__all__ = ["launches"]

_SAMPLES = 300

# Hidden channels at each shape of the presets. They are no compile-time constant: of several only
# the numbers of programs and of chunks differ, but whether both products are one launch does too.
_HIDDEN: dict[tuple[int, ...], tuple[int, ...]] = {
    (4, 16, 16): (128,),
    (8, 8, 8): (128,),
    (16, 4, 4): (128,),
    (64, 2, 2): (512,),
    (12, 16, 16): (128, 512),
    (24, 8, 8): (128, 512),
    (48, 4, 4): (128, 512),
    (192, 2, 2): (512, 1024),
    (4, 4, 4): (32,),
}

# The inverse differs in where actnorm is, and float32 has smaller tiles: each where kernels are most
# unlike one another, so that the gate stays short.
_INVERSE = {(12, 16, 16)}
_FLOAT32 = {(12, 16, 16), (48, 4, 4), (64, 2, 2)}


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Launches for 300 samples of a shape, each with the bytes of the contiguous run that its main
    loads walk along: a row of a matrix of weights, or where there is none the channels of a pixel."""
    if dtype == torch.float32 and shape not in _FLOAT32:
        return
    inverses = (False, True) if shape in _INVERSE and dtype == torch.bfloat16 else (False,)
    for hidden in _HIDDEN.get(shape, ()):
        for inverse in inverses:
            for launch in _launches(shape, dtype, hidden, inverse):
                fused = launch.options.get("FUSED", True)
                # A thread's share of the smallest matrices is below 16 bytes.
                yield launch, min(16, hidden // 4) if fused else dtype.itemsize * shape[0] // 2


def _launches(
    shape: tuple[int, ...], dtype: torch.dtype, hidden: int, inverse: bool
) -> list[Launch]:
    channels, height, width = shape
    moved = channels // 2

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    x = tensor(_SAMPLES, channels, height, width, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    parameters = (
        tensor(hidden, channels - moved, 3, 3),
        tensor(hidden),
        tensor(2 * moved, hidden, 3, 3),
        *(tensor(n) for n in (2 * moved, channels, channels, moved)),
    )
    log_det, choices = tensor(_SAMPLES), (CouplingForm(), False, inverse)
    with recording() as made:
        triton_impl.map(x, *parameters, log_det, *choices)
        triton_impl.gradients(x, log_det, x, *parameters, *choices)
    return made
