"""Launchers of native.cpp and amx.cpp: float32 CPU tensors in, tensors out, as in reference.py."""

from typing import Any

from torch import Tensor

from .. import native

__all__ = ["backward", "forward"]


def _sizes(a: Tensor, weight2: Tensor) -> tuple[int, ...]:
    samples, inputs, height, width = a.shape
    outputs, hidden, size, _ = weight2.shape
    return samples, height, width, inputs, hidden, outputs, size


def _call(parts: int, name: str, *arguments: Any) -> None:
    library = native.load()
    if parts:
        library.call_tiles(name, *arguments, parts)
    else:
        library.call(name, *arguments)


def forward(
    a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, parts: int = 0
) -> Tensor:
    """`parts`: numbers of bfloat16 that stand for one in products, by AMX, 1 or 2; 0 for float32 itself."""
    out = a.new_empty((a.shape[0], weight2.shape[0], *a.shape[2:]))
    operands = [v.contiguous() for v in (a, weight1, bias1, weight2, bias2)]
    _call(parts, "conv_conditioner", *operands, out, *_sizes(a, weight2))
    return out


def backward(
    grad: Tensor, a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, parts: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a, weight1, bias1, weight2 and bias2, from that of the output."""
    shapes = (a.shape, weight1.shape, bias1.shape, weight2.shape, weight2.shape[:1])
    grads = tuple(a.new_empty(shape) for shape in shapes)
    operands = [v.contiguous() for v in (grad, a, weight1, bias1, weight2)]
    sizes = _sizes(a, weight2)
    _call(parts, "conv_conditioner_backward", *operands, *grads, *sizes)
    return grads  # type: ignore[return-value]
