"""The fused forms of hybridflow's own layers. Parameters, buffers, keys and results are theirs."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..actnorm_coupling import (
    ChainStep,
    actnorm_coupling,
    actnorm_coupling_inverse,
    coupling_chain,
)
from ..actnorm_coupling.op import tap
from ..conv_conditioner import conv_conditioner
from ..conv_conditioner.op import is_native, parts
from ..conv_coupling import conv_coupling, conv_coupling_inverse
from ..dequantize_logit import logit_transform, logit_transform_inverse
from ..gmm_log_prob import gmm_log_prob
from ..mlp_coupling import mlp_coupling, mlp_coupling_inverse
from ._choices import Layer, device_key, prefers_one_op
from ._fused import DIFFERS, Fused, agrees, has_hooks, original_class, pattern, trial

__all__ = [
    "CONSTANT_MEMORY",
    "LAYERS",
    "FusedFlowStep",
    "FusedGaussianMixture",
    "FusedLogitTransform",
    "FusedStepChain",
]


_Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, weight, bias
_DenseLayers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_OF_CONV_COUPLING = (torch.float32, torch.bfloat16, torch.float16)


class FusedFlowStep(Fused):
    """A FlowStep that runs actnorm, coupling and log-det as one kernel, or with the conditioner too."""

    actnorm: Any
    coupling: Any

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        vectors, flip = (norm.log_scale, norm.bias), coupling.flip
        if (layers := _dense_layers(coupling, x)) is not None:
            return mlp_coupling(x, *layers, *vectors, coupling.gain, log_det, flip=flip)
        if (weights := _weights(coupling, x)) is not None:
            given = (*weights, *vectors, coupling.gain, log_det)
            return conv_coupling(x, *given, flip=flip, products=_products(x))
        a, x = tap(x, coupling.channels // 2, *vectors, flip=flip)
        operands = (_params(coupling.conditioner, a), *vectors, coupling.gain, log_det)
        return actnorm_coupling(x, *operands, flip=flip)

    def inverse(self, y: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        operands, flip = (norm.log_scale, norm.bias, coupling.gain, log_det), coupling.flip
        if (layers := _dense_layers(coupling, y)) is not None:
            return mlp_coupling_inverse(y, *layers, *operands, flip=flip)
        if (weights := _weights(coupling, y)) is not None:
            return conv_coupling_inverse(y, *weights, *operands, flip=flip, products=_products(y))
        a, y = tap(y, coupling.channels // 2, flip=flip)
        params = _params(coupling.conditioner, a)
        return actnorm_coupling_inverse(y, params, *operands, flip=flip)


def _weights(coupling: Any, x: Tensor) -> _Weights | None:
    """The conditioner's, where it runs with the coupling as one op and that is faster."""
    if x.dim() != 4 or not (_takes_products(x) if _is_on_gpu(x) else _is_ready_on_cpu(x)):
        return None
    kept = coupling.channels - coupling.channels // 2
    return _weights_of_one_op(coupling.conditioner, (x.shape[0], kept, *x.shape[2:]), x)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _products(x: Tensor) -> torch.dtype:
    """The type in which conv_coupling multiplies x; on a CPU its own."""
    kind = x.device.type
    if _is_on_gpu(x) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _native_products(a: Tensor) -> torch.dtype | None:
    """What the conditioner of a multiplies in on a CPU: autocast's type, None for float32.

    Without AMX float32 is faster than PyTorch in bfloat16, and takes its place.
    """
    if not torch.is_autocast_enabled(a.device.type):
        return None
    products = torch.get_autocast_dtype(a.device.type)
    return None if products is torch.bfloat16 and not is_native(a, products) else products


def _takes_products(x: Tensor) -> bool:
    """Whether conv_coupling's kernels have these products of x."""
    if torch.compiler.is_compiling() or x.dtype not in _OF_CONV_COUPLING:
        return False
    return x.dtype is torch.float32 or _products(x) is x.dtype


def _is_ready_on_cpu(x: Tensor) -> bool:
    """Whether conv_coupling is native and multiplies as PyTorch is told to, or more exactly: in float32."""
    in_float32 = is_native(x) and _native_products(x) is None and not parts()
    return in_float32 and x.is_contiguous()


def _is_eager(x: Tensor) -> bool:
    """Neither traced nor under autocast, which chooses the types of what it knows."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


def _dense_layers(coupling: Any, x: Tensor) -> _DenseLayers | None:
    """Weights and biases of the conditioner, if it is three plain layers with ReLUs between them and the
    step is faster as one op."""
    conditioner, moved = coupling.conditioner, coupling.channels // 2
    if x.dim() != 2 or x.dtype is not torch.float32 or not _is_eager(x):
        return None
    if type(conditioner) is not nn.Sequential or len(conditioner._modules) != 5:
        return None
    first, relu1, second, relu2, third = parts = conditioner._modules.values()
    if not type(relu1) is type(relu2) is nn.ReLU:
        return None
    operands: list[Any] = []
    for layer in (first, second, third):
        if type(layer) is not nn.Linear or layer._parameters["bias"] is None:
            return None
        operands += (layer._parameters["weight"], layer._parameters["bias"])
    if any(v.dtype is not torch.float32 for v in operands) or len(operands[5]) != 2 * moved:
        return None
    sizes = Layer("dense", coupling.channels - moved, max(operands[2].shape), 2 * moved)
    if not prefers_one_op(sizes, x.shape[0], device_key(x.device, x.dtype)):
        return None
    if any(map(has_hooks, (conditioner, *parts))):
        return None
    return cast(_DenseLayers, tuple(operands))


def _params(conditioner: nn.Module, a: Tensor) -> Tensor:
    """What the conditioner makes of a: by one op where there is one for it and that is faster."""
    products = _native_products(a)
    if a.dim() == 4 and products in (None, torch.bfloat16) and is_native(a, products):
        weights = _weights_of_one_op(conditioner, a.shape, a)
        if weights is not None:
            return conv_conditioner(a, *weights, products=products)
    return conditioner(a)


def _weights_of_one_op(conditioner: nn.Module, shape: Sequence[int], x: Tensor) -> _Weights | None:
    """Weights and biases, if on inputs of this shape, and of x's type and device, the conditioner is
    faster as one op."""
    convolutions = _two_convolutions(conditioner)
    if convolutions is None or any(c.weight.dtype is not x.dtype for c in convolutions):
        return None
    first, second = convolutions
    samples, inputs, height, width = shape
    sizes = (first.out_channels, second.out_channels, first.kernel_size[0])
    layer = Layer("conv", inputs, *sizes, height, width)
    if not prefers_one_op(layer, samples, device_key(x.device, _products(x))):
        return None
    return first.weight, first.bias, second.weight, second.bias


class _Conditioner(nn.Module):
    """A conditioner that runs as `_params` says."""

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, a: Tensor) -> Tensor:
        return _params(self.conditioner, a)


def _two_convolutions(conditioner: nn.Module) -> tuple[Any, Any] | None:
    """The convolutions, if the conditioner is conv, ReLU, conv and each as the ops have it."""
    if type(conditioner) is not nn.Sequential or len(conditioner) != 3 or has_hooks(conditioner):
        return None
    first, relu, second = conditioner
    if type(relu) is not nn.ReLU or has_hooks(relu):
        return None
    plain = _is_plain(first) and _is_plain(second) and first.kernel_size == second.kernel_size
    return (first, second) if plain else None


def _is_plain(layer: nn.Module) -> bool:
    """A convolution of size 1 or 3 that keeps the image's size, with a bias and nothing else."""
    if type(layer) is not nn.Conv2d or layer.bias is None or has_hooks(layer):
        return False
    size = layer.kernel_size[0]
    return (
        layer.kernel_size in ((1, 1), (3, 3))
        and layer.padding == (size // 2, size // 2)
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
    )


class FusedStepChain(Fused):
    """A StepChain that keeps the activations of one step, and runs each conditioner once more."""

    steps: Any

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return coupling_chain(x, self._chain_steps(), log_det)

    def inverse(self, y: Tensor) -> Tensor:
        return coupling_chain(y, self._chain_steps(), inverse=True)[0]

    def _chain_steps(self) -> list[ChainStep]:
        return [
            ChainStep(
                _Conditioner(step.coupling.conditioner),
                step.coupling.channels // 2,
                step.actnorm.log_scale,
                step.actnorm.bias,
                step.coupling.gain,
                flip=step.coupling.flip,
            )
            for step in self.steps
        ]


class FusedGaussianMixture(Fused):
    """A GaussianMixture whose joint is one kernel: squared distances are summed directly."""

    means: Tensor
    log_prior: Any

    def joint_log_prob(self, z: Tensor) -> Tensor:
        return gmm_log_prob(z, self.means, self.log_prior()).joint


class FusedLogitTransform(Fused):
    """A LogitTransform that makes the logit and its log-det in one pass over memory."""

    alpha: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return logit_transform(x, alpha=self.alpha)

    def inverse(self, y: Tensor) -> Tensor:
        return logit_transform_inverse(y, alpha=self.alpha)


def _flow_step(step: nn.Module) -> type[Fused] | str:
    for name, kind in (("actnorm", "ActNorm"), ("coupling", "AffineCoupling")):
        part = getattr(step, name)
        cls = type(part)
        if (cls.__module__, cls.__name__) != (f"hybridflow.flow.{name}", kind):
            return f"its {name} is a {cls.__name__}, not the plain {kind}"
        if has_hooks(part):
            return f"its {name} has hooks, which the fused step would not call"
    return FusedFlowStep


_STATEFUL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def _step_chain(chain: Any) -> type[Fused] | str:
    for step in chain.steps:
        if original_class(step).__name__ != "FlowStep":
            return f"its steps are not all FlowSteps: {original_class(step).__name__}"
        if has_hooks(step):
            return "its steps have hooks, which the fused chain would not call"
        if isinstance(reason := _flow_step(step), str):
            return f"a step of it: {reason}"
        parts = step.coupling.conditioner.modules()
        if kinds := sorted({type(p).__name__ for p in parts if isinstance(p, _STATEFUL)}):
            return f"its conditioners would not give the same twice: {', '.join(kinds)}"
    return FusedStepChain if len(chain.steps) else "it has no steps"


def _mixture(prior: Any) -> type[Fused] | str:
    clone, z = trial(prior), pattern(3, prior.means.shape[1])
    same = agrees(clone, FusedGaussianMixture, lambda m: m.joint_log_prob(z))
    return FusedGaussianMixture if same else DIFFERS


def _logit(transform: Any) -> type[Fused] | str:
    x = 0.5 + 0.5 * pattern(2, 3, 2)
    calls = (lambda m: m.forward(x), lambda m: m.inverse(5 * x))
    same = agrees(trial(transform), FusedLogitTransform, *calls)
    return FusedLogitTransform if same else DIFFERS


LAYERS = {"FlowStep": _flow_step, "GaussianMixture": _mixture, "LogitTransform": _logit}
CONSTANT_MEMORY = {"StepChain": _step_chain}
