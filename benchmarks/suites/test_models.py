"""Models of other libraries before and after `fuse`; memory of long chains of our own steps."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measuring import cache_bytes, calls_in_turn, peak_bytes, relative_errors, verdict
from benchmarks.models import MODELS, chain
from benchmarks.suites.turns import Settings
from hybridflow.kernels import fuse

_SEED = 0
_TOLERANCE = 1e-5


def _randomised(model: nn.Module) -> nn.Module:
    """Away from the identity that many libraries' flows start as."""
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# --- models of other libraries -------------------------------------------------------------------


class Models:
    """One library's model as it is and fused, on batches that outgrow three times the cache."""

    def __init__(self, library: str, settings: Settings) -> None:
        self.batch, self.size = (16, 8) if settings.quick else (4096, 64)
        torch.manual_seed(_SEED)
        model = MODELS[library](self.size).to(settings.device)
        count = (
            3
            if settings.quick
            else 1 + 3 * cache_bytes(settings.device) // (4 * self.batch * self.size)
        )
        self.batches = [
            torch.randn(self.batch, self.size, device=settings.device) for _ in range(count)
        ]
        with torch.no_grad():
            model(self.batches[0])  # actnorms take their statistics
        _randomised(model)
        fused = copy.deepcopy(model)
        self.report = fuse(fused)
        self.models = {"eager": model, "fused": fused}

    def call(self, variant: str, x: Tensor) -> dict[str, Tensor]:
        """The density and the gradients of the mean negative log-likelihood."""
        model = self.models[variant]
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        log_prob = model(x)
        grads = torch.autograd.grad(-log_prob.mean(), tuple(named.values()))
        return {"log_prob": log_prob} | dict(zip(named, grads, strict=True))

    def judge(self) -> tuple[dict[str, float], list[str]]:
        """How far the fused model is from the model itself."""
        x = self.batches[0]
        errors = relative_errors(self.call("fused", x), self.call("eager", x))
        worst = max(errors, key=lambda name: errors[name])
        problems = [] if self.report.swapped else ["fuse swapped nothing"]
        if not errors[worst] <= _TOLERANCE:
            problems.append(f"{worst} is off by {errors[worst]:.1e}, allowed is {_TOLERANCE}")
        return {"log_prob": errors["log_prob"], worst: errors[worst]}, problems


@functools.lru_cache(maxsize=1)
def _models(library: str, settings: Settings) -> tuple[Models, dict[str, float], list[str]]:
    models = Models(library, settings)
    return models, *models.judge()


def _turns(*variants: str) -> list[tuple[int, str]]:
    return [(block, variant) for block in range(5) for variant in variants]


@pytest.mark.parametrize(("block", "variant"), _turns("eager", "fused"))
@pytest.mark.parametrize("library", MODELS)
def test_library(
    benchmark: Any, settings: Settings, library: str, block: int, variant: str
) -> None:
    """Log-likelihood and its gradients, eight couplings, conditioners of two hidden layers of 64."""
    pytest.importorskip(library)
    models, errors, problems = _models(library, settings)
    if variant == "eager":
        errors, problems = {}, []
    calls = settings.calls([functools.partial(models.call, variant, x) for x in models.batches])
    call = calls_in_turn(calls, settings.device)
    benchmark.group = f"model of {library}"
    benchmark.extra_info.update(
        suite="models",
        block=block,
        calls=1 if settings.device.type == "cpu" else len(calls),
        library=library,
        shape=[models.batch, models.size],
        variant=variant,
        swapped=len(models.report.swapped),
        left=models.report.left,
        errors=errors,
        problems=problems,
    )
    rounds = settings.rounds(call)
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=min(1, rounds - 1))
    assert not problems, "; ".join(problems)


# --- memory of our own steps ---------------------------------------------------------------------


def _as_it_is(model: nn.Module) -> None:
    pass


_KEPT: dict[str, Callable[[nn.Module], Any]] = {
    "eager": _as_it_is,
    "fused": fuse,
    "constant memory": functools.partial(fuse, constant_memory=True),
}


def _train(model: nn.Module, x: Tensor) -> None:
    z, log_det = model(x)
    (0.5 * z.square().flatten(1).sum(1) - log_det).mean().backward()


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _train(model, x)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("couplings", (8, 48))
@pytest.mark.parametrize("variant", _KEPT)
def test_memory(benchmark: Any, settings: Settings, variant: str, couplings: int) -> None:
    """Peak of what a step of training allocates, beside parameters, their gradients and the batch."""
    shape, hidden = ((4, 4, 4, 4), 8) if settings.quick else ((64, 12, 16, 16), 64)
    torch.manual_seed(_SEED)
    model = _randomised(chain(shape[1], hidden, couplings)).to(settings.device)
    x = torch.randn(shape, device=settings.device)
    with torch.no_grad():
        model.initialise(x)  # without it, 48 random steps amplify every rounding beyond measure

    def train() -> None:
        _train(model, x)

    exact = _gradients(copy.deepcopy(model).double(), x.double())
    of_eager = relative_errors(_gradients(model, x), exact)
    _KEPT[variant](model)
    errors = relative_errors(_gradients(model, x), exact)
    worst = max(errors, key=lambda name: errors[name])
    problems = verdict({worst: errors[worst]}, torch.float32, {worst: max(of_eager.values())})
    benchmark.group = f"memory of {couplings} couplings"
    benchmark.extra_info.update(
        suite="memory",
        block=0,
        calls=1,
        variant=variant,
        couplings=couplings,
        shape=list(shape),
        hidden=hidden,
        peak_bytes=peak_bytes(train, settings.device),
        errors={worst: errors[worst]},
        problems=problems,
    )
    benchmark.pedantic(calls_in_turn([train], settings.device), rounds=3, warmup_rounds=1)
    assert not problems, "; ".join(problems)
