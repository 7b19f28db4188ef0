"""The fused form of hybridflow.flow.coupling.FlowStep."""

from torch import Tensor

from hybridflow.flow.actnorm import ActNorm
from hybridflow.flow.coupling import AffineCoupling, FlowStep

from ..actnorm_coupling import actnorm_coupling, actnorm_coupling_inverse, actnorm_identity

__all__ = ["FusedFlowStep", "obstacle"]


class FusedFlowStep(FlowStep):
    """A FlowStep that runs actnorm, coupling and log-det as one kernel.

    Parameters, buffers, state_dict keys and results are FlowStep's; see there.
    """

    def forward(self, x: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        a = actnorm_identity(x, norm.log_scale, norm.bias, flip=coupling.flip)
        return actnorm_coupling(
            x,
            coupling.conditioner(a),
            norm.log_scale,
            norm.bias,
            coupling.gain,
            log_det,
            flip=coupling.flip,
        )

    def inverse(self, y: Tensor, log_det: Tensor | None = None) -> tuple[Tensor, Tensor]:
        norm, coupling = self.actnorm, self.coupling
        identity, _ = coupling.split(y)
        return actnorm_coupling_inverse(
            y,
            coupling.conditioner(identity),
            norm.log_scale,
            norm.bias,
            coupling.gain,
            log_det,
            flip=coupling.flip,
        )


def obstacle(step: FlowStep) -> str:
    """Why this module cannot be swapped; empty if it can."""
    if type(step) is not FlowStep:
        return "a subclass of FlowStep, whose behaviour may differ"
    for name, part, kind in (
        ("actnorm", step.actnorm, ActNorm),
        ("coupling", step.coupling, AffineCoupling),
    ):
        if type(part) is not kind:
            return f"its {name} is a {type(part).__name__}, not the plain {kind.__name__}"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return f"its {name} has hooks, which the fused step would not call"
    return ""
