"""The fused forms of hybridflow's own layers. Parameters, buffers, keys and results are theirs."""

from typing import Any

from torch import Tensor, nn

from ..actnorm_coupling import (
    ChainStep,
    actnorm_coupling,
    actnorm_coupling_inverse,
    coupling_chain,
)
from ..actnorm_coupling.op import tap
from ..dequantize_logit import logit_transform, logit_transform_inverse
from ..gmm_log_prob import gmm_log_prob
from ._fused import DIFFERS, Fused, agrees, has_hooks, original_class, pattern, trial

__all__ = [
    "CONSTANT_MEMORY",
    "LAYERS",
    "FusedFlowStep",
    "FusedGaussianMixture",
    "FusedLogitTransform",
    "FusedStepChain",
]


class FusedFlowStep(Fused):
    """A FlowStep that runs actnorm, coupling and log-det as one kernel."""

    actnorm: Any
    coupling: Any

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        moved, vectors = coupling.channels // 2, (norm.log_scale, norm.bias)
        a, x = tap(x, moved, *vectors, flip=coupling.flip)
        operands = (coupling.conditioner(a), *vectors, coupling.gain, log_det)
        return actnorm_coupling(x, *operands, flip=coupling.flip)

    def inverse(self, y: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        a, y = tap(y, coupling.channels // 2, flip=coupling.flip)
        operands = (norm.log_scale, norm.bias, coupling.gain, log_det)
        return actnorm_coupling_inverse(y, coupling.conditioner(a), *operands, flip=coupling.flip)


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
                step.coupling.conditioner,
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
