"""The fused forms of FlowGMM's layers (package flow_ssl).

`forward(x)` maps data → latent and returns z alone; `logdet()` then gives the (B,) log-det of that
call. The originals look for NaN in the scales of each call, and raise; the fused forms do not look,
which would wait for the device, and NaN is seen in their results.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..actnorm_coupling import CouplingForm
from ..actnorm_coupling.op import apply
from ._fused import (
    DIFFERS,
    Conditioner,
    Fused,
    agrees,
    fits,
    pattern,
    promoted,
    raised,
    trial,
    unfit,
)

__all__ = ["LAYERS", "FusedActNorm", "FusedCouplingLayer", "FusedCouplingLayerTabular"]

_NORM = CouplingForm(norm_shift_first=True)
_FORM = CouplingForm("tanh", shift_first=True)


class FusedActNorm(Fused):
    """An ActNorm1d or ActNorm2d in one kernel. The batch that initialises it runs through the
    original."""

    weight: Tensor
    bias: Tensor
    initialized: Tensor
    shape: list[int]

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready(x):
            return self.original.forward(self, x)
        self._last_x_size = x.size()
        return self._move(x, False)

    def inverse(self, y: Tensor, logpy: Any = None) -> Tensor:
        original: Any = self.original
        return self._move(y, True) if self._ready(y) else original.inverse(self, y, logpy)

    def logdet(self) -> Tensor:
        samples, _, *spatial = self._last_x_size
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight.sum(dtype=wide) * torch.Size(spatial).numel()).repeat(samples)

    def _ready(self, x: Tensor) -> bool:
        fitting = x.dim() == len(self.shape) and x.shape[1] == self.weight.numel()
        return fitting and not unfit(x) and raised(self, self.initialized)

    def _move(self, x: Tensor, inverse: bool) -> Tensor:
        x = promoted(x, self.weight, self.bias)
        return apply(x, None, self.weight, self.bias, form=_NORM, inverse=inverse)[0]


class _Coupling(Fused):
    mask: Any
    st_net: nn.Module
    rescale: nn.Module

    def forward(self, x: Tensor, sldj: Any = None, reverse: bool = True) -> Tensor:
        moved = self._move(x, False)
        if moved is None:
            return self.original.forward(self, x, sldj, reverse)
        y, self._logdet = moved
        return y

    def inverse(self, y: Tensor) -> Tensor:
        moved = self._move(y, True)
        original: Any = self.original
        return original.inverse(self, y) if moved is None else moved[0]

    def _move(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def _gain(self, x: Tensor) -> Tensor:
        """The weight of `rescale`, by calling it: it is recomputed by its hooks."""
        return self.rescale(x.new_ones(())).reshape(-1)


class FusedCouplingLayer(_Coupling):
    """A CouplingLayer that moves half of the channels in one kernel."""

    def _move(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if unfit(x) or x.dim() < 2 or x.shape[1] % 2:
            return None
        half = x.shape[1] // 2
        flip = not self.mask.reverse_mask
        st = self.st_net(x[:, half:] if flip else x[:, :half])
        gain = self._gain(x)
        if not fits(st, x, x.shape[1]) or gain.numel() != half:
            return None
        x = promoted(x, st, gain)
        return apply(x, st, gain=gain, form=_FORM, flip=flip, inverse=inverse)


class FusedCouplingLayerTabular(_Coupling):
    """A CouplingLayerTabular in one kernel. Its network keeps seeing the vector with the moved half
    set to zero; of its outputs only those for that half are read."""

    def _move(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if unfit(x) or x.dim() != 2 or x.shape[1] < 2:
            return None
        size = x.shape[1]
        first = size // 2
        flip = bool(self.mask.reverse_mask)  # the second part is kept
        kept = F.pad(x[:, first:], (first, 0)) if flip else F.pad(x[:, :first], (0, size - first))
        st, gain = self.st_net(kept), self._gain(x)
        if not fits(st, x, 2 * size) or gain.numel() != size:
            return None
        moved = slice(0, first) if flip else slice(first, size)
        params = st.unflatten(1, (2, size))[:, :, moved].flatten(1)
        x = promoted(x, params, gain)
        return apply(x, params, gain=gain[moved], form=_FORM, flip=flip, inverse=inverse)


class _Scale(nn.Module):
    """Stands in for `rescale` in a trial."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def _actnorm(layer: Any) -> type[Fused] | str:
    channels = layer.weight.numel()
    x = pattern(2, channels, *layer.shape[2:])
    up = torch.ones_like(layer.initialized, device="cpu")
    return _verdict(trial(layer, initialized=up), FusedActNorm, x)


def _coupling(layer: Any) -> type[Fused] | str:
    kind = type(layer.mask).__name__
    if kind != "MaskChannelwise":
        return f"its mask is a {kind}, not one of half the channels"
    rescale, net = _Scale(pattern(2, 1, 1)), Conditioner(4)
    clone = trial(layer, mask=copy.copy(layer.mask), st_net=net, rescale=rescale)
    return _verdict(clone, FusedCouplingLayer, pattern(2, 4, 1, 2))


def _tabular(layer: Any) -> type[Fused] | str:
    kind = type(layer.mask).__name__
    if kind != "MaskTabular":
        return f"its mask is a {kind}, not one of half the features"
    rescale, net = _Scale(pattern(5)), Conditioner(10)
    clone = trial(layer, mask=copy.copy(layer.mask), st_net=net, rescale=rescale)
    return _verdict(clone, FusedCouplingLayerTabular, pattern(2, 5))


def _verdict(clone: nn.Module, fused: type[Fused], x: Tensor) -> type[Fused] | str:
    def forward(layer: Any) -> tuple[Tensor, Tensor]:
        return layer.forward(x), layer.logdet()

    same = agrees(clone, fused, forward, lambda layer: layer.inverse(x))
    return fused if same else DIFFERS


LAYERS = {
    "ActNorm1d": _actnorm,
    "ActNorm2d": _actnorm,
    "CouplingLayer": _coupling,
    "CouplingLayerTabular": _tabular,
}
