"""The op on the CPU in float32: the native conditioner between the native actnorm and coupling.

Launchers as in reference.py, without native code of their own. The hidden layer is never stored; raw and
shift, which are as large as x, are.
"""

import torch
from torch import Tensor

from ..actnorm_coupling import native_impl as coupling
from ..actnorm_coupling.form import CouplingForm
from ..conv_conditioner import native_impl as conditioner

__all__ = ["gradients", "map"]


def _as(x: Tensor, v: Tensor) -> Tensor:
    """In the memory format of x: contiguous or channels-last."""
    if x.is_contiguous():
        return v.contiguous()
    return v.contiguous(memory_format=torch.channels_last)


def _kept(x: Tensor, moved: int, flip: bool) -> Tensor:
    """A view of the identity part."""
    return x.narrow(1, moved if flip else 0, x.shape[1] - moved)


def _conditioner_input(
    x: Tensor,
    moved: int,
    log_scale: Tensor | None,
    bias: Tensor | None,
    form: CouplingForm,
    flip: bool,
) -> Tensor:
    if log_scale is None or bias is None:
        return _kept(x, moved, flip)
    return coupling.identity(x, log_scale, bias, None, moved, form, flip)


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
    a = _conditioner_input(x, weight2.shape[0] // 2, *norm, form, flip)
    params = _as(x, conditioner.forward(a, weight1, bias1, weight2, bias2))
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
    norm = (log_scale, bias) if inverse else (None, None)
    a = _conditioner_input(out, moved, *norm, form, flip)
    params = _as(out, conditioner.forward(a, weight1, bias1, weight2, bias2))
    grad_x, grad_params, grad_log_scale, grad_bias, grad_gain = coupling.gradients(
        grad_out, grad_log_det, out, params, log_scale, bias, gain, None, form, flip, inverse
    )
    assert grad_params is not None
    grad_a, *of_weights = conditioner.backward(grad_params, a, weight1, bias1, weight2)
    # The conditioner's input is actnorm's output in the forward, and the given y in the inverse.
    if not inverse and log_scale is not None and bias is not None:
        assert grad_log_scale is not None and grad_bias is not None
        operands = _as(out, grad_a), _as(out, a), log_scale, bias
        grad_a, *more = coupling.identity_backward(*operands, None, moved, form, flip)
        grad_log_scale, grad_bias = grad_log_scale + more[0], grad_bias + more[1]
    _kept(grad_x, moved, flip).add_(grad_a)
    return grad_x, *of_weights, grad_log_scale, grad_bias, grad_gain  # type: ignore[return-value]
