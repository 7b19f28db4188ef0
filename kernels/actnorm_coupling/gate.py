"""Every launch of this op for the offline gate: the default form at each shape, the others at two."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._triton import Launch, recording
from . import triton_impl
from .form import CouplingForm

__all__ = ["launches"]

_SAMPLES = 300

# Where the choices below are compiled too, each in one type: rows of whole images, and vectors.
_VARIED: dict[tuple[int, ...], torch.dtype] = {
    (12, 16, 16): torch.bfloat16,
    (32, 1, 1): torch.float32,
}


@dataclass(frozen=True)
class _Choice:
    form: CouplingForm = field(default_factory=CouplingForm)
    inverse: bool = False
    flip: bool = False
    indexed: bool = False
    whole: bool = False  # every channel is transformed
    bare: bool = False  # neither actnorm nor gain
    uncoupled: bool = False  # actnorm alone
    channels_last: bool = False


_INVERSE = _Choice(inverse=True)

_CHOICES = (
    _Choice(CouplingForm("exp", interleaved=True, leading="shift"), bare=True),
    _Choice(CouplingForm("exp", interleaved=True), channels_last=True, inverse=True),
    _Choice(CouplingForm("tanh", shift_first=True, norm_shift_first=True), flip=True),
    _Choice(CouplingForm("atan", clamp=2.0), flip=True, inverse=True, bare=True),
    _Choice(CouplingForm("two_sigmoid", shift_first=True, factor=0.1), inverse=True, whole=True),
    _Choice(CouplingForm("soft_clamp", clamp=6.9078, interleaved=True), indexed=True),
    _Choice(CouplingForm("sigmoid", eps=1e-3, leading="shift"), indexed=True, inverse=True),
    _Choice(CouplingForm("sigmoid"), channels_last=True),
    _Choice(CouplingForm("inverse_sigmoid"), channels_last=True, indexed=True),
    _Choice(uncoupled=True, inverse=True),
    _Choice(uncoupled=True, channels_last=True),
)


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Launches for 300 samples of a shape, each with the bytes of the contiguous run that its main
    loads walk along."""
    yield from _launches(shape, dtype, _Choice())
    if dtype == torch.bfloat16:  # the wider tiles: float32 is compiled in one direction
        yield from _launches(shape, dtype, _INVERSE)
    if _VARIED.get(shape) == dtype:
        for choice in _CHOICES:
            if not (choice.channels_last and shape[1:] == (1, 1)):  # one pixel: contiguous as well
                yield from _launches(shape, dtype, choice)


def _launches(
    shape: tuple[int, ...], dtype: torch.dtype, choice: _Choice
) -> Iterator[tuple[Launch, int]]:
    channels, *spatial = shape
    moved = 0 if choice.uncoupled else channels if choice.whole else channels // 2
    memory_format = torch.channels_last if choice.channels_last else torch.contiguous_format

    def tensor(size: int) -> Tensor:
        empty = torch.empty(_SAMPLES, size, *spatial, dtype=dtype, device="meta")
        return empty.contiguous(memory_format=memory_format)

    x = tensor(channels)
    vector, log_det = (torch.empty(n, device="meta") for n in (channels, _SAMPLES))
    norm = None if choice.bare else vector
    gain = None if choice.bare or choice.uncoupled else vector.new_empty(moved)
    index = vector.to(torch.int64) if choice.indexed else None
    options = (choice.form, choice.flip, choice.inverse)
    operands = (None if choice.uncoupled else tensor(2 * moved), norm, norm, gain)
    with recording() as made:
        triton_impl.map(x, *operands, log_det, index, *options)
        triton_impl.gradients(x, log_det, x, *operands, index, *options)
        if 0 < moved < channels and not (choice.bare or choice.inverse):
            split = (vector, vector, index, moved, choice.form, choice.flip)
            a = triton_impl.identity(x, *split)
            triton_impl.identity_backward(a, a, *split)

    # The length of a run of neighbours in memory that belong to one part, in elements.
    inner = 1 if choice.channels_last else x.shape[2:].numel()
    run = inner if choice.indexed else inner * min(n for n in (moved, channels - moved) if n)
    for launch in made:
        if "GROUPS" in launch.options:  # second stage: partial sums of one channel
            yield launch, 4 * launch.options["WIDTH"]
        else:
            yield launch, x.element_size() * run
