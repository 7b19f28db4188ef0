"""What `gpu.py` runs in processes of its own: `python -m benchmarks.gpu_workers NAME ARGUMENTS`.

Each result is printed as soon as it is known, as a line of JSON.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case, step
from benchmarks.gpu_checks import check, every_case, results_of, small_cases
from benchmarks.measuring import captured, quantiles, relative_errors, verdict
from hybridflow.kernels import _backend

_CUDA = torch.device("cuda")


def _print_row(row: Mapping[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def check_cases(dtype: str, share: str, shares: str) -> None:
    """Check a share of all cases of one type; a row for each, and one at the end."""
    torch.set_num_threads(1)  # many of these run side by side
    torch.backends.cudnn.allow_tf32 = False  # the chain's conditioners are to be exact
    if (chosen := _backend.choose(torch.empty(0, device=_CUDA))) != "triton":
        raise SystemExit(f"on this machine operations run by {chosen}, not by triton")
    for case in every_case(getattr(torch, dtype))[int(share) :: int(shares)]:
        try:
            row = check(case, _CUDA)
        except Exception as error:  # one case that does not compile hides no other
            problems = [_brief(error)]
            row = {"op": case.op, "case": case.id, "dtype": dtype, "passed": False}
            row["problems"] = problems
        _print_row(row)


def exercise() -> None:
    """Run every kernel at the smallest sizes, without looking at results."""
    # Each tensor an allocation of its own: an access past its end is then seen.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        for case in small_cases(dtype):
            results_of(case, case.function("eager"), case.operands(0, _CUDA))
            count += 1
    torch.cuda.synchronize()
    _print_row({"exercised": count})


# --- torch.compile at its best -------------------------------------------------------------------

_ROUNDS = 50


def autotune() -> None:
    """The coupling at two shapes beside torch.compile in mode max-autotune: a row for each variant."""
    for case in [c for c in CASES if c.op == "actnorm_coupling" and not c.note][:2]:
        for row in _compared(case):
            _print_row(row)


def _compared(case: Case) -> list[dict[str, Any]]:
    """Times within CUDA graphs, which "max-autotune" would make itself: all variants alike."""
    from benchmarks.suites.turns import Ready, Settings

    torch.compiler.reset()
    state = Ready(case, Settings(_CUDA, quick=False, blocks=1, seconds=0.05, least=3))
    tuned = torch.compile(case.plain, fullgraph=True, mode="max-autotune-no-cudagraphs")
    bounds = [case.bind("max-autotune", operands, tuned) for operands in state.sets]
    got = case.named(*step(bounds[0], state.sets[0].incoming))
    errors = relative_errors(got, case.exact(state.sets[0]))
    problems = {"max-autotune": verdict(errors, case.dtype, state.judged("eager")[0])}
    pairs = zip(bounds, state.sets, strict=True)
    calls: dict[str, Callable[[], Any]] = {
        "max-autotune": captured([partial(step, bound, s.incoming) for bound, s in pairs])
    }
    counts = {"max-autotune": len(state.sets)}
    for variant in ("eager", "compile", "fused"):
        problems[variant] = state.judged(variant)[1]
        calls[variant], counts[variant], _ = state.timed(variant, "graph")
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    for _ in range(_ROUNDS):
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            times[variant].append(1e6 * (time.perf_counter() - start) / counts[variant])
    return [
        {"op": case.op, "shape": list(case.shape), "dtype": case.type_name, "launch": "graph"}
        | {"variant": variant, "us": [round(us, 3) for us in quantiles(times[variant])]}
        | {"problems": problems[variant]}
        for variant in calls
    ]


# --- the captured step ---------------------------------------------------------------------------

_VARIANTS = (("bf16", "fused"), ("bf16", "one op"), ("fp32", "fused"), ("fp32", "one op"))
_UNFUSED = ("fp32", "unfused")


def graph(data: str) -> None:
    """The step of a preset's networks as a CUDA graph: a row for each property, and of the smallest
    networks' step also layer by layer."""
    from benchmarks.gpu_graph import check_step

    variants = [*_VARIANTS, *([_UNFUSED] if data == "digits" else [])]
    for precision, variant in variants:
        kind = {"data": data, "precision": precision, "variant": variant}
        _print_rows(kind, lambda p=precision, v=variant: check_step(data, p, v, _CUDA))


def graph_run(folder: str) -> None:
    """A step that cannot be captured, and runs that are stopped and resumed: a row for each."""
    from benchmarks.gpu_graph import check_refusal, check_resumed

    _print_rows({}, lambda: [check_refusal(_CUDA)])
    for precision in ("bf16", "fp32"):
        where = Path(folder, precision)
        _print_rows({}, lambda p=precision, w=where: [check_resumed(w, p, _CUDA)])


def _print_rows(kind: Mapping[str, Any], rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
    try:
        for row in rows():
            _print_row(row)
    except Exception as error:  # what one check does not survive hides no other
        failure = {"check": "every check", "passed": False, "problems": [_brief(error)]}
        _print_row({**kind, **failure})


# --- training ------------------------------------------------------------------------------------


def train(*arguments: str) -> None:
    """`python -m hybridflow.train`, which then also prints its peak GPU memory."""
    sys.argv = ["hybridflow.train", *arguments]
    try:
        runpy.run_module("hybridflow.train", run_name="__main__", alter_sys=True)
    finally:
        _print_row({"peak_memory_bytes": torch.cuda.max_memory_allocated()})


_WORKERS: dict[str, Callable[..., None]] = {
    "autotune": autotune,
    "check": check_cases,
    "exercise": exercise,
    "graph": graph,
    "graph-run": graph_run,
    "train": train,
}

if __name__ == "__main__":
    _WORKERS[sys.argv[1]](*sys.argv[2:])
