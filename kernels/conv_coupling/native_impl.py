"""Launchers of native.cpp: CPU tensors of 32 and 16 bits in the formats of op.py, as in reference.py.

The library computes the conditioner in float32 and in contiguous tensors; what is not so is converted
on the way. Actnorm and coupling are those of the op that has them alone.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..actnorm_coupling import native_impl as coupling
from ..actnorm_coupling.form import CouplingForm

__all__ = ["conditioner", "conditioner_backward", "gradients", "map"]


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


def _arranged(v: Tensor, like: Tensor) -> Tensor:
    """In the memory format of `like`: contiguous or channels-last."""
    if like.is_contiguous():
        return v.contiguous()
    return v.contiguous(memory_format=torch.channels_last)


def _input(
    x: Tensor,
    moved: int,
    log_scale: Tensor | None,
    bias: Tensor | None,
    form: CouplingForm,
    flip: bool,
) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
    """The conditioner's input, as the first four operands of `conditioner`."""
    first, end = (moved, x.shape[1]) if flip else (0, x.shape[1] - moved)
    if log_scale is None or bias is None:
        return (x, first, None, None) if x.is_contiguous() else (x[:, first:end], 0, None, None)
    if x.dtype != torch.float32 or not x.is_contiguous():
        # Not on the way in: what the conditioner sees is rounded to the type of x.
        return coupling.identity(x, log_scale, bias, None, moved, form, flip), 0, None, None
    scale, shift = _float(log_scale)[first:end].exp(), _float(bias)[first:end]
    return x, first, scale, shift * scale if form.norm_shift_first else shift


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
) -> tuple[Tensor, Tensor]:
    norm = (None, None) if inverse else (log_scale, bias)
    given = _input(x, weight2.shape[0] // 2, *norm, form, flip)
    params = _arranged(conditioner(*given, weight1, bias1, weight2, bias2), x)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    moved = weight2.shape[0] // 2
    wide = out.to(torch.float32)
    vectors = _floats(log_scale, bias, gain)
    # The conditioner's input is actnorm's output in the forward, and the given y in the inverse.
    given = _input(out, moved, *((log_scale, bias) if inverse else (None, None)), form, flip)
    params = _arranged(conditioner(*given, weight1, bias1, weight2, bias2), out)
    choices: tuple[Any, ...] = None, form, flip, inverse
    operands: tuple[Any, ...] = grad_out.to(torch.float32), grad_log_det, wide, params
    grad_x, grad_params, *of_vectors = coupling.gradients(*operands, *vectors, *choices)
    assert grad_params is not None
    grad_a, *of_weights = conditioner_backward(grad_params, *given, weight1, bias1, weight2)
    grad_a = _arranged(grad_a, out)
    first, kept = (moved if flip else 0), out.shape[1] - moved
    if not inverse and vectors[0] is not None and vectors[1] is not None:
        a = _arranged(wide.narrow(1, first, kept), out)
        grad_a, *more = coupling.identity_backward(
            grad_a, a, vectors[0], vectors[1], None, moved, form, flip
        )
        of_vectors[:2] = [g + m for g, m in zip(of_vectors[:2], more, strict=True)]  # type: ignore[operator]
    grad_x.narrow(1, first, kept).add_(grad_a)
    parameters = weight1, bias1, weight2, bias2, log_scale, bias, gain
    results = (
        None if v is None or g is None else g.to(v.dtype)
        for g, v in zip((*of_weights, *of_vectors), parameters, strict=True)
    )
    return grad_x.to(out.dtype), *results  # type: ignore[return-value]
