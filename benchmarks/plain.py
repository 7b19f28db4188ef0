"""The operations as a PyTorch user writes them: what eager and torch.compile are measured with.

Names, operands and results are those of hybridflow.kernels; autograd makes the backward. Log-dets are
summed in float32 at least, as the kernels do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "actnorm",
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_inverse",
    "actnorm_statistics",
    "boundary_sample",
    "dequantize_logit",
    "flowgmm_log_prob",
    "freia_coupling",
    "gmm_log_prob",
    "logit_transform",
    "nflows_coupling",
    "normflows_coupling",
    "standard_normal_log_prob",
    "zuko_coupling",
]

_LOG_2_PI = math.log(2 * math.pi)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    y = x * _per_channel(log_scale.exp(), x) + _per_channel(bias, x)
    return y, log_det + log_scale.sum() * x.shape[2:].numel()


def actnorm_inverse(
    y: Tensor, log_scale: Tensor, bias: Tensor, log_det: Tensor
) -> tuple[Tensor, Tensor]:
    x = (y - _per_channel(bias, y)) * _per_channel((-log_scale).exp(), y)
    return x, log_det - log_scale.sum() * y.shape[2:].numel()


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, dim=axes, correction=0)
    log_scale = -0.5 * variance.clamp_min(1e-4).log()
    return log_scale, -mean * log_scale.exp()


def actnorm_coupling(
    x: Tensor, params: Tensor, log_scale: Tensor, bias: Tensor, gain: Tensor, log_det: Tensor
) -> tuple[Tensor, Tensor]:
    u, log_det = actnorm(x, log_scale, bias, log_det)
    kept, moved = u.chunk(2, dim=1)
    raw, shift = params.chunk(2, dim=1)
    s = _per_channel(gain, x) * raw.tanh()
    return torch.cat((kept, moved * s.exp() + shift), dim=1), log_det + _sum(s)


def actnorm_coupling_inverse(
    y: Tensor, params: Tensor, log_scale: Tensor, bias: Tensor, gain: Tensor, log_det: Tensor
) -> tuple[Tensor, Tensor]:
    kept, moved = y.chunk(2, dim=1)
    raw, shift = params.chunk(2, dim=1)
    s = _per_channel(gain, y) * raw.tanh()
    u = torch.cat((kept, (moved - shift) * (-s).exp()), dim=1)
    return actnorm_inverse(u, log_scale, bias, log_det - _sum(s))


# --- couplings of other libraries, in the direction that a likelihood needs -----------------------


def normflows_coupling(y: Tensor, params: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    kept, moved = y.chunk(2, dim=1)
    shift, raw = params[:, 0::2], params[:, 1::2]
    return torch.cat((kept, (moved - shift) * (-raw).exp()), dim=1), log_det - _sum(raw)


def nflows_coupling(
    x: Tensor, params: Tensor, log_det: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    kept, moved = index.chunk(2)
    shift, raw = params.chunk(2, dim=1)
    scale = (raw + 2).sigmoid() + 1e-3
    y = torch.empty_like(x)
    y[:, kept] = x[:, kept]
    y[:, moved] = x[:, moved] * scale + shift
    return y, log_det + _sum(scale.log())


def zuko_coupling(
    x: Tensor, params: Tensor, log_det: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    kept, moved = index.chunk(2)
    # zuko indexes by brackets and unbinds a (…, 2) view; the gradients of both, compiled by torch 2.13
    # for two CPU threads, write past their memory.
    shift, raw = params[:, 0::2], params[:, 1::2]
    s = raw / (1 + raw.abs() / math.log(1e3))
    y = x.index_select(1, moved) * s.exp() + shift
    joined = torch.cat((x.index_select(1, kept), y), dim=1)
    return joined.index_select(1, index.argsort()), log_det + _sum(s)


def freia_coupling(x: Tensor, params: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    kept, moved = x.chunk(2, dim=1)
    raw, shift = params.chunk(2, dim=1)
    s = 2 * 0.636 * raw.atan()
    return torch.cat((kept, moved * s.exp() + shift), dim=1), log_det + _sum(s)


# --- densities -----------------------------------------------------------------------------------


def _component_log_prob(z: Tensor, means: Tensor) -> Tensor:
    centre = means.mean(0)
    z, means = z - centre, means - centre
    squared = z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)
    return -0.5 * (squared + z.shape[1] * _LOG_2_PI)


def gmm_log_prob(z: Tensor, means: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    joint = _component_log_prob(z, means) + log_prior
    return joint, joint.logsumexp(1), joint.softmax(1)


def flowgmm_log_prob(
    z: Tensor, means: Tensor, log_prior: Tensor, inverse_softplus: Tensor
) -> Tensor:
    """FlowGMM's way: K normals with full covariances, built in every call."""
    size = means.shape[1]
    deviations = F.softplus(inverse_softplus)
    normals = [
        torch.distributions.MultivariateNormal(
            mean, deviation**2 * torch.eye(size, device=z.device)
        )
        for mean, deviation in zip(means, deviations, strict=True)
    ]
    components = torch.stack([normal.log_prob(z) for normal in normals], dim=1)
    return torch.logsumexp(components + log_prior, dim=1)


def standard_normal_log_prob(z: Tensor, log_det: Tensor) -> Tensor:
    return log_det - 0.5 * (z.square().sum(1) + z.shape[1] * _LOG_2_PI)


# --- data and samples ----------------------------------------------------------------------------


def logit_transform(x: Tensor, log_det: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    slope = 1 - 2 * alpha
    y = (alpha + slope * x).logit()
    return y, log_det + _sum(F.softplus(y) + F.softplus(-y) + math.log(slope))


def dequantize_logit(
    x: Tensor, log_det: Tensor, *, levels: int, alpha: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log-det is the logit's: the division by `levels` is not counted."""
    if noise is None:
        noise = torch.rand(x.shape, device=x.device)
    return logit_transform((x + noise) / levels, log_det, alpha=alpha)


def boundary_sample(means: Tensor, *, count: int, beta: float) -> tuple[Tensor, Tensor]:
    classes, size = means.shape
    a = torch.randint(classes, (count,), device=means.device)
    b = (a + torch.randint(1, classes, (count,), device=means.device)) % classes
    z_a = means[a] + torch.randn(count, size, device=means.device)
    z_b = means[b] + torch.randn(count, size, device=means.device)
    z = beta * z_a + (1 - beta) * z_b
    return z, _component_log_prob(z, means).softmax(1)
