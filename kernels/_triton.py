"""Launching Triton kernels, or recording what would be launched for the offline gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Launch", "for_amd", "launch", "recording"]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments, then constexprs and launch options by name.

    `num_warps` counts warps of 32 threads, whatever the chip: tiles are cut for that many threads.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_record: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches inside a `with` block instead of making them; tensors may be on "meta"."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def for_amd(options: dict[str, Any]) -> dict[str, Any]:
    """Launch options for AMD's data-centre chips: warps of 64 threads, no limit on registers, and
    float32 products as they are, which their matrix cores can do."""
    kept = {name: value for name, value in options.items() if name != "maxnreg"}
    if kept.get("PRECISION") == "tf32x3":
        kept["PRECISION"] = "ieee"
    if "num_warps" in kept:
        kept["num_warps"] = max(1, kept["num_warps"] // 2)
    return kept


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the first argument. An empty grid launches nothing."""
    # Named because its default changes in Triton 3.10, and with it the last bits of every result.
    options["enable_fp_fusion"] = True
    if _record is not None:
        _record.append(Launch(kernel, arguments, options))
    elif 0 not in grid:
        first: Tensor = arguments[0]
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, **(for_amd(options) if torch.version.hip else options))
