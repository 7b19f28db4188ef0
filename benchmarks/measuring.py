"""What the suites measure with: the machine, a copy, peak memory, errors, turns between variants."""

import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "cache_bytes",
    "calls_in_one",
    "calls_in_turn",
    "captured",
    "command",
    "copy_call",
    "in_turns",
    "machine",
    "peak_bytes",
    "processor",
    "quantiles",
    "relative_errors",
    "rounds_for",
    "set_cudnn",
    "several",
    "times",
    "typical_errors",
    "verdict",
    "verdict_16_bit",
]

_PACKAGES = ("torch", "triton", "numpy", "pytest-benchmark", "normflows", "nflows", "zuko", "FrEIA")
_TURNS = 5
_GPU_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "power.limit")


# --- the machine ---------------------------------------------------------------------------------


def processor() -> str:
    """The name the processor gives itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cache_bytes(device: torch.device) -> int:
    """Size of the device's largest cache: a GPU's L2, the last level of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [2**10 * int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(found, default=2**25)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads and versions, as the process that measures sees them."""
    facts = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
    }
    if device.type != "cuda":
        return facts
    gpu = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts | {"gpu": gpu | _driver()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(_GPU_FIELDS, text.splitlines()[0].split(", "), strict=True))


def set_cudnn() -> None:
    """On a GPU: float32 is float32 for every variant, and cuDNN measures its algorithms."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


# --- time ----------------------------------------------------------------------------------------


def calls_in_turn(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """One function that goes through `calls`, which differ in their buffers only.

    On the CPU each use makes the next call. On a GPU it makes all of them and waits once, so that
    what is timed is the device.
    """
    if device.type != "cuda":
        turn = itertools.cycle(calls)
        return lambda: next(turn)()

    def every() -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()

    return every


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The same on a GPU without the launches from Python: all calls in one CUDA graph.

    Every call's results stay alive in the graph, so that none is found in the cache.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay() -> list[Any]:
        graph.replay()
        torch.cuda.synchronize()
        return kept

    return replay


def rounds_for(once: float, seconds: float, least: int, most: int = 1000) -> int:
    """Rounds that take about so many seconds, each `once` long; one if it is longer than that."""
    if once > seconds:
        return 1
    return min(most, max(least, int(seconds / max(once, 1e-9))))


def several(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """One function that calls once on a CPU, and `calls_in_one` times with one wait on a GPU."""

    def every() -> None:
        for _ in range(calls_in_one(device)):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return every


def calls_in_one(device: torch.device) -> int:
    """How many calls `several` makes."""
    return 10 if device.type == "cuda" else 1


def command(module: str, argv: Sequence[str] | None) -> list[str]:
    """The command that makes a results file, without where it was written to; argv None: this process's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return ["python", "-m", module, *(a for a in arguments if not a.startswith("--out="))]


def in_turns(
    calls: Mapping[str, Callable[[], Any]], seconds: float, until: float = math.inf
) -> dict[str, list[float]]:
    """Times of each call in µs: five turns of about so many seconds, or of one call that takes longer.

    After the first turn of all, no other begins once `time.perf_counter()` has passed `until`.
    """
    us: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, call) in itertools.product(range(_TURNS), calls.items()):
        if turn and time.perf_counter() > until:
            break
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        if once > seconds:
            us[name].append(1e6 * once)
            continue
        for _ in range(rounds_for(once, seconds, 1)):
            start = time.perf_counter()
            call()
            us[name].append(1e6 * (time.perf_counter() - start))
    return us


def times(us: Sequence[float]) -> dict[str, Any]:
    """Columns of a row: p20, p50 and p80, and of how many rounds."""
    return {"us": [round(t, 1) for t in quantiles(us)], "rounds": len(us)}


def quantiles(values: Sequence[float]) -> list[float]:
    """p20, p50 and p80."""
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)]


def copy_call(device: torch.device, quick: bool) -> tuple[Callable[[], Any], int, int]:
    """A copy of random floats four times as large as the cache, how many copies a round makes, and
    the bytes that one moves."""
    count = 2**20 if quick else cache_bytes(device)
    source = torch.randn(count, device=device)
    target = torch.randn(count, device=device)
    calls = [lambda: target.copy_(source)] * (1 if device.type == "cpu" else 10)  # one wait for all
    return calls_in_turn(calls, device), len(calls), 2 * source.nbytes


# --- memory --------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that live at one moment of `call`, beside those that lived before it.

    Counted by PyTorch's own allocators: every allocation and release, those inside of operators and
    of the backward included. Memory that other libraries take for themselves is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return peak_of_trace([e for e in events if e["name"] == "[memory]"])


def peak_of_trace(events: Sequence[Mapping[str, Any]]) -> int:
    """The peak of the allocations among a profile's memory events."""
    live: dict[int, int] = {}
    total = peak = 0
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
        else:  # 0 for what was there before the profile
            total -= live.pop(address, 0)
    return peak


# --- correctness ---------------------------------------------------------------------------------

_LARGEST = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_TYPICAL = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
_SANE = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.05}


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor from the exact one, as a share of that one's largest value.

    NaN and infinity count as infinitely wrong, and so does another shape.
    """
    return {name: _relative(got[name], value, torch.inf) for name, value in want.items()}


def typical_errors(
    got: Sequence[Mapping[str, Tensor]], want: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """The same of several draws, in the root mean square."""
    return {
        name: math.sqrt(
            sum(_relative(g[name], w[name], 2) ** 2 for g, w in zip(got, want, strict=True))
            / len(want)
        )
        for name in want[0]
    }


def _relative(got: Tensor, want: Tensor, order: float) -> float:
    """‖got - want‖ / ‖want‖ in the norm of this order."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    exact = want.detach().double().cpu()
    difference = (got.detach().double().cpu() - exact).norm(order).item()
    size = exact.norm(order).item()
    return difference / size if math.isfinite(difference) and size else math.inf


def verdict(
    errors: Mapping[str, float], dtype: torch.dtype, of_eager: Mapping[str, float] | None
) -> list[str]:
    """What is wrong with a variant whose largest errors are these, in words; nothing if it is right.

    Eager PyTorch (`of_eager` None) only has to be sane: it sets the measure. Others may err by 1e-5
    (two roundings in 16-bit types), or by four times what eager errs where that is more.
    """
    if of_eager is None:
        return _excess(errors, {}, 0, _SANE[dtype])
    return _excess(errors, of_eager, 4, _LARGEST[dtype])


def verdict_16_bit(
    typical: Mapping[str, float], dtype: torch.dtype, of_eager: Mapping[str, float]
) -> list[str]:
    """The same of typical errors in a 16-bit type: one rounding, or twice what eager errs."""
    return _excess(typical, of_eager, 2, _TYPICAL[dtype])


def _excess(
    errors: Mapping[str, float], measure: Mapping[str, float], factor: float, least: float
) -> list[str]:
    allowed = {name: max(least, factor * measure.get(name, 0.0)) for name in errors}
    return [
        f"{name} is off by {error:.1e}, allowed is {allowed[name]:.1e}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
