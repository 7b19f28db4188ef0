"""In which arithmetic networks run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hybridflow.config import Precision

__all__ = ["arithmetic"]


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run networks in this arithmetic inside a `with` block, or a function that this decorates.

    fp32 takes PyTorch's settings as they are; high is its `torch.set_float32_matmul_precision("high")`,
    for the block; bf16 is autocast to bfloat16.
    """
    before = torch.get_float32_matmul_precision() if precision == "high" else None
    if before:
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)
