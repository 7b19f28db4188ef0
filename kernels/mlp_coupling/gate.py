"""Every launch of this op for the offline gate: vectors of two numbers, and the widest layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._triton import Launch, recording
from ..actnorm_coupling.form import CouplingForm
from . import triton_impl

__all__ = ["launches"]

_SAMPLES = 300
_SIZES = ((2, 64), (64, 128))  # entries and hidden units


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """Launches for 300 samples, each with the bytes of the contiguous run that its main loads walk
    along: a row of a matrix of weights. For vectors alone: images have other conditioners."""
    if len(shape) > 1:
        return
    for size, hidden in _SIZES:
        # The inverse differs in where actnorm is, and the form in a few instructions.
        inverse = size == 2 and dtype == torch.bfloat16
        for launch in _launches(size, hidden, dtype, inverse):
            yield launch, dtype.itemsize * hidden


def _launches(size: int, hidden: int, dtype: torch.dtype, inverse: bool) -> list[Launch]:
    moved = size // 2

    def tensor(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    x = tensor(_SAMPLES, size).to(dtype)
    parameters: tuple[Any, ...] = (
        *(tensor(hidden, size - moved), tensor(hidden)),
        *(tensor(hidden, hidden), tensor(hidden), tensor(2 * moved, hidden)),
        *(tensor(n) for n in (2 * moved, size, size, moved)),
    )
    log_det = tensor(_SAMPLES)
    choices: tuple[Any, ...] = (CouplingForm(), False, inverse)
    operands: tuple[Any, ...] = (*parameters, log_det)
    with recording() as made:
        triton_impl.map(x, *(*operands, *choices))
        triton_impl.gradients(x, log_det, x, *parameters, *choices)
    return made
