"""The conditioner in plain PyTorch: the specification of this op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .._operator import first_order

__all__ = ["forward", "forward_rounded"]


def forward(a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    pad = weight1.shape[2] // 2
    hidden = F.conv2d(a, weight1, bias1, padding=pad).relu()
    return F.conv2d(hidden, weight2, bias2, padding=pad)


def forward_rounded(
    a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """`forward` whose products, and those of its gradients, are of operands rounded to bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return _Rounded.apply(a, weight1, bias1, weight2, bias2)


def _rounded(value: Tensor) -> Tensor:
    return value.bfloat16().to(value.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> Tensor:
        pad = weight1.shape[2] // 2
        a, weight1, weight2 = map(_rounded, (a, weight1, weight2))
        hidden = _rounded(F.conv2d(a, weight1, bias1, padding=pad).relu())
        ctx.save_for_backward(a, weight1, hidden, weight2)
        return F.conv2d(hidden, weight2, bias2, padding=pad)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, weight1, hidden, weight2 = ctx.saved_tensors
        pad = weight1.shape[2] // 2
        grad_bias2, grad = grad.sum((0, 2, 3)), _rounded(grad)
        grad_weight2 = conv2d_weight(hidden, weight2.shape, grad, padding=pad)
        grad_hidden = conv2d_input(hidden.shape, weight2, grad, padding=pad)
        grad_hidden = _rounded(grad_hidden.where(~(hidden <= 0), 0))
        grad_weight1 = conv2d_weight(a, weight1.shape, grad_hidden, padding=pad)
        grad_a = conv2d_input(a.shape, weight1, grad_hidden, padding=pad)
        return grad_a, grad_weight1, grad_hidden.sum((0, 2, 3)), grad_weight2, grad_bias2
