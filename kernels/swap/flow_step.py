"""The fused form of hybridflow's own step."""

from typing import Any

from torch import Tensor, nn

from ..actnorm_coupling import actnorm_coupling, actnorm_coupling_inverse, actnorm_identity
from ._fused import Fused, has_hooks

__all__ = ["LAYERS", "FusedFlowStep"]


class FusedFlowStep(Fused):
    """A FlowStep that runs actnorm, coupling and log-det as one kernel.

    Parameters, buffers, state_dict keys and results are FlowStep's; see there.
    """

    actnorm: Any
    coupling: Any

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


def _flow_step(step: nn.Module) -> type[Fused] | str:
    for name, kind in (("actnorm", "ActNorm"), ("coupling", "AffineCoupling")):
        part = getattr(step, name)
        cls = type(part)
        if (cls.__module__, cls.__name__) != (f"hybridflow.flow.{name}", kind):
            return f"its {name} is a {cls.__name__}, not the plain {kind}"
        if has_hooks(part):
            return f"its {name} has hooks, which the fused step would not call"
    return FusedFlowStep


LAYERS = {"FlowStep": _flow_step}
