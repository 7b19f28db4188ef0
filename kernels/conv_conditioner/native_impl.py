"""Launchers of native.cpp and amx.cpp: float32 CPU tensors in, tensors out, as in reference.py."""

from typing import Any

from torch import Tensor

from .. import native

__all__ = ["backward", "forward"]


def _sizes(a: Tensor, weight2: Tensor) -> tuple[int, ...]:
    samples, inputs, height, width = a.shape
    outputs, hidden, size, _ = weight2.shape
    return samples, height, width, inputs, hidden, outputs, size


def _call(tiles: bool, name: str, *arguments: Any) -> None:
    library = native.load()
    (library.call_tiles if tiles else library.call)(name, *arguments)


def forward(
    a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, tiles: bool = False
) -> Tensor:
    """`tiles`: products of bfloat16, by AMX."""
    out = a.new_empty((a.shape[0], weight2.shape[0], *a.shape[2:]))
    operands = [v.contiguous() for v in (a, weight1, bias1, weight2, bias2)]
    _call(tiles, "conv_conditioner", *operands, out, *_sizes(a, weight2))
    return out


def backward(
    grad: Tensor, a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, tiles: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a, weight1, bias1, weight2 and bias2, from that of the output."""
    shapes = (a.shape, weight1.shape, bias1.shape, weight2.shape, weight2.shape[:1])
    grads = tuple(a.new_empty(shape) for shape in shapes)
    operands = [v.contiguous() for v in (grad, a, weight1, bias1, weight2)]
    sizes = _sizes(a, weight2)
    _call(tiles, "conv_conditioner_backward", *operands, *grads, *sizes)
    return grads  # type: ignore[return-value]
