"""The fused forms of normflows' layers.

`forward` maps latent → data there, and every log-det is that of the direction executed; those of
constant layers are 0-d.
"""

import math
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
    has_hooks,
    original_class,
    pattern,
    promoted,
    raised,
    remembered,
    trial,
    unfit,
)

__all__ = [
    "LAYERS",
    "FusedActNorm",
    "FusedAffineConstFlow",
    "FusedAffineCoupling",
    "FusedAffineCouplingBlock",
    "FusedMaskedAffineFlow",
]

# By scale_map: "sigmoid" divides by σ(r + 2) on the way from latent to data, "sigmoid_inv" multiplies.
_FORMS = {
    "exp": CouplingForm("exp", interleaved=True, leading="shift"),
    "sigmoid": CouplingForm("inverse_sigmoid", interleaved=True, leading="shift"),
    "sigmoid_inv": CouplingForm("sigmoid", interleaved=True, leading="shift"),
}
_BLOCK = CouplingForm("exp")


class _TwoWay(Fused):
    def forward(self, z: Any) -> Any:
        return self._run(z, False)

    def inverse(self, z: Any) -> Any:
        return self._run(z, True)

    def _run(self, z: Any, inverse: bool) -> Any:
        raise NotImplementedError

    def _plain(self, z: Any, inverse: bool) -> Any:
        original: Any = self.original
        return original.inverse(self, z) if inverse else original.forward(self, z)


class FusedAffineConstFlow(_TwoWay):
    """An AffineConstFlow in one kernel, for parameters per channel or per element."""

    s: Tensor
    t: Tensor

    def _run(self, z: Tensor, inverse: bool) -> Any:
        if unfit(z) or z.dim() != self.s.dim() or z.dim() < 2 or self.s.shape != self.t.shape:
            return self._plain(z, inverse)
        if z.shape[1:] == self.s.shape[1:]:
            x = z.flatten(1)
        elif z.shape[1] == self.s.shape[1] == self.s.numel():
            x = z
        else:
            return self._plain(z, inverse)
        s, t = self.s.reshape(-1), self.t.reshape(-1)
        y, _ = apply(promoted(x, s, t), None, s, t, inverse=inverse)
        log_det = s.sum(dtype=torch.promote_types(s.dtype, torch.float32))
        positions = math.prod(x.shape[2:])
        return y.view(z.shape), log_det * (-positions if inverse else positions)


class FusedActNorm(FusedAffineConstFlow):
    """An ActNorm in one kernel. The batch that initialises it runs through the original."""

    data_dep_init_done: Tensor

    def _run(self, z: Tensor, inverse: bool) -> Any:
        if not raised(self, self.data_dep_init_done):
            return self._plain(z, inverse)
        return super()._run(z, inverse)


class FusedAffineCoupling(_TwoWay):
    """An AffineCoupling that moves z2 in one kernel."""

    param_map: nn.Module
    scale: bool
    scale_map: str

    def _run(self, z: Any, inverse: bool) -> Any:
        z1, z2 = z
        if not self.scale or self.scale_map not in _FORMS or unfit(z2):
            return self._plain(z, inverse)
        param = self.param_map(z1)
        if not fits(param, z2, 2 * z2.shape[1]):
            return self._plain(z, inverse)
        y, log_det = apply(promoted(z2, param), param, form=_FORMS[self.scale_map], inverse=inverse)
        return [z1, y], log_det


class FusedAffineCouplingBlock(_TwoWay):
    """An AffineCouplingBlock without the copies that splitting and merging make."""

    covers = ("flows.1",)
    flows: nn.ModuleList

    def _run(self, z: Tensor, inverse: bool) -> Any:
        split: Any = self.flows[0]
        coupling: Any = self.flows[1]
        form = _FORMS.get(coupling.scale_map) if coupling.scale else None
        if form is None or "channel" not in split.mode or unfit(z) or z.shape[1] < 2:
            return self._plain(z, inverse)
        flip = split.mode == "channel_inv"
        first = (z.shape[1] + 1) // 2
        moved = first if flip else z.shape[1] - first
        z1, rest = tap(z, moved, flip=flip)
        param = coupling.param_map(z1)
        if not fits(param, z, 2 * moved):
            return self._plain(z, inverse)
        return apply(promoted(rest, param), param, form=form, flip=flip, inverse=inverse)


class FusedMaskedAffineFlow(_TwoWay):
    """A MaskedAffineFlow with a mask of zeros and ones: scale and shift are masked, and all channels
    are moved in one kernel (by nothing where the mask is one)."""

    b: Tensor
    s: Any
    t: Any

    def _run(self, z: Tensor, inverse: bool) -> Any:
        if torch.compiler.is_compiling():
            return self._plain(z, inverse)
        moved = remembered(self, "moved", (self.b,), _complement)
        if moved is None or unfit(z) or z.dim() < 2 or z.shape[1:] != self.b.shape[1:]:
            return self._plain(z, inverse)
        masked = self.b * z
        scale, shift = _finite(self.s(masked)), _finite(self.t(masked))
        if scale.shape != z.shape or shift.shape != z.shape:
            return self._plain(z, inverse)
        params = torch.cat((moved * scale, moved * shift), dim=1)
        return apply(promoted(z, params), params, form=_BLOCK, inverse=inverse)


def _complement(mask: Tensor) -> Tensor | None:
    return 1 - mask if bool(((mask == 0) | (mask == 1)).all()) else None


def _finite(v: Tensor) -> Tensor:
    return torch.where(v.isfinite(), v, math.nan)


def _constant(layer: Any) -> type[Fused] | str:
    z = pattern(2, *layer.s.shape[1:])
    clone = trial(layer)
    return FusedAffineConstFlow if _same(clone, FusedAffineConstFlow, z) else DIFFERS


def _actnorm(layer: Any) -> type[Fused] | str:
    clone = trial(layer, data_dep_init_done=torch.ones((), device="cpu"))
    return FusedActNorm if _same(clone, FusedActNorm, pattern(2, *layer.s.shape[1:])) else DIFFERS


def _no_form(coupling: Any) -> str:
    if not coupling.scale:
        return "additive: it has no scale"
    if coupling.scale_map not in _FORMS:
        return f"unknown scale_map {coupling.scale_map!r}"
    return ""


def _coupling(layer: Any) -> type[Fused] | str:
    if reason := _no_form(layer):
        return reason
    clone = trial(layer, param_map=Conditioner(4))
    z = [pattern(2, 3), pattern(2, 2)]
    return FusedAffineCoupling if _same(clone, FusedAffineCoupling, z) else DIFFERS


def _coupling_block(layer: Any) -> type[Fused] | str:
    parts = list(layer.flows)
    names = [original_class(part).__name__ for part in parts]
    if names != ["Split", "AffineCoupling", "Merge"]:
        return f"its parts are {', '.join(names)}"
    split, coupling, merge = parts
    if reason := _no_form(coupling):
        return reason
    if split.mode not in ("channel", "channel_inv") or merge.mode != split.mode:
        return f"it splits by {split.mode!r}, not by halves of the channels"
    if any(map(has_hooks, (layer.flows, *parts))):
        return "its parts have hooks, which the fused block would not call"
    z = pattern(2, 5)
    moved = 3 if split.mode == "channel_inv" else 2
    inner = trial(coupling, param_map=Conditioner(2 * moved))
    clone = trial(layer, flows=nn.ModuleList((split, inner, merge)))
    return FusedAffineCouplingBlock if _same(clone, FusedAffineCouplingBlock, z) else DIFFERS


def _masked(layer: Any) -> type[Fused] | str:
    if _complement(layer.b) is None:
        return "its mask has values besides 0 and 1"
    if layer.b.dim() < 2:
        return "its mask has no channels"
    outputs = layer.b.shape[1]
    clone = trial(layer, s=Conditioner(outputs), t=Conditioner(outputs, phase=1))
    z = pattern(2, *layer.b.shape[1:])
    return FusedMaskedAffineFlow if _same(clone, FusedMaskedAffineFlow, z) else DIFFERS


def _same(clone: nn.Module, fused: type[Fused], z: Any) -> bool:
    return agrees(clone, fused, lambda m: m.forward(z), lambda m: m.inverse(z))


LAYERS = {
    "ActNorm": _actnorm,
    "AffineConstFlow": _constant,
    "AffineCoupling": _coupling,
    "AffineCouplingBlock": _coupling_block,
    "MaskedAffineFlow": _masked,
    "CCAffineConst": "its scale depends on a class label",
}
