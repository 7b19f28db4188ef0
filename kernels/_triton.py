"""Launching Triton kernels, or recording what would be launched for the offline gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Launch", "launch", "recording"]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments, then constexprs and launch options by name.

    `num_warps` counts warps of 32 threads, whatever the chip: tiles are cut for that many threads.
    `amd` are the constexprs and options that are others on AMD's chips.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    amd: dict[str, Any] = field(default_factory=dict)

    def options_for(self, amd: bool) -> dict[str, Any]:
        """AMD's data-centre chips have warps of 64 threads, and no limit on registers is set."""
        if not amd:
            return dict(self.options)
        chosen = {k: v for k, v in (self.options | self.amd).items() if k != "maxnreg"}
        if "num_warps" in chosen:
            chosen["num_warps"] = max(1, chosen["num_warps"] // 2)
        return chosen


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


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    amd: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Launch on the device of the first argument. An empty grid launches nothing."""
    # Named because its default changes in Triton 3.10, and with it the last bits of every result.
    options["enable_fp_fusion"] = True
    made = Launch(kernel, arguments, options, amd or {})
    if _record is not None:
        _record.append(made)
    elif 0 not in grid:
        first: Tensor = arguments[0]
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, **made.options_for(amd=bool(torch.version.hip)))
