"""`--profile`: where a run's time goes, as a table by phase and as a trace of a few steps."""

import json
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hybridflow.checkpoint import atomic_write_text
from hybridflow.phases import PhaseClock

__all__ = ["RunProfile"]

_WAIT, _TRACED = 10, 3  # steps


class RunProfile:
    """While entered, times every phase of the run, and traces three steps after the first ten.

    Args:
        device: where the steps run.
        table: JSON file for the times by phase.
        trace: file for the trace, in the Chrome format, compressed.
    """

    def __init__(self, device: torch.device, table: Path, trace: Path) -> None:
        self._table, self._trace = table, trace
        self._clock = PhaseClock(device)
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=_WAIT - 1, warmup=1, active=_TRACED, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        )

    def __enter__(self) -> Self:
        self._clock.__enter__()
        self._profiler.__enter__()
        self._began, self._steps, self._tracing = time.perf_counter(), 0, 0.0
        return self

    def __exit__(self, *exception: Any) -> None:
        self._seconds = time.perf_counter() - self._began - self._tracing
        self._profiler.__exit__(*exception)
        self._clock.__exit__(*exception)

    def step(self) -> None:
        """To be called after every step."""
        began = time.perf_counter()
        self._profiler.step()
        self._tracing += time.perf_counter() - began
        self._steps += 1

    def report(self) -> None:
        """Write the table and print it; what no phase accounts for is called other."""
        times = self._clock.times()
        other = self._seconds - sum(seconds for _, seconds in times.values())
        rows = {
            name: {"calls": calls, "seconds": round(seconds, 6)}
            for name, (calls, seconds) in (times | {"other": (self._steps, max(0, other))}).items()
        }
        result = {"steps": self._steps, "seconds": round(self._seconds, 6), "phases": rows}
        atomic_write_text(self._table, json.dumps(result, indent=1) + "\n")
        print(f"{'phase':32} {'calls':>7} {'ms a call':>10} {'share':>6}")
        for name, row in rows.items():
            ms, share = 1e3 * row["seconds"] / max(1, row["calls"]), row["seconds"] / self._seconds
            print(f"{name:32} {row['calls']:7} {ms:10.3f} {share:6.1%}")
        files = [self._table, *([self._trace] if self._trace.exists() else [])]
        print(f"profile of {self._steps} steps: {', '.join(map(str, files))}")
