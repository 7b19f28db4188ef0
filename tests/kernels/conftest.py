"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when it is first imported, so it is set here, before any test module
of this folder. Tests that compile kernels run in a subprocess without it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hybridflow.kernels import _backend, native

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

ISAS = native.load().supported if native.available() else ()


def _needs(backend: str) -> None:
    if backend == "triton":
        triton = pytest.importorskip("triton")
        if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
            pytest.fail("triton was imported before tests/kernels/conftest.py could set it up")
    if backend.startswith("native") and not native.available():
        pytest.skip(native.why_missing())


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every op by one implementation: "reference", "triton" or "native-<instruction set>"."""
    name: str = request.param
    _needs(name)
    backend, _, isa = name.partition("-")
    with _backend.using(backend), native.load().using(isa) if isa else nullcontext():  # type: ignore[arg-type]
        yield backend


@pytest.fixture
def device(implementation: str) -> str:
    """Where the implementation's tensors live."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def operands() -> Callable[..., list[Tensor]]:
    """Random x, params, log_scale, bias, gain and log_det; none of them is near zero throughout."""

    def make(
        *shape: int,
        transformed: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> list[Tensor]:
        samples, channels, *spatial = shape
        moved = channels // 2 if transformed is None else transformed
        generator = torch.Generator().manual_seed(sum(shape))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        values = [
            normal(*shape),
            normal(samples, 2 * moved, *spatial),
            0.3 * normal(channels),
            normal(channels),
            0.7 * normal(moved),
            normal(samples),
        ]
        return [v.to(device, dtype).requires_grad_() for v in values]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`implementation` runs over all that compute in the type a test is marked with."""
    if "implementation" in metafunc.fixturenames:
        exact = metafunc.definition.get_closest_marker("float64") is not None
        names = ["reference", "triton"] if exact else [f"native-{i}" for i in ISAS] + ["triton"]
        metafunc.parametrize("implementation", names, indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "float64: the test computes in float64")
