"""The step as one CUDA graph, and what would keep a step from becoming one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridflow.errors import InputError
from hybridflow.phases import phase

__all__ = ["CapturedStep", "Trace", "trace"]

WARM_UP = 3
"""Ordinary calls before the capture, in which kernels are compiled and optimiser states are made."""


class CapturedStep:
    """A function of no arguments that from its fourth call on is one replay of a CUDA graph.

    The first three calls run it as it is, on the stream of the capture, and train as any others do;
    the third also looks for what cannot be captured, since a capture that fails leaves the generator
    of random numbers unusable. The fourth captures the function and replays the graph for the first
    time. Random numbers are those of the device's default generator, as without a graph. cuDNN
    measures its algorithms in the first calls, so that they are fixed before the capture.

    Everything the function reads and writes has to stay where it is: load states in place. What it
    returns is overwritten by the next call.

    Args:
        function: what to capture; static shapes, no host reads.
        device: where it runs.

    Raises:
        InputError: the device is no GPU.
        RuntimeError: from the third or the fourth call: the function cannot be captured, naming what
            prevents it.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        if device.type != "cuda":
            raise InputError(f"device: got {device}, want a CUDA device: only those replay graphs")
        self._function, self._device = function, device
        # One for warm-up and capture, so that gradients are never summed across two streams.
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._result: Any = None

    def __call__(self) -> Any:
        """Call or replay; the function's result."""
        if self._calls < WARM_UP:
            self._calls += 1
            return self._warm_up()
        if self._graph is None:
            self._graph = self._capture()
        with phase("replay"):
            self._graph.replay()
        return self._result

    def _warm_up(self) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        last = self._calls == WARM_UP
        with torch.cuda.stream(self._stream), _benchmark(), Trace() if last else nullcontext() as t:
            result = self._function()
        current.wait_stream(self._stream)
        if t is not None and t.obstacles:
            raise _cannot("; ".join(t.obstacles))
        return result

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                _benchmark(),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._result = self._function()
        except RuntimeError as error:
            raise _cannot(_first_line(error)) from error
        return graph


def _cannot(reason: str) -> RuntimeError:
    return RuntimeError(
        f"the step cannot be captured as a CUDA graph: {reason}; run it without (--no-graphs)"
    )


def _first_line(error: BaseException) -> str:
    """Of the error that came first: ending a capture that has failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _benchmark() -> Iterator[None]:
    """While entered, cuDNN measures its algorithms once for each shape and keeps to the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# --- what prevents a capture ---------------------------------------------------------------------

_REASONS = {
    torch.Tag.data_dependent_output: "reads a value of the data on the host",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on the data",
}
_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
_MASKS = (torch.bool, torch.uint8)
_HERE, _TORCH = Path(__file__), Path(torch.__file__).parent


class Trace(TorchDispatchMode):
    """While entered, notes every operation, backward and optimisers included.

    Attributes:
        operations: names and the shapes of tensor arguments, in order. A step that can be captured has the
            same in every call.
        obstacles: what cannot be part of a CUDA graph, and where it is called, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[torch.Size, ...]]] = []
        self.obstacles: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        made = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        self.operations.append((str(func), tuple(a.shape for a in given)))
        if reason := _obstacle(func, args, {t.device.type for t in (*given, *made)}):
            text = f"{func} {reason} ({_caller()})"
            if text not in self.obstacles:
                self.obstacles.append(text)
        return result


def trace(function: Callable[[], Any]) -> Trace:
    """Call the function, on whatever device its tensors are, and note what it does."""
    with Trace() as found:
        function()
    return found


def _obstacle(func: Any, args: tuple[Any, ...], devices: set[str]) -> str | None:
    if func is torch.ops.aten.lift_fresh.default:
        return "makes a tensor of numbers on the host"
    if len(devices) > 1:
        return f"mixes tensors on {' and '.join(sorted(devices))}"
    tags = set(func.tags)
    if func in _INDEXING:
        masked = any(i is not None and i.dtype in _MASKS for i in args[1])
        tags = {torch.Tag.dynamic_output_shape} if masked else set()
    return next((reason for tag, reason in _REASONS.items() if tag in tags), None)


def _caller() -> str:
    """File and line of the innermost call from outside of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != _HERE and _TORCH not in path.parents:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
