"""The hybrid step as one CUDA graph, as it must be on a GPU: what `gpu_workers.py graph` checks.

Algorithms are deterministic here, so that a captured step has to give what an uncaptured one gives
bit for bit: losses, weights, optimiser states, batches and random numbers. Rows are dictionaries
with "check", "passed" and "problems".
"""

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.step import build_step
from benchmarks.workloads import FLOWS
from hybridflow import checkpoint
from hybridflow.capture import CapturedStep, trace
from hybridflow.config import PRESETS, Config, Precision
from hybridflow.kernels.swap import _choices
from hybridflow.run import RunFolder
from hybridflow.step import HybridStep
from hybridflow.trainer import Trainer, resume, train

__all__ = ["check_refusal", "check_resumed", "check_step", "compare", "deterministic"]

_STEPS = 100
_BEST = PRESETS["digits-best"]  # with strong views and an averaged teacher
_TERMS = replace(_BEST.terms, curriculum=True)
_RUN = replace(
    _BEST, terms=_TERMS, steps=60, log_every=10, eval_every=20, save_every=25, fused=True
)

Row = dict[str, Any]
Step = Callable[[], Mapping[str, Tensor]]
Run = tuple[Tensor, dict[str, Tensor]]


def check_step(
    data: str, precision: Precision, variant: str, device: torch.device
) -> Iterator[Row]:
    """A row for each property of a preset's step on random images.

    Variants: "unfused", "fused", and "one op", fused with every conditioner in one op with its coupling.
    """
    kind = {"data": data, "precision": precision, "variant": variant}
    workload = next(w for w in FLOWS if w.data == data)
    step = build_step(workload, device, fused=variant != "unfused", precision=precision)
    with _choices.using(variant == "one op"), deterministic() as caught:
        found = compare(step, lambda function: CapturedStep(function, device))
        texts = {str(warning.message).splitlines()[0][:200] for warning in caught}
        without = sorted(text for text in texts if "deterministic" in text)
        yield kind | found | {"without_deterministic_algorithm": without}
        yield kind | _row("no wait for the device", waits(step))
        first, second = trace(step), trace(step)
        problems = [f"obstacle: {obstacle}" for obstacle in second.obstacles]
        if first.operations != second.operations:
            problems.append("two steps are not the same operations")
        yield kind | _row("trace", problems) | {"operations": len(second.operations)}


@contextlib.contextmanager
def deterministic() -> Iterator[list[warnings.WarningMessage]]:
    """While entered, algorithms do the same twice; yields the warnings, also of those that have none.

    cuDNN measures its algorithms with and without a graph: choices by a heuristic may be others.
    Fresh memory holds NaN.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        try:
            yield caught
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]


def _row(check: str, problems: list[str]) -> Row:
    return {"check": check, "passed": not problems, "problems": problems}


# --- captured and not ----------------------------------------------------------------------------


def compare(step: HybridStep, capture: Callable[[Step], Step], steps: int = _STEPS) -> Row:
    """Whether captured steps are the uncaptured ones, from the same state and random state.

    Where they are not, two uncaptured runs say whether the capture is to blame.
    """
    start = _copy(step.state_dict()), _random_state(step.device)
    plain = _run(step, step, *start, steps)
    captured = _run(step, capture(step), *start, steps)
    differing = _differing(plain, captured)
    problems = [f"{name}: differs" for name in differing[:5]]
    if not all(bool(t.isfinite().all()) for t in (*plain[1].values(), plain[0], captured[0])):
        problems.append("not everything is finite")
    row = {"steps": steps, "differing": len(differing)}
    if differing:
        again = _run(step, step, *start, steps)
        row |= {"largest_difference": _largest_difference(plain, captured)}
        row |= {"of_two_uncaptured_runs": _largest_difference(plain, again)}
        row |= {"first_differing_step": _first_difference(plain[0], captured[0])}
    return _row("captured equals uncaptured", problems) | row


def _run(
    step: HybridStep,
    call: Step,
    state: dict[str, Tensor],
    random: dict[str, Tensor],
    steps: int,
) -> Run:
    """Every loss of `steps` calls, (steps, terms), and the state after them."""
    step.load_state_dict(state)
    torch.set_rng_state(random["cpu"])
    if step.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], step.device)
    losses = torch.stack([torch.stack(list(call().values())) for _ in range(steps)])
    return losses, _copy(step.state_dict()) | _random_state(step.device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _differing(a: Run, b: Run) -> list[str]:
    names = [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]
    return names if torch.equal(a[0], b[0]) else ["losses", *names]


def _largest_difference(a: Run, b: Run) -> dict[str, float]:
    """Of losses and of floating states, relative to the largest value of each."""
    pairs = [("losses", a[0], b[0])]
    pairs += [("state", v, b[1][n]) for n, v in a[1].items() if v.is_floating_point()]
    largest: dict[str, float] = {}
    for name, x, y in pairs:
        size = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        difference = float((x - y).abs().max() / size)
        largest[name] = max(largest.get(name, 0.0), float(f"{difference:.3g}"))
    return largest


def _first_difference(a: Tensor, b: Tensor) -> int | None:
    rows = (a != b).any(1).nonzero()
    return int(rows[0]) + 1 if len(rows) else None


def waits(call: Callable[[], Any]) -> list[str]:
    """What PyTorch says where a call waits for the device; nothing if it does not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


# --- refusal, and a resumed run ------------------------------------------------------------------


def check_refusal(device: torch.device) -> Row:
    """A step that reads a loss is refused by name; the device, its random numbers and captures work."""
    step = build_step(FLOWS[-1], device, fused=True)
    refused = CapturedStep(lambda: step()["loss_g"].item(), device)
    problems = []
    try:
        for _ in range(5):
            refused()
        problems.append("a step that reads a loss was captured")
    except RuntimeError as error:
        if "_local_scalar_dense.default reads a value" not in str(error):
            problems.append(f"the error does not name the operation: {error}"[:300])
    accepted = CapturedStep(step, device)
    for _ in range(5):
        losses = accepted()
    if not all(bool(loss.isfinite()) for loss in losses.values()):
        problems.append("steps after the refusal are not finite")
    return _row("refusal", problems)


def check_resumed(folder: Path, precision: Precision, device: torch.device) -> Row:
    """A captured run that is stopped half-way and resumed ends as an uninterrupted one."""
    config = replace(_RUN, precision=precision, device=str(device))
    whole, half = RunFolder(folder / "whole"), RunFolder(folder / "half")
    with deterministic():
        statuses = [train(config, whole), _train_half(config, half), resume(config, half)]
    problems = []
    if statuses != [0, 128 + signal.SIGTERM, 0]:
        problems.append(f"exit statuses were {statuses}")
    (a, _), (b, _) = (checkpoint.load(run.checkpoint) for run in (whole, half))
    problems += [f"{name}: differs" for name in a if not torch.equal(a[name], b[name])]
    return _row("resumed", problems[:5]) | {"precision": precision, "steps": config.steps}


def _train_half(config: Config, folder: RunFolder) -> int:
    one_step = Trainer._one_step

    def stop_half_way(trainer: Trainer) -> None:
        one_step(trainer)
        if trainer.done == config.steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Trainer, "_one_step", stop_half_way):
        return train(config, folder)
