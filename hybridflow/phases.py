"""Names for the parts of a run: ranges for profilers, and a clock that adds up the time of each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Self

import torch
from torch.profiler import record_function

try:
    import nvtx
except ImportError:
    nvtx = None

__all__ = ["PhaseClock", "phase"]

_PENDING = 4096  # pairs of CUDA events kept before they are read
_clocks: list["PhaseClock"] = []  # those entered; the last one counts


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a run: an NVTX range where nvtx is installed, and a time for the `PhaseClock` that runs.

    Within a captured CUDA graph a phase marks the capture, not the replays.
    """
    with nvtx.annotate(name, domain="hybridflow") if nvtx else nullcontext():
        if not _clocks or _is_capturing(_clocks[-1].device):
            yield
            return
        with _clocks[-1].measure(name), record_function(name):
            yield


def _is_capturing(device: torch.device) -> bool:
    """A PyTorch without CUDA cannot even be asked."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class PhaseClock:
    """While entered, adds up calls and seconds of every phase; phases should not be nested.

    On a CUDA device the times are the device's, between events at both ends of a phase.

    Example:
        >>> with PhaseClock(torch.device("cpu")) as clock:
        ...     with phase("data"):
        ...         _ = torch.randn(10)
        >>> list(clock.times()), clock.times()["data"][0]
        (['data'], 1)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._times: dict[str, tuple[int, float]] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Self:
        _clocks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _clocks.remove(self)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count what is done while entered as a call of this phase."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
            if len(self._pending) >= _PENDING:
                self._read()
        else:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)

    def times(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds of each phase, in the order of their first call; waits for the device."""
        self._read()
        return dict(self._times)

    def _read(self) -> None:
        if self._pending:
            torch.cuda.synchronize(self.device)
        for name, start, end in self._pending:
            self._add(name, start.elapsed_time(end) / 1e3)
        self._pending.clear()

    def _add(self, name: str, seconds: float) -> None:
        calls, before = self._times.get(name, (0, 0.0))
        self._times[name] = calls + 1, before + seconds
