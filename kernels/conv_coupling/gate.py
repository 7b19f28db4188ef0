"""Every launch of this op for the offline gate: the default form at each shape of an image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._triton import Launch, recording
from ..actnorm_coupling.form import CouplingForm
from . import triton_impl

__all__ = ["launches", "launches_elsewhere"]

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
    (8, 2, 2): (64,),
}

# Float32 has smaller tiles: compiled in one direction.
_FLOAT32 = {(12, 16, 16), (8, 2, 2)}
# What is compiled for every chip, with bfloat16 products and one direction: the largest images, whose
# patches take the most registers; with products and coupling in one launch, and in two as on AMD's chips.
_EVERYWHERE = {(12, 16, 16)}


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Launches for 300 samples of a shape, each with the bytes of the contiguous run that its main
    loads walk along: a row of a matrix of weights, or where there is none the channels of a pixel.
    Those of bfloat16 products of float32 are among those of float32."""
    yield from _launches(shape, dtype, torch.bfloat16, (False, True))
    if shape in _EVERYWHERE:
        yield from _in_two(_launches(shape, dtype, torch.bfloat16, (False,)))
    if dtype == torch.float32 and shape in _FLOAT32:
        yield from _launches(shape, dtype, dtype, (False,))


def launches_elsewhere(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """The same, of fewer: the gate would take minutes for each chip."""
    if shape in _EVERYWHERE:
        yield from _launches(shape, dtype, torch.bfloat16, (False,))
        yield from _in_two(_launches(shape, dtype, torch.bfloat16, (False,)))


def _in_two(launches: Iterator[tuple[Launch, int]]) -> Iterator[tuple[Launch, int]]:
    """The same with products and coupling in two launches."""
    before = triton_impl._BARRIER_ORDERS_STORES
    triton_impl._BARRIER_ORDERS_STORES = False
    try:
        yield from list(launches)
    finally:
        triton_impl._BARRIER_ORDERS_STORES = before


def _launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    products: torch.dtype,
    inverses: tuple[bool, ...],
) -> Iterator[tuple[Launch, int]]:
    for hidden in _HIDDEN.get(shape, ()):
        for inverse in inverses:
            for launch in _recorded(shape, dtype, products, hidden, inverse):
                by_weights = launch.options.get("FUSED", "KERNEL" in launch.options)
                row = products.itemsize * hidden if by_weights else dtype.itemsize * shape[0] // 2
                yield launch, row


def _recorded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    products: torch.dtype,
    hidden: int,
    inverse: bool,
) -> list[Launch]:
    channels, height, width = shape
    moved = channels // 2

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    x = tensor(_SAMPLES, channels, height, width, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight1, bias1 = tensor(hidden, channels - moved, 3, 3), tensor(hidden)
    weight2, bias2 = tensor(2 * moved, hidden, 3, 3), tensor(2 * moved)
    weights = weight1, bias1, weight2, bias2
    log_scale, bias, gain, log_det = (tensor(n) for n in (channels, channels, moved, _SAMPLES))
    norm, form = (log_scale, bias, gain), CouplingForm()
    with recording() as made:
        triton_impl.map(x, *weights, *norm, log_det, form, False, inverse, products)
        triton_impl.gradients(x, log_det, x, *weights, *norm, form, False, inverse, products)
    return made
