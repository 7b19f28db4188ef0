"""Measure what a flow costs against its size: `python -m benchmarks.scaling`.

Likelihood, forward and backward, around one base: batch, couplings and image grow one at a time. Variants
take turns at each point. A point that is too slow or needs too much memory is recorded as such. Exit
status: 0 if every variant that ran was right.
"""

import argparse
import copy
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import (
    calls_in_one,
    command,
    in_turns,
    machine,
    peak_bytes,
    set_cudnn,
    several,
    times,
)
from benchmarks.workloads import CLASSES, stir
from hybridflow.config import FlowConfig
from hybridflow.kernels import fuse
from hybridflow.networks import build_model

__all__ = ["AXES", "BASES", "Point", "main", "measure"]

_SECONDS = 0.3  # of a turn
_SLOW = 15.0  # seconds of a call that is called too slow
_TOO_SLOW, _NO_MEMORY = "too slow", "out of memory"
_ALLOWED = {
    "outputs": 1e-4,
    "gradients": 1e-2,
}  # gradients jump where a ReLU's argument passes zero

Row = dict[str, Any]
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Point:
    """A flow on grey images and how many of them: `couplings` in total, the last, wide one not counted."""

    batch: int
    couplings: int
    size: int
    scales: int
    hidden: int
    last_hidden: int

    def flow(self) -> nn.Module:
        """With mild random weights."""
        torch.manual_seed(0)
        per_scale = self.couplings // self.scales
        config = FlowConfig(self.scales, per_scale, self.hidden, self.last_hidden)
        flow = build_model(config, torch.Size((1, self.size, self.size)), CLASSES).flow
        stir(flow)
        return flow


BASES = {
    "cpu": Point(batch=100, couplings=8, size=16, scales=2, hidden=32, last_hidden=64),
    "cuda": Point(batch=300, couplings=24, size=32, scales=2, hidden=128, last_hidden=512),
}
AXES = {
    "batch": (100, 300, 1000, 3000, 8192),
    "couplings": (8, 16, 32, 64, 96),
    "size": (8, 16, 32, 64),
}


def _likelihood(flow: nn.Module, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    out = flow(x)
    grads = torch.autograd.grad(out, [x, *flow.parameters()], weights)
    return [*(t.detach() for t in out), *grads]


def _modules(point: Point, device: torch.device, mode: str | None) -> dict[str, nn.Module]:
    plain = point.flow().to(device)
    fused, lean = copy.deepcopy(plain), copy.deepcopy(plain)
    fuse(fused)
    fuse(lean, constant_memory=True)
    modules: dict[str, Any] = {"eager": plain, "fused": fused, "fused, constant memory": lean}
    if mode is not None:
        modules["compile"] = torch.compile(plain, mode=mode, fullgraph=True)
    return modules


def measure(
    point: Point,
    device: torch.device,
    *,
    mode: str | None = None,
    seconds: float = _SECONDS,
    hopeless: Mapping[str, str] | None = None,
    until: float = math.inf,
) -> list[Row]:
    """A row for each variant: first call, times, rate, peak memory and what is wrong, or why it `failed`.

    Variants in `hopeless` are not tried, for the reason there.
    """
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(point.batch, 1, point.size, point.size, generator=generator).to(device)
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    right: list[Tensor] = []
    weights: list[Tensor] = []
    for name, flow in _modules(point, device, mode).items():
        rows[name] = asdict(point) | {"variant": name}
        if hopeless and name in hopeless:
            rows[name]["failed"] = hopeless[name]
            continue
        try:
            if not weights:
                with torch.no_grad():
                    weights = [torch.randn_like(t) for t in flow(x)]
            call = functools.partial(_likelihood, flow, x, weights)
            began = time.perf_counter()
            results = call()
            _wait(device)
            rows[name]["first_call_seconds"] = round(time.perf_counter() - began, 3)
            began = time.perf_counter()
            rows[name]["peak_bytes"] = peak_bytes(call, device)
            second = time.perf_counter() - began
        except RuntimeError as error:
            rows[name]["failed"] = _reason(error)
            continue
        right = right or results
        errors = _errors(results, right, outputs=len(weights))
        rows[name] |= {f"error_of_{k}": float(f"{e:.2g}") for k, e in errors.items()}
        rows[name]["problems"] = _problems(errors)
        if second > _SLOW:
            rows[name]["failed"] = f"{_TOO_SLOW}: a call took {second:.0f} s"
        else:
            calls[name] = call
    _measure_times(rows, calls, device, seconds, until)
    return list(rows.values())


def _measure_times(
    rows: Mapping[str, Row],
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    until: float,
) -> None:
    timed = {name: several(call, device) for name, call in calls.items()}
    for name, us in in_turns(timed, seconds, until).items():
        rows[name] |= times([t / calls_in_one(device) for t in us])
        rows[name]["images_per_second"] = round(1e6 * rows[name]["batch"] / rows[name]["us"][1], 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reason(error: RuntimeError) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    lacking = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text
    return f"{_NO_MEMORY}: {text[:200]}" if lacking else text[:300]


def _errors(got: Sequence[Tensor], want: Sequence[Tensor], outputs: int) -> dict[str, float]:
    """‖got - want‖ / ‖want‖ of all outputs and of all gradients."""
    parts = {"outputs": slice(outputs), "gradients": slice(outputs, None)}
    found = {}
    for name, part in parts.items():
        exact = torch.cat([t.flatten().double() for t in want[part]])
        difference = torch.cat([t.flatten().double() for t in got[part]]) - exact
        error = (difference.norm() / exact.norm()).item()
        found[name] = error if math.isfinite(error) else math.inf
    return found


def _problems(errors: Mapping[str, float]) -> list[str]:
    return [
        f"{name} are off by {error:.1e}, allowed is {_ALLOWED[name]:.1e}"
        for name, error in errors.items()
        if not error <= _ALLOWED[name]
    ]


def _points(base: Point) -> list[tuple[str, Point]]:
    """The base once, as a point of every axis; the others along each axis, small ones first."""
    points = [("base", base)]
    for axis, sizes in AXES.items():
        points += [(axis, replace(base, **{axis: s})) for s in sizes if s != getattr(base, axis)]
    return points


def _limit_memory() -> None:
    """Let allocations beyond the free memory fail, instead of having the process killed."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return
    free = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    used = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line
    )
    kilobytes = sum(int(line.split()[1]) for line in (free, used))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * kilobytes, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=BASES, default="cpu")
    add("--compile", dest="mode", metavar="MODE", help="torch.compile's mode, too")
    add("--minutes", type=float, default=math.inf, help="begin no turn and no point after that")
    add("--seconds", type=float, default=_SECONDS, help="of a variant's turn")
    add("--out", type=Path, help="results file; default benchmarks/results/scaling-<device>.json")
    args = parser.parse_args(argv)
    until = time.perf_counter() + 60 * args.minutes
    device, out = torch.device(args.device), args.out or RESULTS / f"scaling-{args.device}.json"
    if device.type == "cuda":
        set_cudnn()
    else:
        _limit_memory()
    rows: list[Row] = []
    results: Row = {
        "command": command("benchmarks.scaling", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "mode": args.mode,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    hopeless: dict[str, dict[str, str]] = {}
    for axis, point in _points(BASES[args.device]):
        of_axis = hopeless.setdefault(axis, {})
        if time.perf_counter() > until:
            late = asdict(point) | {"variant": "all"}
            new = [late | {"failed": f"{args.minutes:g} minutes were up"}]
        else:
            options = {"mode": args.mode, "seconds": args.seconds, "until": until}
            new = measure(point, device, hopeless=of_axis, **options)
        for row in new:
            if row.get("failed", "").startswith((_TOO_SLOW, _NO_MEMORY)):
                of_axis.setdefault(row["variant"], f"not tried, a smaller one was {row['failed']}")
        rows += [{"axis": axis} | row for row in new]
        out.write_text(json.dumps(results, indent=1) + "\n")
        shown = {r["variant"]: r.get("failed") or round(r["us"][1] / 1e3, 2) for r in new}
        print(axis, getattr(point, axis, ""), shown, flush=True)
    wrong = [f"wrong: {r}" for r in rows if r.get("problems")]
    print("\n".join([*wrong, f"results: {out}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
