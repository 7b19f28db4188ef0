"""The native CPU library: loading it, and calling its functions on tensors.

The library is plain C, built from the `native.cpp` of every op (see CMakeLists.txt) once per
instruction set. A function `f` is exported as `hybridflow_<instruction set>_f`. So is one of tiles, from an
`amx.cpp`: once for AMX, where the compiler knows it, and once emulated.
"""

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

# Imported before the library is opened: torch brings the OpenMP runtime (its wheel's libgomp.so.1),
# which then also serves this library, since that asks for the same SONAME: one pool of threads
# instead of two that compete.
import torch
from torch import Tensor

__all__ = [
    "INSTRUCTION_SETS",
    "NativeLibraryError",
    "Reference",
    "available",
    "load",
    "why_missing",
]

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
"""Best first; a library or a processor may lack the first two."""

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PATH = Path(__file__).with_name(f"libhybridflow_native{_SUFFIX}")


Reference = Any  # what ctypes.byref gives
Argument = Tensor | Reference | int | float | None
# By name: the function, and which of its arguments are tensors.
_Functions = dict[str, tuple[Any, list[int]]]


class NativeLibraryError(RuntimeError):
    """The native CPU library is missing or cannot be loaded; the message says what to do."""


class Library:
    """The loaded library. `isa` is the instruction set in use: the best this processor runs."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self.supported = tuple(
            isa for isa in INSTRUCTION_SETS if self._dll.hybridflow_runs(isa.encode())
        )
        self.isa = self.supported[0]
        self._functions: _Functions = {}  # of `isa`
        self._tile_functions: _Functions = {}  # of `tiles`

    @functools.cached_property
    def tiles(self) -> str | None:
        """How `call_tiles` runs: "amx", or None if it cannot: the processor, the kernel or the compiler
        that built the library lacks it. Linux is asked for the registers when this is first read."""
        return "amx" if self._dll.hybridflow_runs(b"amx") else None

    @contextmanager
    def using(self, isa: str) -> Iterator[None]:
        """Use another instruction set inside a `with` block. For tests: not safe with threads."""
        if isa not in self.supported:
            raise ValueError(f"isa: got {isa!r}, want one of {self.supported}")
        before = self.isa, self._functions
        self.isa, self._functions = isa, {}
        try:
            yield
        finally:
            self.isa, self._functions = before

    @contextmanager
    def using_tiles(self, tiles: Literal["amx", "emulated"] | None) -> Iterator[None]:
        """Run `call_tiles` so inside a `with` block. For tests: not safe with threads."""
        if tiles is not None and not self._dll.hybridflow_runs(tiles.encode()):
            raise ValueError(f"tiles: got {tiles!r}, which does not run here")
        before = self.tiles, self._tile_functions
        self.tiles, self._tile_functions = tiles, {}
        try:
            yield
        finally:
            self.tiles, self._tile_functions = before

    def call(self, name: str, *arguments: Argument) -> None:
        """Call `name`: tensors (contiguous, on the CPU) and references pass as pointers and None as a
        null pointer, integers as int64_t, floats as double; the number of threads torch uses now comes
        last."""
        self._run(self._functions, self.isa, name, arguments)

    def call_tiles(self, name: str, *arguments: Argument) -> None:
        """`call` for a function of tiles.

        Raises:
            NativeLibraryError: `tiles` is None.
        """
        if self.tiles is None:
            raise NativeLibraryError(
                "this processor, its kernel or the library's compiler lacks AMX"
            )
        self._run(self._tile_functions, self.tiles, name, arguments)

    def accepts(self, name: str, *arguments: Argument) -> bool:
        """`call` for a function that checks its operands: False if it refused them, and did nothing."""
        return self._run(self._functions, self.isa, name, arguments) != 0

    def _run(
        self, functions: _Functions, isa: str, name: str, arguments: tuple[Argument, ...]
    ) -> int:
        known = functions.get(name)
        if known is None:
            # What each argument is holds for every call; said once, ctypes converts faster.
            function = getattr(self._dll, f"hybridflow_{isa}_{name}")
            function.argtypes = [*map(_c_type, arguments), ctypes.c_int64]
            tensors = [i for i, a in enumerate(arguments) if a is None or isinstance(a, Tensor)]
            known = functions[name] = function, tensors
        function, tensors = known
        values: list[Any] = [*arguments, torch.get_num_threads()]
        for i in tensors:
            if values[i] is not None:
                values[i] = values[i].data_ptr()
        return function(*values)


def _c_type(argument: Argument) -> Any:
    if isinstance(argument, float):
        return ctypes.c_double
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p


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
