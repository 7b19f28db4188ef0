"""Options of the suites, and the order in which variants take turns."""

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, QUICK_CASES, Case
from benchmarks.measuring import machine
from benchmarks.suites.turns import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hybridflow benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption(
        "--quick", action="store_true", help="tiny shapes, few rounds: only a rehearsal"
    )


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    # In TF32 a convolution's last digits hang on a rounding of its input: nothing could be compared.
    torch.backends.cudnn.allow_tf32 = False
    return Settings.of(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Variants of one case take turns, block after block, before the next case begins."""
    if metafunc.function.__name__ != "test_op":
        return
    settings = Settings.of(metafunc.config)
    cases = QUICK_CASES if settings.quick else CASES
    turns = [
        pytest.param(case, variant, launch, block, id=f"{case.id}-{variant}-{launch}-{block}")
        for case in cases
        for block in range(settings.blocks)
        for variant in _variants(case, settings)
        for launch in settings.launches
        if launch == "python" or variant not in case.peers
    ]
    metafunc.parametrize(("case", "variant", "launch", "block"), turns)


def _variants(case: Case, settings: Settings) -> list[str]:
    names = list(case.variants)
    if settings.quick and case.op != "standard_normal_log_prob":
        names.remove("compile")  # a compilation takes seconds
    return names


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["hybridflow"] = machine(torch.device(config.getoption("device")))
