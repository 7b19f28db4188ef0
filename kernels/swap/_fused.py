"""What the fused layers share: the class swapped in, and the trial that it computes the same."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _backend

__all__ = [
    "DIFFERS",
    "Conditioner",
    "Fused",
    "Recogniser",
    "agrees",
    "dress",
    "fits",
    "forget",
    "has_hooks",
    "original_class",
    "pattern",
    "promoted",
    "raised",
    "remembered",
    "trial",
    "unfit",
]

T = TypeVar("T")

DIFFERS = "it computes something else than is known of its class"

_KEPT = "_fused_kept"


class Fused(nn.Module):
    """A module whose class `fuse` replaced.

    A subclass holds the methods that run instead of the library's. `dress` derives from it and from
    the module's own class the one that is swapped in, so whatever is not overridden stays as it was.
    """

    original: ClassVar[type[nn.Module]]
    form_class: ClassVar[type["Fused"]]
    covers: ClassVar[tuple[str, ...]] = ()  # submodules whose work this one takes over

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, _, state, *rest = reduced
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if k != _KEPT}
        return _rebuild, (self.form_class, self.original), state, *rest


Recogniser = Callable[[nn.Module], type[Fused] | str]
"""Fused form of a layer, or why it has none."""


_dresses: dict[tuple[Any, Any], type[Fused]] = {}


def dress(fused: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The class to swap in for `original`; it has the same name, as a repr shows it."""
    if (fused, original) not in _dresses:
        attributes = {
            "__module__": fused.__module__,
            "__doc__": fused.__doc__,
            "original": original,
            "form_class": fused,
        }
        _dresses[fused, original] = type(original.__name__, (fused, original), attributes)
    return _dresses[fused, original]


def _rebuild(fused: type[Fused], original: type[nn.Module]) -> Fused:
    cls = dress(fused, original)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module has, or had before it was fused."""
    return module.original if isinstance(module, Fused) else type(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# --- at run time ---------------------------------------------------------------------------------


def unfit(*tensors: Tensor) -> bool:
    """Whether the layer's own code has to run: the ops are for floating types, and for reverse mode
    alone (no vmap, no forward mode, no tracing)."""
    if not all(t.is_floating_point() for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def fits(params: Tensor, x: Tensor, channels: int) -> bool:
    """Whether a conditioner's output has this many channels and x's other sizes."""
    return x.dim() > 1 and params.shape == (x.shape[0], channels, *x.shape[2:])


def promoted(x: Tensor, *others: Tensor) -> Tensor:
    """x in the type that arithmetic with the others has."""
    for other in others:
        if other.dtype != x.dtype:
            x = x.to(torch.promote_types(x.dtype, other.dtype))
    return x


def remembered(module: nn.Module, name: str, sources: tuple, make: Callable[..., T]) -> T:
    """make(*sources), kept on the module until a source is replaced or written to.

    Whether one was is known without reading a device.
    """
    if not hasattr(module, _KEPT):
        setattr(module, _KEPT, {})  # as setdefault, which not every torch.compile can trace
    kept = getattr(module, _KEPT)
    if torch.compiler.is_compiling() and any(isinstance(s, Tensor) for s in sources):
        return make(*sources)
    versions = [_version(s) for s in sources]
    entry = kept.get(name)
    if (
        entry
        and entry[1] == versions
        and all(a is b for a, b in zip(entry[0], sources, strict=True))
    ):
        return entry[2]
    value = make(*sources)
    kept[name] = sources, versions, value
    return value


def _version(source: Any) -> int | None:
    return source._version if isinstance(source, Tensor) and not source.is_inference() else None


def forget(module: nn.Module) -> None:
    """Drop what `remembered` keeps."""
    module.__dict__.pop(_KEPT, None)


def raised(module: nn.Module, flag: Tensor) -> bool:
    """Whether a flag that is raised once and for all is up; a device is read until it is."""
    if torch.compiler.is_compiling():
        seen = module.__dict__.get(_KEPT, {}).get("flag")  # only kept when it was up
        return True if seen and seen[0][0] is flag else bool(flag)
    up = remembered(module, "flag", (flag,), bool)
    if not up:
        forget(module)  # it may be raised in a way that leaves no trace
    return up


# --- the trial -----------------------------------------------------------------------------------


def pattern(*shape: int) -> Tensor:
    """Numbers between -1 and 1, float64 on the CPU."""
    count = torch.Size(shape).numel()
    return (
        torch.arange(count, dtype=torch.float64, device="cpu").mul(1.7).add(0.3).sin().view(shape)
    )


class Conditioner(nn.Module):
    """Stands in for a network in a trial: every output depends on every input in its own way."""

    def __init__(self, outputs: int, phase: float = 0.0) -> None:
        super().__init__()
        self.outputs = outputs
        self.phase = phase

    def forward(self, a: Tensor, *_: Any) -> Tensor:
        tail = (1,) * (a.dim() - 2)
        weights = torch.arange(1.0, 1 + a.shape[1], dtype=a.dtype, device=a.device)
        phases = torch.arange(self.outputs, dtype=a.dtype, device=a.device)
        mixed = (a * weights.view(-1, *tail)).sum(1, keepdim=True)
        return 3 * (mixed + phases.view(-1, *tail) + self.phase).sin()


def trial(module: nn.Module, **replaced: Any) -> nn.Module:
    """A copy of the module's surface, float64 on the CPU, with invented parameters and some
    attributes replaced, that can be run without touching the module or a random generator."""
    clone = copy.copy(module)
    state = clone.__dict__
    state["_parameters"] = {
        k: None if p is None else 0.5 * pattern(*p.shape) for k, p in module._parameters.items()
    }
    state["_buffers"] = {
        k: None if b is None else b.detach().to("cpu", _trial_dtype(b))
        for k, b in module._buffers.items()
    }
    state["_modules"] = dict(module._modules)
    for name, value in replaced.items():
        place = next((state[d] for d in ("_buffers", "_modules") if name in state[d]), state)
        place[name] = value
    if isinstance(clone, Fused):
        clone.__class__ = clone.original  # type: ignore[assignment]
    return clone


def _trial_dtype(buffer: Tensor) -> torch.dtype:
    return torch.float64 if buffer.is_floating_point() else buffer.dtype


def agrees(clone: nn.Module, fused: type[Fused], *calls: Callable[[Any], Any]) -> bool:
    """Whether calls of a clone made by `trial` return the same when its class is the fused one."""
    with torch.no_grad(), _backend.using("reference"):
        want = [call(clone) for call in calls]
        clone.__class__ = dress(fused, type(clone))
        return _alike(want, [call(clone) for call in calls])


def _alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        kind = a.shape == b.shape and a.dtype == b.dtype
        return kind and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b)
