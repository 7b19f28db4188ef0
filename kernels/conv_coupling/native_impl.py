"""Launchers of native.cpp: contiguous CPU tensors in, tensors out, as in reference.py.

The library computes in float32; operands of 16 bits are converted on the way in and results on the way
out.
"""

import torch
from torch import Tensor

from .. import native

__all__ = ["conditioner", "conditioner_backward"]


def _float(v: Tensor) -> Tensor:
    return v.to(torch.float32).contiguous()


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
    """conv(relu(conv(a, weight1, bias1)), weight2, bias2) of the channels [first, first + inputs) of x,
    as they are or a = x·scale + shift; the output keeps height and width."""
    out = x.new_empty((x.shape[0], weight2.shape[0], *x.shape[2:]), dtype=torch.float32)
    vectors = [None if v is None else _float(v) for v in (scale, shift)]
    native.load().call(
        *("conv_conditioner", _float(x), *vectors),
        *(_float(v) for v in (weight1, bias1, weight2, bias2)),
        *(out, *_sizes(x, first, weight1, weight2)),
    )
    return out.to(x.dtype)


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
    """The gradients of a, weight1, bias1, weight2 and bias2 from that of `conditioner`'s output."""
    outputs, inputs = weight2.shape[0], weight1.shape[1]
    operands = [_float(v) for v in (weight1, bias1, weight2)]
    vectors = [None if v is None else _float(v) for v in (scale, shift)]
    grad_a = x.new_empty((x.shape[0], inputs, *x.shape[2:]), dtype=torch.float32)
    grads = [torch.empty_like(v) for v in operands]
    grad_bias2 = operands[1].new_empty(outputs)
    native.load().call(
        *("conv_conditioner_backward", _float(grad), _float(x), *vectors, *operands),
        *(grad_a, *grads, grad_bias2, *_sizes(x, first, weight1, weight2)),
    )
    of_weight1, of_bias1, of_weight2 = grads
    return (
        grad_a.to(x.dtype),
        of_weight1.to(weight1.dtype),
        of_bias1.to(bias1.dtype),
        of_weight2.to(weight2.dtype),
        grad_bias2.to(weight2.dtype),
    )
