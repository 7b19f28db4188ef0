"""What is fixed when a coupling is compiled: its scale, the order of its operations, its layout."""

import functools
from dataclasses import dataclass, fields
from typing import Literal, get_args

__all__ = ["PLAIN", "CouplingForm", "Scale"]

Scale = Literal["exp", "tanh", "atan", "two_sigmoid", "soft_clamp", "sigmoid", "inverse_sigmoid"]


@dataclass(frozen=True)
class CouplingForm:
    """The compile-time choices of an affine coupling.

    The log-scale s = gain · f(factor · raw), with c = `clamp` and σ the logistic function:

        exp              f(r) = r
        tanh             f(r) = c · tanh(r)
        atan             f(r) = c · 0.636 · atan(r)
        two_sigmoid      f(r) = c · (2σ(r) - 1)
        soft_clamp       f(r) = r / (1 + |r| / c)
        sigmoid          f(r) = ln(σ(r + 2) + eps)
        inverse_sigmoid  f(r) = -ln(σ(r + 2) + eps)

    Args:
        scale: which f.
        clamp: c, above 0; used by tanh, atan, two_sigmoid and soft_clamp.
        eps: added to the scale of sigmoid and inverse_sigmoid, at least 0.
        factor: multiplies the conditioner's output, raw and shift alike.
        shift_first: y = (u + shift)·exp(s) instead of y = u·exp(s) + shift.
        interleaved: raw and shift alternate from channel to channel of the conditioner's output,
            instead of being its two halves.
        leading: which of the two comes first.
        norm_shift_first: actnorm is (x + bias)·exp(log_scale) instead of x·exp(log_scale) + bias.

    Raises:
        ValueError: a field is out of its range.
    """

    scale: Scale = "tanh"
    clamp: float = 1.0
    eps: float = 0.0
    factor: float = 1.0
    shift_first: bool = False
    interleaved: bool = False
    leading: Literal["scale", "shift"] = "scale"
    norm_shift_first: bool = False

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale: got {self.scale!r}, want one of {get_args(Scale)}")
        if not 0 < self.clamp < float("inf"):
            raise ValueError(f"clamp: got {self.clamp}, want a finite number above 0")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps: got {self.eps}, want a finite number of at least 0")
        if not abs(self.factor) < float("inf"):
            raise ValueError(f"factor: got {self.factor}, want a finite number")
        if self.leading not in ("scale", "shift"):
            raise ValueError(f"leading: got {self.leading!r}, want 'scale' or 'shift'")

    @functools.cached_property
    def key(self) -> str:
        """The form as a string, which is what an operator's schema can hold; `parse` undoes it."""
        return " ".join(str(getattr(self, f.name)) for f in fields(self))

    @staticmethod
    @functools.cache
    def parse(key: str) -> "CouplingForm":
        scale, clamp, eps, factor, shift_first, interleaved, leading, norm_shift_first = key.split()
        return CouplingForm(
            scale,  # type: ignore[arg-type]
            float(clamp),
            float(eps),
            float(factor),
            shift_first == "True",
            interleaved == "True",
            leading,  # type: ignore[arg-type]
            norm_shift_first == "True",
        )


PLAIN = CouplingForm()
"""Our own layers': s = gain · tanh(raw), y = u·exp(s) + shift."""
