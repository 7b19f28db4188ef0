"""The fused forms of nflows' layers.

`forward` maps data → latent; both directions return the outputs and a (B,) log-det.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..actnorm_coupling import CouplingForm
from ..actnorm_coupling.op import apply, tap
from ._fused import (
    DIFFERS,
    Conditioner,
    Fused,
    agrees,
    fits,
    pattern,
    promoted,
    raised,
    remembered,
    trial,
    unfit,
)

__all__ = ["LAYERS", "FusedActNorm", "FusedAffineCouplingTransform"]

_FORM = CouplingForm("sigmoid", eps=1e-3, leading="shift")


class _TwoWay(Fused):
    def forward(self, inputs: Tensor, context: Any = None) -> Any:
        return self._run(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Any = None) -> Any:
        return self._run(inputs, context, True)

    def _run(self, inputs: Tensor, context: Any, inverse: bool) -> Any:
        raise NotImplementedError

    def _plain(self, inputs: Tensor, context: Any, inverse: bool) -> Any:
        original: Any = self.original
        method = original.inverse if inverse else original.forward
        return method(self, inputs, context)


class FusedActNorm(_TwoWay):
    """An ActNorm in one kernel. The batch that initialises it runs through the original."""

    initialized: Tensor
    log_scale: Tensor
    shift: Tensor

    def _run(self, inputs: Tensor, context: Any, inverse: bool) -> Any:
        log_scale, shift = self.log_scale, self.shift
        waits = not inverse and self.training and not raised(self, self.initialized)
        fitting = inputs.dim() in (2, 4) and inputs.shape[1] == log_scale.numel()
        if waits or not fitting or unfit(inputs):
            return self._plain(inputs, context, inverse)
        x = promoted(inputs, log_scale, shift)
        return apply(x, None, log_scale, shift, inverse=inverse)


class FusedAffineCouplingTransform(_TwoWay):
    """An AffineCouplingTransform that gathers, moves and scatters in one kernel."""

    identity_features: Tensor
    transform_features: Tensor
    features: int
    transform_net: nn.Module
    unconditional_transform: nn.Module | None

    def _run(self, inputs: Tensor, context: Any, inverse: bool) -> Any:
        fitting = inputs.dim() in (2, 4) and inputs.shape[1] == self.features
        if not fitting or self.unconditional_transform is not None or unfit(inputs):
            return self._plain(inputs, context, inverse)
        sources = self.identity_features, self.transform_features
        index = remembered(self, "index", sources, _joined)
        identity, rest = tap(inputs, len(sources[1]), index=index)
        params = self.transform_net(identity, context)
        if not fits(params, inputs, 2 * len(sources[1])):
            return self._plain(inputs, context, inverse)
        x = promoted(rest, params)
        outputs, log_det = apply(x, params, index=index, form=_FORM, inverse=inverse)
        return outputs.to(inputs.dtype), log_det


def _joined(*features: Tensor) -> Tensor:
    return torch.cat(features)


def _actnorm(layer: Any) -> type[Fused] | str:
    clone = trial(layer, training=False)
    inputs = pattern(2, layer.log_scale.numel())
    return FusedActNorm if _same(clone, FusedActNorm, inputs) else DIFFERS


def _coupling(layer: Any) -> type[Fused] | str:
    if layer.unconditional_transform is not None:
        return "it has an unconditional transform of its identity part"
    known = getattr(type(layer), "DEFAULT_SCALE_ACTIVATION", None)
    if getattr(layer, "scale_activation", known) is not known:
        return "its scale_activation is not the default one"
    moved = len(layer.transform_features)
    if moved in (0, layer.features):
        return "one of its parts is empty"
    clone = trial(layer, transform_net=Conditioner(2 * moved))
    inputs = pattern(2, layer.features)
    fused = FusedAffineCouplingTransform
    return fused if _same(clone, fused, inputs) else DIFFERS


def _same(clone: nn.Module, fused: type[Fused], inputs: Tensor) -> bool:
    return agrees(clone, fused, lambda m: m.forward(inputs), lambda m: m.inverse(inputs))


LAYERS = {
    "ActNorm": _actnorm,
    "AffineCouplingTransform": _coupling,
    "AdditiveCouplingTransform": "additive: it has no scale",
}
