"""The native CPU library: loading it, and calling its functions on tensors.

The library is plain C, built from the `native.cpp` of every op (see CMakeLists.txt) once per
instruction set. A function `f` is exported as `hybridflow_<instruction set>_f`.
"""

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Imported before the library is opened: torch brings the OpenMP runtime (its wheel's libgomp.so.1),
# which then also serves this library, since that asks for the same SONAME: one pool of threads
# instead of two that compete.
import torch
from torch import Tensor

__all__ = ["INSTRUCTION_SETS", "NativeLibraryError", "available", "load", "why_missing"]

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
"""Best first; a library or a processor may lack the first two."""

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PATH = Path(__file__).with_name(f"libhybridflow_native{_SUFFIX}")


class NativeLibraryError(RuntimeError):
    """The native CPU library is missing or cannot be loaded; the message says what to do."""


class _Shape(ctypes.Structure):
    """`Shape` of native.h."""

    _fields_ = (
        ("samples", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("flip", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class Library:
    """The loaded library. `isa` is the instruction set in use: the best this processor runs."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self._dll.hybridflow_scratch.restype = ctypes.c_int64
        self.supported = tuple(
            isa for isa in INSTRUCTION_SETS if self._dll.hybridflow_runs(isa.encode())
        )
        self.isa = self.supported[0]

    @contextmanager
    def using(self, isa: str) -> Iterator[None]:
        """Use another instruction set inside a `with` block. For tests: not safe with threads."""
        if isa not in self.supported:
            raise ValueError(f"isa: got {isa!r}, want one of {self.supported}")
        before, self.isa = self.isa, isa
        try:
            yield
        finally:
            self.isa = before

    def shape(self, x: Tensor, flip: bool) -> _Shape:
        """The shape of x (B, C, *spatial), with the number of threads torch uses now."""
        samples, channels = x.shape[:2]
        return _Shape(samples, channels, x.shape[2:].numel(), flip, torch.get_num_threads())

    def scratch(self, shape: _Shape, like: Tensor) -> Tensor:
        """Scratch memory for one call."""
        return like.new_empty(self._dll.hybridflow_scratch(ctypes.byref(shape)))

    def call(self, name: str, shape: _Shape, *tensors: Tensor | None) -> None:
        """Call `name` on contiguous float32 CPU tensors; None is passed as a null pointer."""
        pointers = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors)
        getattr(self._dll, f"hybridflow_{self.isa}_{name}")(ctypes.byref(shape), *pointers)


@functools.cache
def _open() -> Library | str:
    """The library, or one line saying why there is none."""
    cure = "install a C++17 compiler with OpenMP and reinstall hybridflow"
    if not _PATH.exists():
        return f"the native CPU library is missing ({_PATH.name} was not built): {cure}"
    try:
        return Library(_PATH)
    except OSError as error:
        return f"the native CPU library cannot be loaded ({error}): {cure}"


def load() -> Library:
    """The native library, loaded on the first call.

    Raises:
        NativeLibraryError: it was not built or cannot be loaded; says which, and the cure.
    """
    library = _open()
    if isinstance(library, str):
        raise NativeLibraryError(library)
    return library


def available() -> bool:
    """Whether `load` succeeds."""
    return isinstance(_open(), Library)


def why_missing() -> str:
    """Why `load` fails, in one line; empty if it does not."""
    library = _open()
    return library if isinstance(library, str) else ""
