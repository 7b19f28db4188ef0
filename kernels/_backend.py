"""Which implementation of an op runs: the native library, Triton, or the reference."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from . import native

__all__ = ["Backend", "choose", "using"]

Backend = Literal["native", "triton", "reference"]

_forced: Backend | None = None


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Run every op by one implementation inside a `with` block. For tests and benchmarks.

    "triton" takes CPU tensors only under Triton's interpreter: TRITON_INTERPRET=1 set before the
    kernels are first used. Not safe with threads.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(x: Tensor, *others: Tensor | None) -> Backend:
    """The implementation for these operands, which are all where x is.

    CUDA runs Triton, and float32 and 16-bit floats on the CPU run the native library. All else runs
    the reference: float64 on the CPU, other devices, and either of the two where it is not installed.
    """
    if _forced is not None:
        return _forced
    if x.is_cuda and _has_triton():
        return "triton"
    if not x.is_cpu or not native.available() or x.dtype is torch.float64:
        return "reference"
    for t in others:
        if t is not None and t.dtype is torch.float64:
            return "reference"
    return "native"
