"""Actnorm followed by affine coupling in plain PyTorch: the specification of this op.

Every function takes and returns whole tensors and works on any device and floating type. Arithmetic
is float64 for float64 inputs and float32 for all others; results have the type of the tensor they
belong to. The backward functions know only what the kernels save: the output, and the
conditioner's output. Symbols and derivation: README.md.
"""

import torch
from torch import Tensor

__all__ = [
    "accumulate_dtype",
    "backward",
    "forward",
    "identity",
    "identity_backward",
    "inverse",
    "inverse_backward",
]


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Type of the arithmetic and of log-dets: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(accumulate_dtype(x)).view(-1, *(1,) * (x.dim() - 2))


def _halves(x: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """Identity half, then transformed half."""
    channels = x.shape[1]
    moved = channels // 2
    x = x.to(accumulate_dtype(x))
    return (x[:, moved:], x[:, :moved]) if flip else (x[:, : channels - moved], x[:, -moved:])


def _merge(identity: Tensor, moved: Tensor, flip: bool) -> Tensor:
    return torch.cat((moved, identity) if flip else (identity, moved), dim=1)


def _scale_and_shift(params: Tensor, gain: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(raw), log-scale s and shift."""
    raw, shift = params.to(accumulate_dtype(x)).chunk(2, dim=1)
    t = raw.tanh()
    return t, _per_channel(gain, x) * t, shift


def _channel_sum(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def _own_log_det(s: Tensor, log_scale: Tensor) -> Tensor:
    positions = s.shape[2:].numel()
    return s.flatten(1).sum(1) + positions * log_scale.to(s.dtype).sum()


def identity(x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
    """Actnorm of the identity half (B, ⌈C/2⌉, *spatial)."""
    scale, offset = _per_channel(log_scale, x).exp(), _per_channel(bias, x)
    kept, _ = _halves(x.to(scale.dtype) * scale + offset, flip)
    return kept.to(x.dtype).contiguous()


def identity_backward(
    grad: Tensor, a: Tensor, log_scale: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_scale and bias from the gradient of `identity`'s output a."""
    channels = log_scale.shape[0]
    moved = channels // 2
    kept = slice(moved, None) if flip else slice(0, channels - moved)
    g = grad.to(accumulate_dtype(a))
    grad_x = a.new_zeros(a.shape[0], channels, *a.shape[2:])
    grad_x[:, kept] = (g * _per_channel(log_scale[kept], a).exp()).to(a.dtype)
    grad_log_scale, grad_bias = (g.new_zeros(channels) for _ in range(2))
    grad_log_scale[kept] = _channel_sum(g * (a - _per_channel(bias[kept], a)))
    grad_bias[kept] = _channel_sum(g)
    return grad_x, grad_log_scale.to(log_scale.dtype), grad_bias.to(bias.dtype)


def forward(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    """y and the accumulated log-det."""
    scale, offset = _per_channel(log_scale, x).exp(), _per_channel(bias, x)
    u = x.to(scale.dtype) * scale + offset
    kept, moved = _halves(u, flip)
    _, s, shift = _scale_and_shift(params, gain, x)
    y = _merge(kept, moved * s.exp() + shift, flip).to(x.dtype)
    own = _own_log_det(s, log_scale)
    return y, own if log_det is None else log_det + own


def inverse(
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    """x and the accumulated log-det of the inverse."""
    kept, moved = _halves(y, flip)
    _, s, shift = _scale_and_shift(params, gain, y)
    u = _merge(kept, (moved - shift) * (-s).exp(), flip)
    x = (u - _per_channel(bias, y)) * _per_channel(-log_scale, y).exp()
    own = _own_log_det(s, log_scale)
    return x.to(y.dtype), -own if log_det is None else log_det - own


def backward(
    grad_y: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`'s x, params, log_scale, bias and gain, from its output."""
    g_kept, g_moved = _halves(grad_y, flip)
    kept, moved = _halves(y, flip)
    t, s, shift = _scale_and_shift(params, gain, y)
    g_log_det = grad_log_det.to(s.dtype).view(-1, *(1,) * (y.dim() - 1))
    scaled = moved - shift
    grad_u = _merge(g_kept, g_moved * s.exp(), flip)
    u = _merge(kept, scaled * (-s).exp(), flip)
    grad_s = g_moved * scaled + g_log_det
    return _collect(
        grad_u * _per_channel(log_scale, y).exp(),
        (grad_s * _per_channel(gain, y) * (1 - t * t), g_moved),
        _channel_sum(grad_u * (u - _per_channel(bias, y))) + g_log_det.sum() * y.shape[2:].numel(),
        _channel_sum(grad_u),
        _channel_sum(grad_s * t),
        like=(y, params, log_scale, bias, gain),
    )


def inverse_backward(
    grad_x: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `inverse`'s y, params, log_scale, bias and gain, from its output."""
    t, s, _ = _scale_and_shift(params, gain, x)
    g_log_det = grad_log_det.to(s.dtype).view(-1, *(1,) * (x.dim() - 1))
    g_x = grad_x.to(s.dtype)
    grad_u = g_x * _per_channel(-log_scale, x).exp()
    u = x.to(s.dtype) * _per_channel(log_scale, x).exp() + _per_channel(bias, x)
    g_kept, g_moved = _halves(grad_u, flip)
    _, moved = _halves(u, flip)
    grad_s = -g_moved * moved - g_log_det
    g_moved = g_moved * (-s).exp()
    return _collect(
        _merge(g_kept, g_moved, flip),
        (grad_s * _per_channel(gain, x) * (1 - t * t), -g_moved),
        -_channel_sum(g_x * x) - g_log_det.sum() * x.shape[2:].numel(),
        -_channel_sum(grad_u),
        _channel_sum(grad_s * t),
        like=(x, params, log_scale, bias, gain),
    )


def _collect(
    grad_x: Tensor,
    grad_params: tuple[Tensor, Tensor],
    grad_log_scale: Tensor,
    grad_bias: Tensor,
    grad_gain: Tensor,
    like: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each gradient in the type of its tensor."""
    x, params, log_scale, bias, gain = (t.dtype for t in like)
    return (
        grad_x.to(x),
        torch.cat(grad_params, dim=1).to(params),
        grad_log_scale.to(log_scale),
        grad_bias.to(bias),
        grad_gain.to(gain),
    )
