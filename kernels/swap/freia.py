"""The fused forms of FrEIA's layers.

A module takes a list of one tensor and returns a tuple (ActNorm of the release: a list) of one, with
the log-det of the direction executed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..actnorm_coupling import CouplingForm
from ..actnorm_coupling.form import Scale
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

__all__ = [
    "LAYERS",
    "FusedAffineCouplingOneSided",
    "FusedAllInOneBlock",
    "FusedConditionalAffineTransform",
    "FusedGLOWCouplingBlock",
    "FusedLocationActNorm",
    "FusedRNVPCouplingBlock",
    "FusedScaleActNorm",
]


class FusedScaleActNorm(Fused):
    """An ActNorm of parameters `scale` and `bias` in one kernel. The batch that initialises it runs
    through the original."""

    dims_in: Any
    scale: Tensor
    bias: Tensor
    init_on_next_batch: bool

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        if self.init_on_next_batch or unfit(x[0]) or tuple(x[0].shape[1:]) != tuple(self.dims_in):
            return self.original.forward(self, x, rev=rev, jac=jac)
        scale, bias = self.scale.reshape(-1), self.bias.reshape(-1)
        values = promoted(x[0], scale, bias)
        out, log_det = apply(values, None, scale, bias, inverse=bool(rev))
        return [out], log_det


class FusedLocationActNorm(Fused):
    """An ActNorm of parameters `log_scale` and `loc` in one kernel: (x - loc)·exp(-log_scale), per
    element. The batch that initialises it runs through the original. Its log-det is (1,)."""

    is_initialized: Tensor
    log_scale: Tensor
    loc: Tensor

    def forward(self, x: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        values, log_scale = x[0], self.log_scale
        fitting = values.dim() > 1 and values.shape[1:] == log_scale.shape[1:]
        if c is not None or not fitting or unfit(values) or not raised(self, self.is_initialized):
            return self.original.forward(self, x, c=c, rev=rev, jac=jac)
        flat, loc = log_scale.reshape(-1), self.loc.reshape(-1)
        rows = promoted(values, flat, loc).flatten(1)
        out, _ = apply(rows, None, flat, loc, inverse=not rev)
        wide = torch.promote_types(log_scale.dtype, torch.float32)
        log_det = log_scale.flatten(1).sum(1, dtype=wide)
        return (out.view(values.shape),), log_det if rev else -log_det


class _Coupling(Fused):
    clamp: float
    f_clamp: Any
    conditional: bool
    ndims: int
    split_len1: int
    split_len2: int

    def _form(self, x: Any) -> CouplingForm | None:
        """The form, or None where the original has to run."""
        if x[0].dim() != self.ndims + 1 or unfit(x[0]):
            return None
        return remembered(self, "form", (self.f_clamp, self.clamp), _clamped)

    def _plain(self, x: Any, c: Any, rev: bool, jac: bool) -> Any:
        return self.original.forward(self, x, c=c, rev=rev, jac=jac)

    def _with(self, u: Tensor, c: Any) -> Tensor:
        return torch.cat([u, *c], 1) if self.conditional else u


class _TwoSided(_Coupling):
    """Each half moves the other in turn, in a kernel each."""

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> Any:
        moved = self._move(x1, self._params1, u2, rev)
        original: Any = self.original
        return original._coupling1(self, x1, u2, rev) if moved is None else moved

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> Any:
        moved = self._move(x2, self._params2, u1, rev)
        original: Any = self.original
        return original._coupling2(self, x2, u1, rev) if moved is None else moved

    def _move(
        self, x: Tensor, network: Callable[[Tensor], Tensor], u: Tensor, rev: bool
    ) -> tuple[Tensor, Tensor] | None:
        form = self._form([x])
        params = None if form is None else network(u)
        if form is None or params is None or not fits(params, x, 2 * x.shape[1]):
            return None
        return apply(promoted(x, params), params, form=form, inverse=bool(rev))

    def _params1(self, u2: Tensor) -> Tensor:
        raise NotImplementedError

    def _params2(self, u1: Tensor) -> Tensor:
        raise NotImplementedError


class FusedGLOWCouplingBlock(_TwoSided):
    """A GLOWCouplingBlock that moves each half in one kernel."""

    subnet1: nn.Module
    subnet2: nn.Module

    def _params1(self, u2: Tensor) -> Tensor:
        return self.subnet2(u2)

    def _params2(self, u1: Tensor) -> Tensor:
        return self.subnet1(u1)


class FusedRNVPCouplingBlock(_TwoSided):
    """An RNVPCouplingBlock that moves each half in one kernel; the outputs of its networks are
    joined for it."""

    subnet_s1: nn.Module
    subnet_t1: nn.Module
    subnet_s2: nn.Module
    subnet_t2: nn.Module

    def _params1(self, u2: Tensor) -> Tensor:
        return torch.cat((self.subnet_s2(u2), self.subnet_t2(u2)), dim=1)

    def _params2(self, u1: Tensor) -> Tensor:
        return torch.cat((self.subnet_s1(u1), self.subnet_t1(u1)), dim=1)


class FusedAffineCouplingOneSided(_Coupling):
    """An AffineCouplingOneSided in one kernel, without the copies of splitting and joining."""

    subnet: nn.Module

    def forward(self, x: Any, c: Any = [], rev: bool = False, jac: bool = True) -> Any:  # noqa: B006
        form = self._form(x)
        values = x[0]
        if form is None or values.shape[1] != self.split_len1 + self.split_len2:
            return self._plain(x, c, rev, jac)
        identity, rest = tap(values, self.split_len2)
        params = self.subnet(self._with(identity, c))
        if not fits(params, values, 2 * self.split_len2):
            return self._plain(x, c, rev, jac)
        out, log_det = apply(promoted(rest, params), params, form=form, inverse=bool(rev))
        return (out,), log_det


class FusedConditionalAffineTransform(_Coupling):
    """A ConditionalAffineTransform in one kernel."""

    channels: int
    subnet: nn.Module

    def forward(self, x: Any, c: Any = [], rev: bool = False, jac: bool = True) -> Any:  # noqa: B006
        form = self._form(x)
        if form is None:
            return self._plain(x, c, rev, jac)
        params = self.subnet(torch.cat(tuple(c), 1) if len(c) > 1 else c[0])
        if not fits(params, x[0], 2 * self.channels) or x[0].shape[1] != self.channels:
            return self._plain(x, c, rev, jac)
        out, log_det = apply(promoted(x[0], params), params, form=form, inverse=bool(rev))
        return (out,), log_det


class FusedAllInOneBlock(Fused):
    """An AllInOneBlock whose affine part is one kernel; permutation and global affine are its own.
    The network's output is not scaled in place."""

    clamp: float
    GIN: bool

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> Any:
        original: Any = self.original
        form = remembered(self, "form", (self.clamp,), _all_in_one)
        if form is None or self.GIN or unfit(x) or not fits(a, x, 2 * x.shape[1]):
            return original._affine(self, x, a, rev)
        return apply(promoted(x, a), a, form=form, inverse=bool(rev))


def _all_in_one(clamp: Any) -> CouplingForm | None:
    return CouplingForm("tanh", clamp=float(clamp), factor=0.1) if _in_range(clamp) else None


def _clamped(f_clamp: Any, clamp: Any) -> CouplingForm | None:
    """The form of these, or None if there is none. A callable of the user's may depend on anything,
    so it is not tried out, unless it is torch.tanh."""
    own = getattr(f_clamp, "__module__", None) or ""
    closed = getattr(f_clamp, "__closure__", None)
    library = own.partition(".")[0] == "FrEIA" and closed is None
    if not _in_range(clamp) or not (library or f_clamp is torch.tanh):
        return None
    u = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    values = f_clamp(u)
    known: tuple[tuple[Scale, Tensor], ...] = (
        ("atan", 0.636 * u.atan()),
        ("tanh", u.tanh()),
        ("two_sigmoid", 2 * u.sigmoid() - 1),
    )
    for scale, expected in known:
        if torch.allclose(values, expected, rtol=1e-12, atol=1e-12):
            return CouplingForm(scale, clamp=float(clamp))
    return None


def _in_range(clamp: Any) -> bool:
    return isinstance(clamp, int | float) and 0 < clamp < float("inf")


def _actnorm(layer: Any) -> type[Fused] | str:
    names = set(layer._parameters)
    fused: type[Fused]
    if {"scale", "bias"} <= names and isinstance(layer.init_on_next_batch, bool):
        fused, clone = FusedScaleActNorm, trial(layer, init_on_next_batch=False)
        sizes = tuple(layer.dims_in)
    elif {"log_scale", "loc"} <= names:
        fused, clone = FusedLocationActNorm, trial(layer, is_initialized=torch.tensor(True))
        sizes = tuple(layer.log_scale.shape[1:])
    else:
        return f"its parameters are {', '.join(sorted(names))}"
    return fused if _same(clone, fused, pattern(2, *sizes)) else DIFFERS


def _half_coupling(fused: type[Fused], **networks: tuple[str, int]) -> Any:
    """A recogniser: by network, the attribute that counts what it moves and its outputs for each."""

    def recognise(layer: Any) -> type[Fused] | str:
        if not _in_range(layer.clamp):
            return f"its clamp is {layer.clamp!r}, not a number above 0"
        if _clamped(layer.f_clamp, layer.clamp) is None:
            return "its clamp_activation is a function that is not known"
        sizes = {name: getattr(layer, counted) for name, (counted, _) in networks.items()}
        if 0 in sizes.values():
            return "one of its halves is empty"
        stand_ins = {
            name: Conditioner(per * sizes[name], phase=i)
            for i, (name, (_, per)) in enumerate(networks.items())
        }
        tail = (1,) * (layer.ndims - 1)
        c = [pattern(2, 3, *tail)] if layer.conditional else []
        clone = trial(layer, **stand_ins)
        return fused if _same(clone, fused, pattern(2, layer.channels, *tail), c) else DIFFERS

    return recognise


def _all_in_one_block(layer: Any) -> type[Fused] | str:
    if layer.GIN:
        return "a GIN block: its log-scales are made to sum to nothing"
    if not _in_range(layer.clamp):
        return f"its clamp is {layer.clamp!r}, not a number above 0"
    moved, rank = layer.splits[1], layer.input_rank
    if not moved:
        return "one of its halves is empty"
    x, a = pattern(2, moved, *(1,) * rank), 9 * pattern(2, 2 * moved, *(1,) * rank)
    same = agrees(
        trial(layer),
        FusedAllInOneBlock,
        lambda m: m._affine(x, a.clone()),
        lambda m: m._affine(x, a.clone(), rev=True),
    )
    return FusedAllInOneBlock if same else DIFFERS


def _same(clone: nn.Module, fused: type[Fused], x: Tensor, *c: Any) -> bool:
    return agrees(
        clone, fused, lambda m: m.forward([x], *c), lambda m: m.forward([x], *c, rev=True)
    )


LAYERS = {
    "ActNorm": _actnorm,
    "AllInOneBlock": _all_in_one_block,
    "GLOWCouplingBlock": _half_coupling(
        FusedGLOWCouplingBlock, subnet1=("split_len2", 2), subnet2=("split_len1", 2)
    ),
    "RNVPCouplingBlock": _half_coupling(
        FusedRNVPCouplingBlock,
        subnet_s1=("split_len2", 1),
        subnet_t1=("split_len2", 1),
        subnet_s2=("split_len1", 1),
        subnet_t2=("split_len1", 1),
    ),
    "AffineCouplingOneSided": _half_coupling(FusedAffineCouplingOneSided, subnet=("split_len2", 2)),
    "ConditionalAffineTransform": _half_coupling(
        FusedConditionalAffineTransform, subnet=("channels", 2)
    ),
    "GINCouplingBlock": "a GIN block: its log-scales are made to sum to nothing",
    "NICECouplingBlock": "additive: it has no scale",
}
