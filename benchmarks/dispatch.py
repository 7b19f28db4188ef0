"""Measure what of a training step is Python and dispatch on a CPU: `python -m benchmarks.dispatch`.

A step of one labelled and one unlabelled image has next to no arithmetic: what it takes, every step
takes, however fast its kernels are. Eager and fused take turns, on the networks of the presets. Exit
status: 0.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import command, in_turns, machine, times
from benchmarks.step import build_step
from benchmarks.workloads import FLOWS
from hybridflow.phases import PhaseClock

__all__ = ["main", "measure"]

_CPU = torch.device("cpu")
_STEPS = 20  # of which the phases are told


def measure(data: str, seconds: float) -> list[dict[str, Any]]:
    """A row for eager and for fused: µs of a step (p20, p50, p80), and ms by phase."""
    workload = next(w for w in FLOWS if w.data == data)
    small = replace(workload, images=(1, 1))
    steps = {name: build_step(small, _CPU, fused=name == "fused") for name in ("eager", "fused")}
    rows = []
    for name, us in in_turns(steps, seconds).items():
        with PhaseClock(_CPU) as clock:
            for _ in range(_STEPS):
                steps[name]()
        phases = {phase: round(1e3 * s / _STEPS, 4) for phase, (_, s) in clock.times().items()}
        about = {"data": data, "batch": sum(small.images or ()), "variant": name, "problems": []}
        rows.append(about | times(us) | {"phases_ms": phases})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.dispatch", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=[w.data for w in FLOWS], default=["digits", "MNIST"])
    add("--seconds", type=float, default=1.0, help="of a variant's turn")
    add("--out", type=Path, default=RESULTS / "dispatch-cpu.json")
    args = parser.parse_args(argv)
    results = {
        "command": command("benchmarks.dispatch", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(_CPU),
        "rows": [row for data in args.data for row in measure(data, args.seconds)],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for row in results["rows"]:
        print(row["data"], row["variant"], f"{row['us'][1] / 1e3:.2f} ms")
    print(f"results: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
