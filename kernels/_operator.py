"""What every op's `op.py` shares: registering operators, and checks of operands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check", "check_float", "operator"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def operator(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `body` as hybridflow::name. The result calls it through the dispatcher only where
    the compiler has to see it: in eager mode the dispatcher costs more than a small kernel."""
    torch.library.custom_op(f"hybridflow::{name}", body, mutates_args=()).register_fake(fake)
    op = getattr(torch.ops.hybridflow, name).default

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else body(*args)

    return call


def check_float(name: str, value: Tensor) -> None:
    """Raise ValueError unless `value` has a floating type."""
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name}: got {value.dtype}, want a floating type")


def check(
    name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless `value` has this shape, the device of x, and this type (any floating
    type if None)."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {shape}")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want {x.device}")
    if dtype is None:
        check_float(name, value)
    elif value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype}, want {dtype}")
