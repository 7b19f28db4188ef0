"""The fused form of zuko's affine coupling.

The layer is lazy: called with a context it returns a Transform, and that one is fused.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.transforms import Transform, _InverseTransform

from ..actnorm_coupling import CouplingForm
from ..actnorm_coupling.op import apply, tap
from ._fused import (
    DIFFERS,
    Conditioner,
    Fused,
    agrees,
    pattern,
    promoted,
    remembered,
    trial,
    unfit,
)

__all__ = ["LAYERS", "FusedGeneralCouplingTransform"]


class FusedGeneralCouplingTransform(Fused):
    """A GeneralCouplingTransform whose transforms move (…, D) vectors in one kernel.

    The order of the features is kept from call to call, so that no call reads the mask. A
    transform's inverse evaluates the network once where the original does twice.
    """

    mask: Tensor
    hyper: nn.Module
    univariate: Any

    def forward(self, c: Tensor | None = None) -> Transform:
        original: Any = self.original
        form = remembered(self, "form", (self.univariate,), _form)
        if form is None or torch.compiler.is_compiling():
            return original.forward(self, c)
        index, kept = remembered(self, "index", (self.mask,), _order)
        base = remembered(self, "transform", (), lambda: type(original.forward(self, c)))
        return _transform_class(base)(self, c, form, index, kept)


class _Coupling(Transform):
    """The methods of zuko's CouplingTransform that run fused."""

    def __init__(
        self, layer: Any, c: Tensor | None, form: CouplingForm, index: Tensor, kept: int
    ) -> None:
        Transform.__init__(self)
        self.meta = functools.partial(layer.meta, c)
        self.idx_a, self.idx_b = index[:kept], index[kept:]
        self._layer, self._context, self._form, self._index = layer, c, form, index

    @property
    def inv(self) -> Transform:
        known: Any = self._inv  # a weak reference, or nothing yet
        inverse = None if known is None else known()
        if inverse is None:
            inverse = Inverse(self)
            self._inv = weakref.ref(inverse)  # type: ignore[assignment]
        return inverse

    def _call(self, x: Tensor) -> Tensor:
        moved = self._move(x, False)
        return super()._call(x) if moved is None else moved[0]

    def _inverse(self, y: Tensor) -> Tensor:
        moved = self._move(y, True)
        return super()._inverse(y) if moved is None else moved[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        moved = self._move(x, False)
        return super().log_abs_det_jacobian(x, y) if moved is None else moved[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moved = self._move(x, False)
        return super().call_and_ladj(x) if moved is None else moved  # type: ignore[misc]

    def _move(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Result and log-det, or None where the original has to run."""
        if unfit(x) or x.dim() < 1 or x.shape[-1] != len(self._index):
            return None
        rows = x.reshape(-1, x.shape[-1])
        a, rows = tap(rows, len(self.idx_b), index=self._index)
        a, c = a.view(*x.shape[:-1], a.shape[-1]), self._context
        if c is not None:
            batch = torch.broadcast_shapes(a.shape[:-1], c.shape[:-1])
            a = torch.cat((a.expand(*batch, -1), c.expand(*batch, -1)), dim=-1)
        params = self._layer.hyper(a)
        if params.shape != (*x.shape[:-1], 2 * len(self.idx_b)):
            return None
        params = params.reshape(-1, params.shape[-1])
        y, ladj = apply(
            promoted(rows, params), params, index=self._index, form=self._form, inverse=inverse
        )
        return y.to(x.dtype).view(x.shape), ladj.view(x.shape[:-1])


class Inverse(_InverseTransform):
    """The inverse of a fused transform, itself fused. The name is what a repr shows."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        coupling: Any = self._inv
        moved = coupling._move(y, True)
        if moved is None:
            x = self(y)
            return x, self.log_abs_det_jacobian(y, x)
        return moved


_transforms: dict[Any, Any] = {}


def _transform_class(base: Any) -> Any:
    if base not in _transforms:
        _transforms[base] = type(base.__name__, (_Coupling, base), {"__module__": __name__})
    return _transforms[base]


def _order(mask: Tensor) -> tuple[Tensor, int]:
    """Permutation of the features, identity part (where the mask is one) first, and its size."""
    return torch.cat((mask.nonzero(), (~mask).nonzero())).squeeze(-1), int(mask.sum())


def _form(univariate: Any) -> CouplingForm | None:
    """What MonotonicAffineTransform computes with its slope, or that slope; None for all else."""
    call, given = univariate, {}
    if isinstance(univariate, functools.partial):
        call, given = univariate.func, univariate.keywords
        if univariate.args or set(given) - {"slope"}:
            return None
    if not isinstance(call, type) or call.__name__ != "MonotonicAffineTransform":
        return None
    if call.__module__.partition(".")[0] != "zuko":
        return None
    largest = torch.tensor(1e300, dtype=torch.float64, device="cpu")
    clamp = univariate(torch.zeros_like(largest), largest).log_scale.item()
    return CouplingForm("soft_clamp", clamp=clamp, interleaved=True, leading="shift")


def _coupling(layer: Any) -> type[Fused] | str:
    if _form(layer.univariate) is None:
        return "its univariate transform is not affine with a fixed slope"
    if [tuple(shape) for shape in layer.shapes] != [(), ()]:
        return f"its univariate parameters have shapes {layer.shapes}"
    moved = len(layer.mask) - int(layer.mask.sum())
    if moved in (0, len(layer.mask)):
        return "one of its parts is empty"
    x, c = pattern(2, len(layer.mask)), pattern(1, 2)
    clone = trial(layer, hyper=Conditioner(2 * moved))
    fused = FusedGeneralCouplingTransform
    calls = (
        lambda layer: layer.forward().call_and_ladj(x),
        lambda layer: layer.forward(c)(x),
        lambda layer: layer.forward().inv(x),
        lambda layer: layer.forward().log_abs_det_jacobian(x, x),
    )
    return fused if agrees(clone, fused, *calls) else DIFFERS


LAYERS = {"GeneralCouplingTransform": _coupling}
