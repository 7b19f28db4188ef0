"""The op: the coupling op's map without a coupling, and one-pass statistics."""

from types import ModuleType

import torch
from torch import Tensor

from .. import _backend
from .._operator import check, check_float, operator
from ..actnorm_coupling.form import CouplingForm
from ..actnorm_coupling.op import apply
from . import native_impl, reference

__all__ = ["actnorm", "actnorm_inverse", "actnorm_statistics"]

_FORMS = {first: CouplingForm(norm_shift_first=first) for first in (False, True)}


def _implementation(x: Tensor) -> ModuleType:
    backend = _backend.choose(x)
    if backend == "triton":
        from . import triton_impl  # only here: triton is not installed everywhere

        return triton_impl
    return native_impl if backend == "native" else reference


def _moments_body(x: Tensor) -> tuple[Tensor, Tensor]:
    if not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    return _implementation(x).moments(x)


def _moments_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(x)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


_moments = operator("actnorm_moments", _moments_body, _moments_fake)


def _check(name: str, x: Tensor, log_scale: Tensor, bias: Tensor, log_det: Tensor | None) -> None:
    _check_input(name, x)
    check("log_scale", log_scale, (x.shape[1],), x)
    check("bias", bias, (x.shape[1],), x)
    if log_det is not None:
        check("log_det", log_det, (x.shape[0],), x, reference.accumulate_dtype(x))


def _check_input(name: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (B, C, *spatial)")
    check_float(name, x)


def actnorm(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    log_det: Tensor | None = None,
    *,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Activation normalisation: a per-channel affine map.

        y = x · exp(log_scale) + bias,    log|det J| = S · Σ log_scale

    with S the number of spatial positions. Only y is kept for the backward.

    Args:
        x: (B, C, *spatial); spatial may be empty. Contiguous and channels-last tensors are used as
            they are, any other is copied.
        log_scale, bias: (C,).
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        shift_first: y = (x + bias) · exp(log_scale) instead.

    Returns:
        y, in the shape, type and memory format of x, and the given log_det plus this map's: a fresh
        (B,) tensor.

    Raises:
        ValueError: a shape, type or device does not fit.

    Source: Kingma and Dhariwal, *Glow*, NeurIPS 2018, section 3.1.
    """
    _check("x", x, log_scale, bias, log_det)
    return apply(x, None, log_scale, bias, log_det=log_det, form=_FORMS[shift_first])


def actnorm_inverse(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    log_det: Tensor | None = None,
    *,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The inverse of `actnorm`: x = (y - bias) · exp(-log_scale), log|det J| = -S · Σ log_scale.

    Arguments, results and errors: as `actnorm`, with x and y exchanged.
    """
    _check("y", y, log_scale, bias, log_det)
    form = _FORMS[shift_first]
    return apply(y, None, log_scale, bias, log_det=log_det, form=form, inverse=True)


@torch.no_grad()
def actnorm_statistics(x: Tensor, *, variance_floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The log_scale and bias with which `actnorm` gives x mean 0 and variance 1 in every channel.

        log_scale = -½ · ln max(variance, floor),    bias = -mean · exp(log_scale)

    The variance divides by the count and is floored, so that a constant channel and a batch of one
    give a finite scale. One pass over x; no gradient.

    Args:
        x: (B, C, *spatial), with at least one value per channel.
        variance_floor: smallest variance a channel is divided by, above 0.

    Returns:
        log_scale and bias, (C,), float32 (float64 for float64 x).

    Raises:
        ValueError: x is empty, its shape or type does not fit, or the floor is not above 0.

    Source: Kingma and Dhariwal, *Glow*, NeurIPS 2018, section 3.1.
    """
    _check_input("x", x)
    if x.shape[0] * x.shape[2:].numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one value per channel")
    if not variance_floor > 0:
        raise ValueError(f"variance_floor: got {variance_floor}, want a number above 0")
    mean, variance = _moments(x)
    log_scale = -0.5 * variance.clamp_min(variance_floor).log()
    return log_scale, -mean * log_scale.exp()
