"""What every op's `op.py` shares: registering operators, and checks of operands."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["check", "check_float", "contiguous", "first_order", "operator"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def operator(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    eager: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `body` as hybridflow::name. The result calls it through the dispatcher only where
    the compiler has to see it: in eager mode, where the dispatcher costs more than a small kernel,
    it calls `eager`, or the body itself."""
    torch.library.custom_op(f"hybridflow::{name}", body, mutates_args=()).register_fake(fake)
    op = getattr(torch.ops.hybridflow, name).default
    direct = body if eager is None else eager

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else direct(*args)

    return call


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, whose price, that of a small kernel, is paid only under create_graph."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call


def contiguous(*values: Tensor | None) -> list[Any]:
    """Each as a contiguous tensor, or None where it is None."""
    return [None if v is None else v.contiguous() for v in values]


def check_float(name: str, value: Tensor) -> None:
    """Raise ValueError unless `value` has a floating type."""
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name}: got {value.dtype}, want a floating type")


def check(
    name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless `value` has this shape, the device of x, and this type (any floating
    type if None)."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {shape}")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want {x.device}")
    if dtype is None:
        check_float(name, value)
    elif value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype}, want {dtype}")
