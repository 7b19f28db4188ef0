"""Measure whole flows and whole training steps: `python -m benchmarks.flows`.

The flows of the presets at the batch sizes of the thesis: likelihood (forward and backward), sampling,
and sampling as the generator's loss uses it (with backward); and the hybrid step. Variants take turns in
one run. Exit status: 0 if every variant was right.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conditioners import matmul_rate
from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import (
    command,
    in_turns,
    machine,
    peak_bytes,
    quantiles,
    relative_errors,
    times,
    typical_errors,
    verdict,
)
from benchmarks.step import build_step
from benchmarks.workloads import CLASSES, FLOWS, Workload, stir
from hybridflow.config import Precision
from hybridflow.flow import MultiScaleFlow
from hybridflow.kernels import fuse, native
from hybridflow.networks import build_model
from hybridflow.precision import arithmetic

__all__ = ["FLOWS", "Workload", "main"]

_SECONDS = 1.0  # of a turn
_DRAWS = 3
_HIGH = ", high"  # ends the names of variants with products of this precision in a run of fp32
# Errors that are allowed, whatever eager's: of outputs those of a type, of gradients, which jump, and of the
# step's loss.
_ALLOWED: dict[Precision, tuple[torch.dtype, float, float]] = {
    "fp32": (torch.float32, 1e-3, 1e-4),
    "high": (torch.float16, 1e-2, 1e-3),
    "bf16": (torch.bfloat16, 0.1, 2e-2),
}
_TASKS = ("likelihood", "sampling", "sampling with backward")
_COMPILED = _TASKS[:2]  # the third would take as long to compile as the first, and is as much work
_CPU = torch.device("cpu")

Call = Callable[[], Any]
Row = dict[str, Any]


# --- flows ---------------------------------------------------------------------------------------


def _flow(workload: Workload) -> MultiScaleFlow:
    torch.manual_seed(0)
    flow = build_model(workload.config.flow, torch.Size(workload.shape), CLASSES).flow
    assert isinstance(flow, MultiScaleFlow)
    stir(flow)
    return flow


class _Pass:
    """A task of a flow. What a call does is measured: the outputs, and where there is a backward the
    gradients, as autograd gives them."""

    def __init__(self, task: str, flow: nn.Module, operands: Mapping[str, Tensor]) -> None:
        names = ("x",) if task == "likelihood" else ("z_k", "z_n")
        self._flow = flow
        self._inputs = {name: operands[name].detach().requires_grad_() for name in names}
        self._of = self._inputs | dict(flow.named_parameters())  # what has a gradient
        self._weights = [v for name, v in operands.items() if name.rpartition(" ")[0] == task]

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with torch.set_grad_enabled(bool(self._weights)):
            out = self._flow(*self._inputs.values())
        out = out if isinstance(out, tuple) else (out,)
        if not self._weights:
            return out, ()
        weights = [weight.to(t) for weight, t in zip(self._weights, out, strict=True)]
        return out, torch.autograd.grad(out, list(self._of.values()), weights)

    def results(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """By name, gradients of parameters of one kind end to end."""
        kinds: dict[str, list[Tensor]] = {}
        if grads:
            for name, grad in zip(self._of, grads, strict=True):
                kinds.setdefault(".".join(name.split(".")[-2:]), []).append(grad.flatten())
        return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {
            f"gradient of {kind}": torch.cat(parts) for kind, parts in kinds.items()
        }


def _precision_of(variant: str, precision: Precision) -> Precision:
    return "high" if variant.endswith(_HIGH) else precision


class _Sampler(nn.Module):
    """A flow's inverse as the forward of a module, for torch.compile."""

    def __init__(self, flow: MultiScaleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z_k: Tensor, z_n: Tensor) -> Tensor:
        return self.flow.inverse(z_k, z_n)


def _operands(workload: Workload, flow: MultiScaleFlow, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    batch, (d_k, d_n) = workload.batch, flow.latent_sizes
    sizes = ((batch, d_k), (batch, d_n), (batch,))
    return {
        "x": normal(batch, *workload.shape),
        "z_k": normal(batch, d_k),
        "z_n": normal(batch, d_n),
        "sampling with backward 0": normal(batch, *workload.shape),
    } | {f"likelihood {i}": normal(*size) for i, size in enumerate(sizes)}


def _has_high(precision: Precision) -> bool:
    """Whether there is something to measure for products of that precision: PyTorch's own do not change."""
    return precision == "fp32" and native.available() and native.load().tiles is not None


def _variants(
    workload: Workload, task: str, mode: str | None, precision: Precision
) -> dict[str, nn.Module]:
    plain = _flow(workload)
    last, fused, lean = (copy.deepcopy(plain) for _ in range(3))
    last.to(memory_format=torch.channels_last)
    fuse(fused)
    fuse(lean, constant_memory=True)
    flows = {"eager": plain, "eager, channels-last": last, "fused": fused}
    if _has_high(precision):
        flows["fused" + _HIGH] = fused
    if task == "likelihood":
        flows["fused, constant memory"] = lean
    modules: dict[str, nn.Module] = {
        name: flow if task == "likelihood" else _Sampler(flow) for name, flow in flows.items()
    }
    if mode is not None:
        modules["compile"] = torch.compile(modules["eager"], mode=mode, fullgraph=True)
    return modules


def _channels_last(operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = torch.channels_last
    return {k: v.contiguous(memory_format=last) if v.dim() == 4 else v for k, v in operands.items()}


def measure_flow(
    workload: Workload, task: str, mode: str | None, seconds: float, precision: Precision
) -> list[Row]:
    """A row for each variant: times in µs (p20, p50, p80), peak memory, and what is wrong with it.

    Outputs are compared element by element, gradients in the Euclidean norm. They jump where the argument
    of a ReLU passes zero, on which side of it rounding decides: one jump among a small net's units is a
    thousandth of its gradients. Hence the most exact of three draws counts, and as in a large net all have
    some, a thousandth is allowed. (Gradients without jumps are compared by benchmarks.conditioners.)
    """
    torch.compiler.reset()
    modules = _variants(workload, task, mode, precision)
    flow = _flow(workload)
    double = modules["eager"] if task == "likelihood" else _Sampler(flow)
    double = copy.deepcopy(double).double()
    errors: dict[str, dict[str, float]] = {}
    for seed in range(1 if task == "sampling" else _DRAWS):
        operands = _operands(workload, flow, seed)
        wide = _Pass(task, double, {k: v.double() for k, v in operands.items()})
        exact = wide.results(*wide())
        given = {"eager, channels-last": _channels_last(operands)}
        passes = {
            name: _Pass(task, module, given.get(name, operands)) for name, module in modules.items()
        }
        calls: dict[str, Call] = {
            name: arithmetic(_precision_of(name, precision), _CPU)(one.__call__)
            for name, one in passes.items()
        }
        for name, call in calls.items():
            start = time.perf_counter()
            got = call()
            if seed == 0 and name == "compile":
                compile_seconds = round(time.perf_counter() - start)
            found = _errors(passes[name].results(*got), exact)
            errors[name] = min(errors.get(name, found), found, key=lambda e: max(e.values()))
    peaks = {} if task == "sampling" else {n: peak_bytes(c, _CPU) for n, c in calls.items()}
    rows, flops = [], workload.flops(task)
    for name, us in in_turns(calls, seconds).items():
        measure = None if name == "eager" else errors["eager"]
        rows.append(
            {"data": workload.data, "batch": workload.batch, "task": task, "variant": name}
            | times(us)
            | {"peak_bytes": peaks.get(name), "error": float(f"{max(errors[name].values()):.2g}")}
            | {"problems": _problems(errors[name], measure, _precision_of(name, precision))}
            | {"gflop_s": round(flops / quantiles(us)[1] / 1e3, 1)}
            | ({"mode": mode, "compile_seconds": compile_seconds} if name == "compile" else {})
        )
    return rows


def _errors(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    outputs = {name: value for name, value in exact.items() if name.startswith("output")}
    gradients = {name: value for name, value in exact.items() if name not in outputs}
    return relative_errors(got, outputs) | typical_errors([got], [gradients])


def _problems(
    errors: Mapping[str, float], of_eager: Mapping[str, float] | None, precision: Precision
) -> list[str]:
    """What is wrong: outputs as everywhere, gradients above four times eager's error and their jumps."""
    dtype, jumps, _ = _ALLOWED[precision]
    small = [name for name in errors if name.startswith("gradient") and errors[name] <= jumps]
    return verdict({n: e for n, e in errors.items() if n not in small}, dtype, of_eager)


# --- the hybrid step -----------------------------------------------------------------------------


def measure_step(workload: Workload, seconds: float, precision: Precision) -> list[Row]:
    """A row for eager and for fused: times in µs; the first loss of both has to agree."""
    names = ["eager", "fused", *(["fused" + _HIGH] * _has_high(precision))]
    steps = {
        name: build_step(
            workload, _CPU, fused=name != "eager", precision=_precision_of(name, precision)
        )
        for name in names
    }
    losses = {}
    for name, step in steps.items():
        torch.manual_seed(1)
        losses[name] = step()["loss_g"].item()
    batch = workload.config.batch_labelled + workload.config.batch_unlabelled
    rows = []
    for name, us in in_turns(steps, seconds).items():
        error = abs(losses[name] / losses["eager"] - 1)
        allowed = _ALLOWED[_precision_of(name, precision)][-1]
        wrong = [f"the flow's loss is off by {error:.1e}, allowed is {allowed}"]
        rows.append(
            {"data": workload.data, "batch": batch, "task": "training step", "variant": name}
            | times(us)
            | {"error": float(f"{error:.2g}"), "problems": [] if error < allowed else wrong}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.flows", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default flows-cpu.json, flows-cpu-bf16.json")
    parser.add_argument("--data", nargs="*", choices=[w.data for w in FLOWS])
    parser.add_argument("--compile", dest="mode", metavar="MODE", help="torch.compile's mode, too")
    parser.add_argument("--batch", type=int, help="instead of the thesis's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of a variant's turn")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    results = {
        "command": command("benchmarks.flows", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(_CPU),
        "precision": args.precision,
        "rows": rows,
    }
    out = args.out or RESULTS / (
        "flows-cpu.json" if args.precision == "fp32" else "flows-cpu-bf16.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for workload in FLOWS:
        if args.data and workload.data not in args.data:
            continue
        for task in (*_TASKS, "training step"):
            rate = matmul_rate()
            if task == "training step":
                new = measure_step(workload, args.seconds, args.precision)
            else:
                sized = replace(workload, batch=args.batch or workload.batch)
                mode = args.mode if task in _COMPILED else None
                new = measure_flow(sized, task, mode, args.seconds, args.precision)
            rows += [row | {"matmul_gflop_s": rate} for row in new]
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(workload.data, task, {r["variant"]: r["us"][1] / 1e3 for r in new}, flush=True)
    wrong = [
        f"wrong: {r['data']} {r['task']} {r['variant']}: {p}" for r in rows for p in r["problems"]
    ]
    print("\n".join([*wrong, f"results: {out}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
