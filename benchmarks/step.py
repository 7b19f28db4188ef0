"""Measure the hybrid training step, technique by technique: `python -m benchmarks.step`.

The whole step of the presets at their own batch sizes, on random images: as PyTorch runs it, compiled, with
the elementwise kernels, with those of the conditioners too and, on a GPU, as one CUDA graph. Variants take
turns in one run; each also tells its time by phase. Exit status: 0 if every variant was measured and right.
"""

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import (
    calls_in_one,
    command,
    in_turns,
    machine,
    peak_bytes,
    rounds_for,
    set_cudnn,
    several,
    times,
)
from benchmarks.workloads import CLASSES, FLOWS, Workload, stir
from hybridflow.capture import WARM_UP, CapturedStep
from hybridflow.config import Precision
from hybridflow.data import Batches
from hybridflow.kernels import fuse
from hybridflow.kernels.swap import _choices
from hybridflow.networks import build_discriminator, build_model
from hybridflow.objective import terms_of
from hybridflow.phases import PhaseClock
from hybridflow.step import HybridStep

__all__ = ["FLOWS", "build_step", "device_work", "main", "measure"]

_SECONDS = 1.0  # of a turn
_LOSSES = ("loss_d", "loss_g")
# Gradients jump where rounding decides on which side of zero a ReLU's argument is, and Adam's first
# update of a weight is one of two numbers, by the sign of its gradient: with random signs it is off by 1.4.
_ALLOWED = {
    "fp32": {"losses": 1e-4, "gradients": 1e-2, "updates": 0.7},
    "high": {"losses": 1e-3, "gradients": 3e-2, "updates": 0.7},
    "bf16": {"losses": 2e-2, "gradients": 0.1, "updates": 0.7},
}

Call = Callable[[], Any]
Row = dict[str, Any]


def build_step(
    workload: Workload,
    device: torch.device,
    *,
    channels_last: bool = False,
    fused: bool = False,
    precision: Precision = "fp32",
) -> HybridStep:
    """The step of a preset as the trainer builds it, on 2000 random images."""
    config, shape = workload.config, torch.Size(workload.shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = build_model(config.flow, shape, CLASSES)
    discriminator = build_discriminator(config.discriminator, shape, CLASSES)
    x = torch.randint(0, 256, (2000, *shape), dtype=torch.uint8).contiguous(memory_format=layout)
    y = torch.randint(0, CLASSES, (2000,))
    stir(model.flow)
    model.initialise(x[:200].float() / 256)
    model.to(device, memory_format=layout)
    discriminator.to(
        device
    )  # gradients of its normed weights are contiguous, which fused Adam takes as said
    options: dict[str, Any] = {"shift": config.shift, "flip": config.mirror, "device": device}
    labelled = Batches(x[:1000], y[:1000], config.batch_labelled, **options)
    unlabelled = Batches(x[1000:], None, config.batch_unlabelled, **options)
    if fused:
        fuse(model)
    return HybridStep(
        *(model, discriminator, labelled, unlabelled),
        levels=256,
        terms=terms_of(config.objective, config.terms),
        optimiser=config.optimiser,
        total_steps=config.steps,
        precision=precision,
    )


# --- variants ------------------------------------------------------------------------------------


def _variants(
    workload: Workload, device: torch.device, modes: Sequence[str], precision: Precision
) -> dict[str, Callable[[], tuple[HybridStep, Call]]]:
    """By name what makes a variant: the step, and what to call for one step of training."""
    build = functools.partial(build_step, workload, device, precision=precision)

    def plain(**options: bool) -> tuple[HybridStep, Call]:
        step = build(**options)
        return step, step

    def compiled(mode: str) -> tuple[HybridStep, Call]:
        return _compiled(build(), mode)

    def elementwise() -> tuple[HybridStep, Call]:
        step = build(fused=True)

        def call() -> dict[str, Tensor]:
            with _choices.using(False):
                return step()

        return step, call

    def graph() -> tuple[HybridStep, Call]:
        step = build(fused=True)
        return step, CapturedStep(step, device)

    return {
        "eager": plain,
        "eager, channels-last": functools.partial(plain, channels_last=True),
        **{f"compile, {mode}": functools.partial(compiled, mode) for mode in modes},
        "fused, elementwise only": elementwise,
        "fused": functools.partial(plain, fused=True),
        **({"fused + graph": graph} if device.type == "cuda" else {}),
    }


def _compiled(step: HybridStep, mode: str) -> tuple[HybridStep, Call]:
    """What the step calls, compiled for its shapes; noise stays that of PyTorch's generator."""
    import torch._inductor  # imports Triton, which reads its settings then

    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    as_asked: dict[str, Any] = {"options": options, "dynamic": False}
    model: Any = step.model
    model.joint_log_prob = torch.compile(model.joint_log_prob, **as_asked)
    model.inverse = torch.compile(model.inverse, **as_asked)
    step.discriminator.compile(**as_asked)

    def call() -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of one step outlive calls within it
        return step()

    return step, call


# --- right or wrong ------------------------------------------------------------------------------


def _results(step: HybridStep, before: Mapping[str, Tensor], terms: Any) -> dict[str, Tensor]:
    """Of the step just taken from a state: losses, and gradients and updates of each network end to end."""
    results = {"losses": torch.stack([terms[name] for name in _LOSSES])}
    for name, optimiser in (("model", step.optimiser_g), ("discriminator", step.optimiser_d)):
        assert optimiser.weights.grad is not None
        grads = optimiser.views(optimiser.weights.grad)
        pairs = zip(optimiser.average, optimiser.parameters, strict=True)
        updates = [(p.detach() - before[f"{name}.{key}"]).flatten() for key, p in pairs]
        results[f"gradients of the {name}"] = torch.cat([g.flatten() for g in grads])
        results[f"updates of the {name}"] = torch.cat(updates)
    return results


def _errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Of losses the largest relative difference; of the others ‖got - want‖ / ‖want‖."""
    errors = {name: _relative(got[name] - w, w) for name, w in want.items()}
    errors["losses"] = max(
        _relative(g - w, w) for g, w in zip(got["losses"], want["losses"], strict=True)
    )
    return {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}


def _relative(difference: Tensor, size: Tensor) -> float:
    return (difference.norm() / size.norm()).item()


# --- measurements --------------------------------------------------------------------------------


def measure(
    workload: Workload,
    device: torch.device,
    *,
    modes: Sequence[str] = (),
    precision: Precision = "fp32",
    seconds: float = _SECONDS,
    until: float = math.inf,
) -> tuple[list[Row], list[Row]]:
    """A row for each variant, and one with the reason for each that does not run.

    All variants take their first checked step from the same state with the same random numbers.
    """
    torch.compiler.reset()
    config = workload.config
    images = config.batch_labelled + config.batch_unlabelled
    about = {"data": workload.data, "batch": images}
    start: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    missing: list[Row] = []
    variants = _variants(workload, device, modes, precision)
    for name, make in variants.items():
        try:
            step, call = make()
            start = start or {key: value.clone() for key, value in step.state_dict().items()}
            first, peak, results = _first_step(step, call, start, device)
        except RuntimeError as error:
            if name == "eager":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            missing.append(about | {"variant": name, "reason": reason[:300]})
            continue
        right = right or results
        errors = _errors(results, right)
        rows[name] = about | {"variant": name, "peak_bytes": peak}
        rows[name] |= {"error": _short(errors["losses"]), "problems": _problems(errors, precision)}
        rows[name]["errors"] = {what: _short(error) for what, error in errors.items()}
        if name.startswith("compile"):
            rows[name] |= {"mode": name.split(", ")[1], "compile_seconds": round(first, 1)}
        calls[name] = call
    _measure_times(rows, calls, device, seconds, until)
    for row in rows.values():
        row["images_per_second"] = round(1e6 * images / row["us"][1], 1)
    return list(rows.values()), missing


def _first_step(
    step: HybridStep, call: Call, start: Mapping[str, Tensor], device: torch.device
) -> tuple[float, int, dict[str, Tensor]]:
    """Seconds of the first call; peak memory and results of one from the state `start`, seed 1."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    for _ in range(WARM_UP - 1 if device.type == "cuda" else 0):
        call()
    step.load_state_dict(dict(start))
    torch.manual_seed(1)
    terms: list[Any] = []
    peak = peak_bytes(lambda: terms.append(call()), device)  # of a graph: the call that captures
    return seconds, peak, _results(step, start, terms[0])


def _measure_times(
    rows: Mapping[str, Row],
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    until: float,
) -> None:
    """Adds to the rows times of a step, in all and by phase, and on a GPU what it is busy with."""
    steps = calls_in_one(device)
    timed = {name: several(call, device) for name, call in calls.items()}
    for name, us in in_turns(timed, seconds, until).items():
        rows[name] |= times([t / steps for t in us])
    clocks = {name: PhaseClock(device) for name in calls}
    longest = max(row["us"][1] for row in rows.values()) / 1e6
    rounds = rounds_for(longest, seconds, 3, most=10)
    for _ in range(rounds):
        for name, call in calls.items():
            with clocks[name]:
                call()
    for name in calls:
        phases = {p: 1e3 * s / rounds for p, (_, s) in clocks[name].times().items()}
        rows[name]["phases_ms"] = {p: round(ms, 4) for p, ms in phases.items()}
        if device.type == "cuda":
            kernels, busy = device_work(_events(timed[name]))
            rows[name]["kernels"] = round(kernels / steps)
            rows[name]["busy"] = round(busy / steps / rows[name]["us"][1], 3)


def _events(call: Call) -> list[Mapping[str, Any]]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def device_work(events: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """Among a profile's events the number of kernels, and µs in which the GPU ran at least one or copied."""
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, end = 0.0, -math.inf
    for event in sorted(work, key=lambda e: e["ts"]):
        stops = event["ts"] + event["dur"]
        busy += max(0.0, stops - max(end, event["ts"]))
        end = max(end, stops)
    return sum(e["cat"] == "kernel" for e in work), busy


def _problems(errors: Mapping[str, float], precision: str) -> list[str]:
    allowed = {name: _ALLOWED[precision][name.split()[0]] for name in errors}
    return [
        f"{name} are off by {error:.1e}, allowed is {allowed[name]:.1e}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]


def _short(error: float) -> float:
    return float(f"{error:.2g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data", nargs="+", choices=[w.data for w in FLOWS])
    add("--compile", nargs="+", dest="modes", default=[], metavar="MODE", help="torch.compile's")
    add("--precision", choices=_ALLOWED, default="fp32")
    add("--seconds", type=float, default=_SECONDS, help="of a variant's turn")
    add("--minutes", type=float, default=math.inf, help="begin no turn and no data set after that")
    add("--out", type=Path, help="results file; default benchmarks/results/step-<device>.json")
    args = parser.parse_args(argv)
    until = time.perf_counter() + 60 * args.minutes
    device, out = torch.device(args.device), args.out or RESULTS / f"step-{args.device}.json"
    if device.type == "cuda":
        set_cudnn()
    rows: list[Row] = []
    missing: list[Row] = []
    results: Row = {
        "command": command("benchmarks.step", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "precision": args.precision,
        "rows": rows,
        "not_measured": missing,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"modes": args.modes, "precision": args.precision, "seconds": args.seconds}
    for workload in FLOWS:
        if args.data and workload.data not in args.data:
            continue
        if time.perf_counter() > until:
            missing.append({"data": workload.data, "reason": f"{args.minutes:g} minutes were up"})
        else:
            new, failed = measure(workload, device, **options, until=until)
            rows += new
            missing += failed
            shown = {r["variant"]: round(r["us"][1] / 1e3, 2) for r in new}
            print(workload.data, shown, flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [f"wrong: {r['data']} {r['variant']}: {p}" for r in rows for p in r["problems"]]
    absent = [f"not measured: {' '.join(map(str, row.values()))}" for row in missing]
    print("\n".join([*wrong, *absent, f"results: {out}"]))
    return 1 if wrong or absent else 0


if __name__ == "__main__":
    sys.exit(main())
