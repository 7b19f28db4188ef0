"""Launchers of native.cpp: CPU tensors in, float32 tensors out; what is not contiguous float32 is
converted on the way."""

import torch
from torch import Tensor

from .. import native

__all__ = ["conditioner", "conditioner_backward"]


def _float(v: Tensor) -> Tensor:
    return v.to(torch.float32).contiguous()


def _floats(*values: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else _float(v) for v in values]


def _sizes(x: Tensor, first: int, weight1: Tensor, weight2: Tensor) -> tuple[int, ...]:
    samples, channels, height, width = x.shape
    hidden, inputs, size, _ = weight1.shape
    return samples, channels, first, height, width, inputs, hidden, weight2.shape[0], size


def conditioner(
    x: Tensor,
    first: int,
    scale: Tensor | None,
    shift: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """conv(relu(conv(a, weight1) + bias1), weight2) + bias2, (B, 2T, h, w) in float32, where a is
    the channels [first, first + inputs) of x, or these times `scale` plus `shift`, both (inputs,)."""
    out = torch.empty((x.shape[0], weight2.shape[0], *x.shape[2:]), dtype=torch.float32)
    native.load().call(
        "conv_conditioner",
        *(*_floats(x, scale, shift, weight1, bias1, weight2, bias2), out),
        *_sizes(x, first, weight1, weight2),
    )
    return out


def conditioner_backward(
    grad: Tensor,
    x: Tensor,
    first: int,
    scale: Tensor | None,
    shift: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a, weight1, bias1, weight2 and bias2, in float32, from that of the output."""
    samples, outputs, *positions = grad.shape
    hidden, inputs, size, _ = weight1.shape
    shapes: list[tuple[int, ...]] = [
        (samples, inputs, *positions),
        *((hidden, inputs, size, size), (hidden,), (outputs, hidden, size, size), (outputs,)),
    ]
    grads = [torch.empty(shape, dtype=torch.float32) for shape in shapes]
    native.load().call(
        "conv_conditioner_backward",
        *(*_floats(grad, x, scale, shift, weight1, bias1, weight2), *grads),
        *_sizes(x, first, weight1, weight2),
    )
    return tuple(grads)  # type: ignore[return-value]
