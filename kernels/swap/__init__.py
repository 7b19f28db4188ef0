"""Swapping fused implementations into a live model, and back."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import _backend, native

__all__ = ["FuseReport", "fuse", "unfuse"]


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: names of the swapped modules, and of those left with the reason."""

    swapped: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.swapped)} of {len(self.swapped) + len(self.left)} flow steps"]
        lines += [f"  left {name or 'the model'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Swap the fused implementation in for every FlowStep of a model, in place.

    A swap changes a module's class and nothing else: parameters, state_dict keys, hooks and device
    stay, copies and checkpoints work, and `unfuse` restores the model. Fusing twice is harmless.
    A FlowStep subclass, or a step with replaced or hooked parts, is left alone.

    Args:
        model: any module that contains `hybridflow.flow.FlowStep`s, or is one.

    Returns:
        A report; print it.

    Raises:
        NativeLibraryError: the model is on the CPU and the native library is missing.
        ModuleNotFoundError: the model is on a GPU and triton is missing.
    """
    _require_kernels(model)
    from .flow_step import FlowStep, FusedFlowStep, obstacle

    swapped, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, FusedFlowStep):
            swapped.append(name)
        elif isinstance(module, FlowStep):
            reason = obstacle(module)
            if reason:
                left[name] = reason
            else:
                module.__class__ = FusedFlowStep
                swapped.append(name)
    return FuseReport(tuple(swapped), left)


def unfuse(model: nn.Module) -> None:
    """Restore every module that `fuse` swapped, in place."""
    from .flow_step import FlowStep, FusedFlowStep

    for module in model.modules():
        if type(module) is FusedFlowStep:
            module.__class__ = FlowStep  # type: ignore[assignment]


def _require_kernels(model: nn.Module) -> None:
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device == "cpu":
        native.load()
    elif device == "cuda" and _backend.choose(torch.empty(0, device=device)) != "triton":
        raise ModuleNotFoundError("the GPU kernels need triton: pip install 'triton>=3.6'")
