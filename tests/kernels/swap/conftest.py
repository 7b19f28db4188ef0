"""The check that every library's models go through: nothing changes when they are fused."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridflow.kernels import _backend, fuse, native, unfuse

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=("reference", "chosen"))
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The reference, and what the CPU runs by itself."""
    if not native.available():
        pytest.skip(native.why_missing())
    with _backend.using("reference") if request.param == "reference" else nullcontext():
        yield


def randomised(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """No parameter is at its initial value, which is often zero; the first stays the same size."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return model


@pytest.fixture
def unchanged_by_fuse(backend: None) -> Callable[..., None]:
    """Checks a model before, while and after it is fused.

    `run(model, x)` returns tensors of both directions; `layers` is how many modules are swapped.
    """

    def check(model: nn.Module, x: Tensor, run: Callable[..., list[Tensor]], layers: int) -> None:
        exact: list[Tensor] = []
        randomised(model)
        for dtype in torch.float64, torch.float32:
            model, x = model.to(dtype), x.to(dtype)
            keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
            want = with_gradients(model, x, run)
            exact = exact or want
            report = fuse(model)
            assert len(report.swapped) == layers, report
            assert list(model.state_dict()) == keys
            assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))
            compare(with_gradients(model, x, run), want, exact)
            assert_copies(model, x, run)
            unfuse(model)
            assert [type(m) for m in model.modules()] == types
            again = with_gradients(model, x, run)
            assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))

    return check


def with_gradients(model: nn.Module, x: Tensor, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    results = run(model, x)
    weights = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view_as(r) for r in results]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)
    return [r.detach() for r in results] + list(gradients)


def compare(got: list[Tensor], want: list[Tensor], exact: list[Tensor]) -> None:
    """Relative to the largest value, above what the model's own rounding has lost by then; some
    gradients are zero but for rounding, that of terms as large as the other gradients."""
    largest = max(b.abs().max().item() for b in want)
    for a, b, true in zip(got, want, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        allowed = RELATIVE[b.dtype] * b.abs().max() + 4 * (b - true).abs().max()
        rounding = 4 * torch.finfo(b.dtype).eps * largest
        assert (a - b).abs().max() <= allowed + rounding


def assert_copies(model: nn.Module, x: Tensor, run: Callable[..., list[Tensor]]) -> None:
    """A deep copy, and a plain copy given the saved state, compute what the fused model does."""
    with torch.no_grad():
        want = run(model, x)
        copied = copy.deepcopy(model)
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(a, b) for a, b in zip(run(copied, x), want, strict=True))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        plain = randomised(copied)
        unfuse(plain)
        plain.load_state_dict(torch.load(file))
        compare(run(plain, x), want, want)


@pytest.fixture
def reasons(backend: None) -> Callable[[nn.Module], Any]:
    """Why `fuse` leaves the modules of a model that it leaves, in the order of their names."""

    def of(model: nn.Module) -> list[str]:
        types = [type(m) for m in model.modules()]
        report = fuse(model)
        assert not report.swapped
        assert [type(m) for m in model.modules()] == types
        return list(report.left.values())

    return of


def as_if(module: str) -> Callable[[type], type]:
    """A class that says it comes from another module: a double of a library's class."""

    def marked(cls: type) -> type:
        cls.__module__ = module
        return cls

    return marked


@pytest.fixture(name="as_if")
def _as_if() -> Callable[[str], Callable[[type], type]]:
    return as_if
