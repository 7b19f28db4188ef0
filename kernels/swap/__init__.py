"""Swapping fused implementations into a live model, and back.

One file per library: its fused layers, and a table `LAYERS` from the names of the library's classes
to what says whether a module of that class can be swapped. No library is imported: the classes come
from the model.
"""

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .. import _backend, native
from ._fused import Fused, Recogniser, dress, forget, original_class

__all__ = ["FuseReport", "fuse", "unfuse"]

_FILES = {
    "hybridflow.flow": "hybridflow",
    "normflows.flows": "normflows",
    "nflows.transforms": "nflows",
    "zuko.flows": "zuko",
    "FrEIA.modules": "freia",
    "flow_ssl": "flowgmm",
}


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Args:
        swapped: name of each swapped module, and the class it had.
        left: name of each module that was recognised but left alone, and the reason.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.swapped)} of {len(self.swapped) + len(self.left)} flow layers"]
        lines += [f"  {count} {name}" for name, count in Counter(self.swapped.values()).items()]
        lines += [f"  left {name or 'the model'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, constant_memory: bool = False) -> FuseReport:
    """Swap fused implementations in for the flow layers of a model, in place.

    Known are hybridflow's `FlowStep`, `GaussianMixture` and `LogitTransform`, and the actnorms and
    affine couplings of normflows, nflows, zuko, FrEIA and FlowGMM. A swap changes a module's class
    and nothing else: parameters, state_dict keys, hooks, device, signatures and what is returned
    stay, the new class is a subclass of the old one, copies and pickles work, and `unfuse` restores
    the model. Fusing twice is harmless. Log-dets are float32 at least.

    Each layer is tried out before it is swapped, in float64 and with a stand-in for its network: one
    that does not compute what its fused form computes is left alone, whatever its version says. So is
    one whose behaviour could not be kept: a subclass, a replaced method, hooks on parts that would no
    longer be called. A fused layer gives first derivatives in reverse mode; second derivatives raise
    an error. `torch.func`, forward mode and tracing run the layer's own code.

    Args:
        model: any module that contains such layers, or is one.
        constant_memory: whether a `StepChain` keeps for its backward the activations of one step
            instead of all, and one output in twelve; each conditioner then runs once more (see
            `coupling_chain`).

    Returns:
        A report; print it.

    Raises:
        NativeLibraryError: the model is on the CPU and the native library is missing.
        ModuleNotFoundError: the model is on a GPU and triton is missing.
    """
    _require_kernels(model)
    swapped, left = {}, {}
    covered: set[nn.Module] = set()
    for name, module in list(model.named_modules()):
        if module in covered:
            continue
        verdict = _verdict(module, constant_memory)
        if verdict is None:
            continue
        if isinstance(verdict, str):
            left[name] = verdict
            continue
        cls = original_class(module)
        if not isinstance(module, Fused):
            module.__class__ = dress(verdict, cls)
        swapped[name] = f"{cls.__module__}.{cls.__qualname__}"
        covered.update(module.get_submodule(part) for part in verdict.covers)
    return FuseReport(swapped, left)


def unfuse(model: nn.Module) -> None:
    """Restore every module that `fuse` swapped, in place."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = module.original  # type: ignore[assignment]
            forget(module)


def _verdict(module: nn.Module, constant_memory: bool) -> type[Fused] | str | None:
    """The fused form of a module, or why it has none; None if it is no layer that is known."""
    if isinstance(module, Fused):
        return module.form_class
    for cls in type(module).__mro__:
        entry = _layers(cls, constant_memory).get(cls.__name__)
        if entry is None:
            continue
        if cls is not type(module):
            return f"a subclass of {cls.__name__}, whose behaviour may differ"
        return entry if isinstance(entry, str) else _examine(module, entry)
    return None


def _layers(cls: type, constant_memory: bool) -> Mapping[str, Recogniser | str]:
    for package, file in _FILES.items():
        if f"{cls.__module__}.".startswith(f"{package}."):
            known = importlib.import_module(f".{file}", __package__)
            return known.LAYERS | (getattr(known, "CONSTANT_MEMORY", {}) if constant_memory else {})
    return {}


def _examine(module: nn.Module, recognise: Recogniser) -> type[Fused] | str:
    try:
        verdict = recognise(module)
    except Exception as error:  # what a layer of another version does when tried out is not known
        return f"it could not be tried out: {type(error).__name__}: {error}"
    if isinstance(verdict, str):
        return verdict
    replaced = sorted(_methods(verdict) & set(vars(module)))
    return f"its {replaced[0]} was replaced" if replaced else verdict


def _methods(fused: type[Fused]) -> set[str]:
    """Names that a fused form overrides."""
    own = fused.__mro__[: fused.__mro__.index(Fused)]
    return {name for cls in own for name in vars(cls)}


def _require_kernels(model: nn.Module) -> None:
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "cpu":
        native.load()
    elif device == "cuda" and _backend.choose(torch.empty(0, device=device)) != "triton":
        raise ModuleNotFoundError("the GPU kernels need triton: pip install 'triton>=3.6'")
