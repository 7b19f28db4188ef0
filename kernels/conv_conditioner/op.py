"""The op: autograd, checks and the public function."""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, native
from .._operator import check, check_float, first_order
from . import native_impl, reference

__all__ = ["conv_conditioner", "is_native", "parts"]

_SIZES = (1, 3)  # of the convolutions' kernels


# What PyTorch's settings of float32 products on CPUs ask for, in numbers of bfloat16 for one of float32.
_PARTS = {"tf32": 2, "bf16": 1}


def parts(products: torch.dtype | None = None) -> int:
    """Numbers of bfloat16 that stand for one of float32 in products of a native `conv_conditioner`; 0 for
    float32 itself."""
    if products is not None:
        return 1
    if native.load().tiles is None:
        return 0
    settings: Any = torch.backends.mkldnn
    asked = settings.conv.fp32_precision
    return _PARTS.get(settings.matmul.fp32_precision if asked == "none" else asked, 0)


def is_native(a: Tensor, products: torch.dtype | None = None) -> bool:
    """Whether `conv_conditioner` of this input is made by kernels of its own."""
    compiling = torch.compiler.is_compiling()  # then the choice could not be traced
    if compiling or a.dtype is not torch.float32 or _backend.choose(a) != "native":
        return False
    return products is None or native.load().tiles is not None


class _ConvConditioner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        parts: int,
    ) -> Tensor:
        ctx.save_for_backward(a, weight1, bias1, weight2)
        ctx.parts = parts
        return native_impl.forward(a, weight1, bias1, weight2, bias2, parts)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, weight1, bias1, weight2 = ctx.saved_tensors
        return *native_impl.backward(grad, a, weight1, bias1, weight2, ctx.parts), None


def conv_conditioner(
    a: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    products: torch.dtype | None = None,
) -> Tensor:
    """Two convolutions with a ReLU between them, whose hidden layer is never stored.

        params = conv(relu(conv(a, weight1) + bias1), weight2) + bias2

    Convolutions have stride 1 and zeros around the image, so that h and w stay. On a CPU, in float32,
    the hidden layer stays in the cache, and the backward makes it again; batches of images whose sides are
    multiples of four are multiplied by Winograd's F(4, 3), which is off by 1e-6 of the norm. Elsewhere,
    and under torch.compile, this is PyTorch's own convolutions. Differentiable once, with respect to every
    argument.

    With `products`, what is multiplied, forward and backward, is first rounded to that type: a, the
    weights, the hidden layer and the gradients of it and of params. Everything else, and every sum, stays
    float32. Processors with AMX have instructions for it.

    These also serve PyTorch's settings of float32 products. Under
    `torch.set_float32_matmul_precision("high")` each number is the sum of two of bfloat16, off by 2^-18 of
    it at most, and a product three products of these: results are off by some 1e-5, and infinities become
    NaN. Under "medium" it is one number of bfloat16. Without AMX both change nothing.

    Args:
        a: (B, I, h, w).
        weight1: (H, I, K, K), with K 1 or 3.
        bias1: (H,).
        weight2: (O, H, K, K).
        bias2: (O,).
        products: torch.bfloat16, for operands in float32; None for the type of a.

    Returns:
        params, (B, O, h, w).

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check(a, weight1, bias1, weight2, bias2)
    rounded = products is not None
    if rounded:
        _check_products(a, products)
    if is_native(a, products):
        return _ConvConditioner.apply(a, weight1, bias1, weight2, bias2, parts(products))
    forward = reference.forward_rounded if rounded else reference.forward
    return forward(a, weight1, bias1, weight2, bias2)


def _check_products(a: Tensor, products: torch.dtype | None) -> None:
    if products is not torch.bfloat16:
        raise ValueError(f"products: got {products}, want torch.bfloat16 or None")
    if a.dtype is not torch.float32:
        raise ValueError(f"a: got {a.dtype}, want torch.float32 with products")


def _check(a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    if a.dim() != 4 or 0 in a.shape[1:]:
        raise ValueError(f"a: got shape {tuple(a.shape)}, want (B, I, h, w), none but B zero")
    check_float("a", a)
    if weight1.dim() != 4 or weight1.shape[0] < 1 or weight1.shape[2] not in _SIZES:
        raise ValueError(
            f"weight1: got shape {tuple(weight1.shape)}, want (H, I, K, K) with H at least 1 and K "
            f"one of {_SIZES}"
        )
    hidden, size = weight1.shape[0], weight1.shape[2]
    check("weight1", weight1, (hidden, a.shape[1], size, size), a, a.dtype)
    check("bias1", bias1, (hidden,), a, a.dtype)
    if weight2.dim() != 4 or weight2.shape[0] < 1:
        raise ValueError(
            f"weight2: got shape {tuple(weight2.shape)}, want (O, H, K, K) with O at least 1"
        )
    check("weight2", weight2, (weight2.shape[0], hidden, size, size), a, a.dtype)
    check("bias2", bias2, (weight2.shape[0],), a, a.dtype)
