"""How much is measured, and a case made ready: operands, variants, and whether each is right."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases import Bound, Case, step
from benchmarks.measuring import (
    cache_bytes,
    calls_in_turn,
    captured,
    relative_errors,
    rounds_for,
    typical_errors,
    verdict,
    verdict_16_bit,
)
from hybridflow import kernels
from hybridflow.kernels import _backend

__all__ = ["Ready", "Settings", "ready"]


_DRAWS = 8  # that a typical error is taken over
_LONGEST_ROUND = 0.25  # seconds
_FEWEST_CALLS = 8  # of a round on a GPU


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        device: where.
        quick: a rehearsal: few rounds of tiny shapes.
        blocks: how often every variant has its turn.
        seconds: a turn's length.
        least: the fewest rounds of a turn.
    """

    device: torch.device
    quick: bool
    blocks: int
    seconds: float
    least: int

    @classmethod
    def of(cls, config: pytest.Config) -> "Settings":
        device, quick = torch.device(config.getoption("device")), config.getoption("quick")
        if quick:
            return cls(device, quick, 2, 0.005, 3)
        if device.type == "cuda":  # less noise, and a lent card has little time
            return cls(device, quick, 3, 0.05, 3)
        return cls(device, quick, 5, 0.25, 4)

    @property
    def launches(self) -> tuple[str, ...]:
        """From Python, and on a GPU also by a CUDA graph."""
        return ("python", "graph") if self.device.type == "cuda" else ("python",)

    def calls(self, calls: Sequence[Callable[[], Any]]) -> Sequence[Callable[[], Any]]:
        """On a GPU, where a round makes every call: only as many as a round has time for."""
        if self.device.type != "cuda":
            return calls
        for call in calls[:2]:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        return calls[: max(_FEWEST_CALLS, int(_LONGEST_ROUND / once))]

    def rounds(self, call: Callable[[], Any]) -> int:
        """Rounds of a turn, after two calls to warm up."""
        call()
        start = time.perf_counter()
        call()
        return rounds_for(time.perf_counter() - start, self.seconds, self.least)


class Ready:
    """A case on enough sets of operands to outgrow three times the cache."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        first = case.operands(0, settings.device)
        wanted = 1 + 3 * cache_bytes(settings.device) // first.nbytes
        count = 3 if settings.quick else max(_DRAWS, wanted)
        self.sets = [first, *(case.operands(seed, settings.device) for seed in range(1, count))]
        self._bound: dict[str, list[Bound]] = {}
        self._timed: dict[tuple[str, str], tuple[Callable[[], Any], int, int]] = {}
        self._judged: dict[str, tuple[dict[str, float], list[str]]] = {}
        self._typical: dict[str, dict[str, float]] = {}
        draws = _DRAWS if case.dtype.itemsize == 2 else 1
        self._exact = [] if case.check else [case.exact(s) for s in self.sets[:draws]]

    @property
    def implementation(self) -> str:
        """What the fused op runs by."""
        return _backend.choose(*(t for t in self.sets[0].given.values() if t.is_floating_point()))

    def bound(self, variant: str) -> list[Bound]:
        if variant not in self._bound:
            function = None if variant in self.case.peers else self.case.function(variant)
            self._bound[variant] = [self.case.bind(variant, s, function) for s in self.sets]
        return self._bound[variant]

    def timed(self, variant: str, launch: str) -> tuple[Callable[[], Any], int, int]:
        """What a round calls, how many calls of the op that is, and rounds in a turn."""
        if (variant, launch) not in self._timed:
            pairs = zip(self.bound(variant), self.sets, strict=True)
            calls = self.settings.calls(
                [functools.partial(step, bound, s.incoming) for bound, s in pairs]
            )
            graph = launch == "graph"
            call = captured(calls) if graph else calls_in_turn(calls, self.settings.device)
            count = 1 if self.settings.device.type == "cpu" else len(calls)
            self._timed[variant, launch] = call, count, self.settings.rounds(call)
        return self._timed[variant, launch]

    def judged(self, variant: str) -> tuple[dict[str, float], list[str]]:
        """Relative errors of the variant's results and gradients, and what is wrong with it."""
        if variant not in self._judged:
            self._judged[variant] = self._judge(variant)
        return self._judged[variant]

    def _judge(self, variant: str) -> tuple[dict[str, float], list[str]]:
        got = [self._results(variant, i) for i in range(max(1, len(self._exact)))]
        if self.case.check is not None:
            errors, problems = self.case.check(self.case, self.sets[0], got[0])
            return errors, [*problems, *verdict(errors, torch.float32, None)]
        errors = relative_errors(got[0], self._exact[0])
        of_eager = None if variant == "eager" else self.judged("eager")[0]
        problems = verdict(errors, self.case.dtype, of_eager)
        if self.case.dtype.itemsize == 2:
            self._typical[variant] = typical_errors(got, self._exact)
            measure = self._typical["eager"]
            problems += verdict_16_bit(self._typical[variant], self.case.dtype, measure)
        if variant == "fused" and self.implementation == "reference":
            problems.append("it ran the plain reference, no kernel")
        return errors, problems

    def _results(self, variant: str, index: int) -> dict[str, torch.Tensor]:
        bound = self.bound(variant)[index]
        return self.case.named(*step(bound, self.sets[index].incoming))


@functools.lru_cache(maxsize=1)
def ready(case: Case, settings: Settings) -> Ready:
    """The case made ready; the one before it is let go."""
    if not hasattr(kernels, case.op):
        pytest.skip(f"hybridflow.kernels has no {case.op}")
    torch.compiler.reset()  # else a second shape compiles for any shape
    torch.manual_seed(0)
    return Ready(case, settings)
