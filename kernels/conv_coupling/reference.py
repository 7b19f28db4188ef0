"""Convolutional conditioner, actnorm and affine coupling in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors and works on any device and floating type. Arithmetic is
float64 for float64 x and float32 for all others; results have the type and the memory format of the
tensor they belong to. The operands of the convolutions are rounded to the type `products`: the input,
weights, hidden units and, in the backward, the gradients of both convolutions' outputs. Their sums are not.
The backward knows only the output: the conditioner's input is in it, and the conditioner is run again.
Symbols and derivation: README.md.

Operands that may be absent: `log_scale` with `bias` (no actnorm), `gain` (1), `log_det` (0).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..actnorm_coupling import reference as coupling
from ..actnorm_coupling.form import CouplingForm

__all__ = ["gradients", "map"]


def _wide(v: Tensor, x: Tensor) -> Tensor:
    return v.to(coupling.accumulate_dtype(x))


def _conditioner_input(
    x: Tensor,
    moved: int,
    log_scale: Tensor | None,
    bias: Tensor | None,
    form: CouplingForm,
    flip: bool,
) -> Tensor:
    """Actnorm of the identity part, in the type of x."""
    if log_scale is None or bias is None:
        return coupling.split(x, moved, None, flip)[0]
    return coupling.identity(x, log_scale, bias, None, moved, form, flip)


def _rounded(v: Tensor, x: Tensor, products: torch.dtype) -> Tensor:
    """With the digits of the products' operands, in the type of the arithmetic."""
    return _wide(v.to(products), x)


def _convolution(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(v, weight, bias.to(v.dtype), padding=weight.shape[2] // 2)


def map(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output of the chosen direction and the accumulated log-det."""
    norm = (None, None) if inverse else (log_scale, bias)
    a = _conditioner_input(x, weight2.shape[0] // 2, *norm, form, flip)
    a, w1, w2 = (_rounded(v, x, products) for v in (a, weight1, weight2))
    h = _rounded(_convolution(a, w1, bias1).relu(), x, products)
    params = _convolution(h, w2, bias2)
    return coupling.map(x, params, log_scale, bias, gain, log_det, None, form, flip, inverse)


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `map`'s x, both weights and biases, log_scale, bias and gain, from its output."""
    moved, pad = weight2.shape[0] // 2, weight1.shape[2] // 2
    norm = (log_scale, bias) if inverse else (None, None)
    u = _conditioner_input(out, moved, *norm, form, flip)
    a, w1, w2 = (_rounded(v, out, products) for v in (u, weight1, weight2))
    before_relu = _convolution(a, w1, bias1)
    h = _rounded(before_relu.relu(), out, products)
    params = _convolution(h, w2, bias2)
    grad_x, grad_params, grad_log_scale, grad_bias, grad_gain = coupling.gradients(
        _wide(grad_out, out),
        grad_log_det,
        _wide(out, out),
        *(params, log_scale, bias, gain, None, form, flip, inverse),
    )
    assert grad_params is not None

    rounded = _rounded(grad_params, out, products)
    grad_h = conv2d_input(h.shape, w2, rounded, padding=pad) * (before_relu > 0)
    grad_weight2 = conv2d_weight(h, w2.shape, rounded, padding=pad)
    rounded = _rounded(grad_h, out, products)
    grad_a = conv2d_input(a.shape, w1, rounded, padding=pad)
    grad_weight1 = conv2d_weight(a, w1.shape, rounded, padding=pad)

    # The conditioner's input is actnorm's output in the forward, and the given y in the inverse.
    if not inverse and log_scale is not None and bias is not None:
        assert grad_log_scale is not None and grad_bias is not None
        grad_a, of_log_scale, of_bias = coupling.identity_backward(
            *(grad_a, _wide(u, out), log_scale, bias, None, moved, form, flip)
        )
        grad_log_scale, grad_bias = grad_log_scale + of_log_scale, grad_bias + of_bias
    kept, changed = coupling.split(grad_x, moved, None, flip)
    grad_x = coupling.merge(kept + grad_a, changed, None, flip)
    return (
        torch.empty_like(out).copy_(grad_x),
        grad_weight1.to(weight1.dtype).contiguous(),
        grad_h.sum((0, 2, 3)).to(bias1.dtype),
        grad_weight2.to(weight2.dtype).contiguous(),
        grad_params.sum((0, 2, 3)).to(bias2.dtype),
        grad_log_scale,
        grad_bias,
        grad_gain,
    )
