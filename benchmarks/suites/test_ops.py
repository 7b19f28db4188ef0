"""Every operation, fused, in eager PyTorch and compiled, and where there is one in other libraries."""

from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.measuring import copy_call
from benchmarks.suites.turns import Settings, ready


@pytest.mark.parametrize("block", range(3))
def test_copy(benchmark: Any, settings: Settings, block: int) -> None:
    """What the rates are a share of."""
    call, calls, moved = copy_call(settings.device, settings.quick)
    benchmark.group = "copy"
    benchmark.extra_info.update(suite="copy", calls=calls, bytes=moved, block=block)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)


def test_op(
    benchmark: Any, settings: Settings, case: Case, variant: str, launch: str, block: int
) -> None:
    if variant in case.peers and variant != "FlowGMM":
        pytest.importorskip(variant)
    state = ready(case, settings)
    errors, problems = state.judged(variant)
    call, calls, rounds = state.timed(variant, launch)
    benchmark.group = case.id
    benchmark.extra_info.update(
        suite="ops",
        block=block,
        calls=calls,
        bytes=case.moved(case),
        op=case.op,
        note=case.note,
        shape=case.shape,
        dtype=case.type_name,
        direction=case.direction,
        variant=variant,
        launch=launch,
        implementation=state.implementation if variant == "fused" else "pytorch",
        sets=len(state.sets),
        errors=errors,
        problems=problems,
    )
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=min(1, rounds - 1))
    assert not problems, "; ".join(problems)
