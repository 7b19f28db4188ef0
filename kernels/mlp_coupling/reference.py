"""Actnorm, dense conditioner and affine coupling in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors and works on any device and floating type. Sums are
float64 for float64 x and float32 for all others; what enters a product, the conditioner's input, its
hidden layers, its weights and their gradients, is rounded to the type of x. Results have the type of
the tensor they belong to. The backward knows only the output: the conditioner's input is in it, and
the conditioner is run again. Symbols and derivation: README.md.

Operands that may be absent: `log_scale` with `bias` (no actnorm), `gain` (1), `log_det` (0).
"""

import torch.nn.functional as F
from torch import Tensor

from ..actnorm_coupling import reference as coupling
from ..actnorm_coupling.form import CouplingForm

__all__ = ["Gradients", "Layers", "gradients", "map"]

Layers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of each layer, in turn."""

Optional = Tensor | None
Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional
]
"""Of x, of weight and bias of each layer, of log_scale, of bias and of gain."""


def _wide(v: Tensor, x: Tensor) -> Tensor:
    return v.to(coupling.accumulate_dtype(x))


def _rounded(v: Tensor, x: Tensor) -> Tensor:
    """In the type of x, as it enters a product; whose sums are wide."""
    return _wide(v.to(x.dtype), x)


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


def _hidden(a: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """Both hidden layers."""
    weight1, bias1, weight2, bias2, _, _ = layers
    h1 = F.linear(_wide(a, a), _rounded(weight1, a), _wide(bias1, a)).relu()
    h1 = _rounded(h1, a)
    h2 = F.linear(h1, _rounded(weight2, a), _wide(bias2, a)).relu()
    return h1, _rounded(h2, a)


def map(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output of the chosen direction and the accumulated log-det."""
    norm = (None, None) if inverse else (log_scale, bias)
    a = _conditioner_input(x, weight3.shape[0] // 2, *norm, form, flip)
    _, h2 = _hidden(a, (weight1, bias1, weight2, bias2, weight3, bias3))
    params = F.linear(h2, _rounded(weight3, x), _wide(bias3, x))
    return coupling.map(x, params, log_scale, bias, gain, log_det, None, form, flip, inverse)


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> Gradients:
    """Gradients of `map`'s operands, from its output."""
    moved = weight3.shape[0] // 2
    norm = (log_scale, bias) if inverse else (None, None)
    a = _conditioner_input(out, moved, *norm, form, flip)
    h1, h2 = _hidden(a, (weight1, bias1, weight2, bias2, weight3, bias3))
    params = F.linear(h2, _rounded(weight3, out), _wide(bias3, out))
    grad_x, grad_params, grad_log_scale, grad_bias, grad_gain = coupling.gradients(
        _wide(grad_out, out),
        grad_log_det,
        _wide(out, out),
        *(params, log_scale, bias, gain, None, form, flip, inverse),
    )
    assert grad_params is not None

    g3 = _rounded(grad_params, out)
    grad_h2 = (g3 @ _rounded(weight3, out)) * (h2 > 0)
    g2 = _rounded(grad_h2, out)
    grad_h1 = (g2 @ _rounded(weight2, out)) * (h1 > 0)
    g1 = _rounded(grad_h1, out)
    grad_a = g1 @ _rounded(weight1, out)

    # The conditioner's input is actnorm's output in the forward, and the given y in the inverse.
    if not inverse and log_scale is not None and bias is not None:
        assert grad_log_scale is not None and grad_bias is not None
        grad_a, of_log_scale, of_bias = coupling.identity_backward(
            *(grad_a, _wide(a, out), log_scale, bias, None, moved, form, flip)
        )
        grad_log_scale, grad_bias = grad_log_scale + of_log_scale, grad_bias + of_bias
    kept, changed = coupling.split(grad_x, moved, None, flip)
    return (
        coupling.merge(kept + grad_a, changed, None, flip).to(out.dtype),
        (g1.t() @ _wide(a, out)).to(weight1.dtype),
        grad_h1.sum(0).to(bias1.dtype),
        (g2.t() @ h1).to(weight2.dtype),
        grad_h2.sum(0).to(bias2.dtype),
        (g3.t() @ h2).to(weight3.dtype),
        grad_params.sum(0).to(bias3.dtype),
        *(grad_log_scale, grad_bias, grad_gain),
    )
