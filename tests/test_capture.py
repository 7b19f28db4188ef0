"""What would keep a step from becoming a CUDA graph is found on any device, and named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from hybridflow.capture import CapturedStep, trace
from hybridflow.config import FlowConfig, ObjectiveConfig, OptimiserConfig, StrongConfig
from hybridflow.data import Batches
from hybridflow.discriminator import ConvDiscriminator
from hybridflow.errors import InputError
from hybridflow.networks import build_model
from hybridflow.objective import terms_of
from hybridflow.step import HybridStep

FLOW = FlowConfig(scales=2, couplings=1, hidden=8, last_hidden=8)


def test_a_step_on_augmented_colour_images_can_be_captured():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    y = torch.arange(40) % 3
    augmented = {"shift": 2, "flip": True, "device": "cpu"}
    step = HybridStep(
        build_model(FLOW, x.shape[1:], 3),
        ConvDiscriminator(3, 3, (4, 8)),
        Batches(x[:20], y[:20], 4, **augmented),
        Batches(x[20:], None, 6, **augmented),
        levels=256,
        terms=terms_of("full", ObjectiveConfig(w_con_d=1.0, w_con_g=1.0, teacher="averaged")),
        optimiser=OptimiserConfig(),
        total_steps=10,
        strong=StrongConfig(cutout=0.5),
        precision="bf16",
    )
    step()
    first, second = trace(step), trace(step)
    assert first.obstacles == []
    assert first.operations == second.operations


x = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    ("function", "operation", "reason"),
    [
        (lambda: x.sum().item(), "_local_scalar_dense", "reads a value"),
        (lambda: bool(x.sum() > 0), "_local_scalar_dense", "reads a value"),
        (lambda: x.nonzero(), "nonzero", "shape depends"),
        (lambda: x[x > 0], "index", "shape depends"),
        (lambda: x.unique(), "unique", "shape depends"),
        (lambda: x.clone().index_put_((x > 0,), x[:2]), "index_put_", "shape depends"),
        (lambda: torch.tensor([0.1, 0.2]) + 1, "lift_fresh", "on the host"),
        (lambda: x.to("meta"), "_to_copy", "mixes tensors on cpu and meta"),
    ],
)
def test_obstacles_are_named_with_the_line_that_calls_them(function, operation: str, reason: str):
    (obstacle,) = trace(function).obstacles
    assert operation in obstacle and reason in obstacle
    assert f"test_capture.py:{function.__code__.co_firstlineno}" in obstacle


def test_obstacles_in_a_backward_are_found():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    leaf = torch.ones(3, requires_grad=True)
    found = trace(lambda: torch.autograd.grad(Reads.apply(leaf).sum(), leaf))
    assert len(found.obstacles) == 1 and "_local_scalar_dense" in found.obstacles[0]


def test_operations_that_depend_on_data_show_as_another_sequence():
    numbers = iter((1, 2))

    def uneven() -> None:
        for _ in range(next(numbers)):
            torch.zeros(3)

    assert trace(uneven).operations != trace(uneven).operations


def test_indexing_by_numbers_is_no_obstacle():
    index = torch.tensor([2, 0])
    assert trace(lambda: x[index]).obstacles == []


def test_only_a_gpu_replays_graphs():
    with pytest.raises(InputError, match="device: got cpu, want a CUDA device"):
        CapturedStep(lambda: None, torch.device("cpu"))


captures: list[Callable[[], None]] = []
calls: list[str] = []


class _Stream:
    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        captures[-1]()


@pytest.fixture
def without_a_card(monkeypatch):
    captures.clear()
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    @contextmanager
    def graph(graph: _Graph, stream: _Stream) -> Iterator[None]:
        captures.append(lambda: calls.append("replay"))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)


def test_three_calls_then_one_capture_then_replays(without_a_card):
    calls.clear()
    step = CapturedStep(lambda: calls.append("call"), torch.device("cuda"))
    for _ in range(5):
        step()
    assert calls == ["call"] * 3 + ["call", "replay", "replay"]  # the fourth is captured
    assert len(captures) == 1


def test_what_cannot_be_captured_is_refused_before_a_capture(without_a_card):
    step = CapturedStep(lambda: (x + torch.rand(3)).sum().item(), torch.device("cuda"))
    step()
    step()
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.default reads .*--no-graphs"):
        step()
    assert not captures


def test_a_failed_capture_tells_its_first_error(without_a_card, monkeypatch):
    @contextmanager
    def graph(graph: _Graph, stream: _Stream) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    def function() -> None:
        calls.append("call")
        if len(calls) == 4:
            raise RuntimeError("the cause\nand more")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    calls.clear()
    step = CapturedStep(function, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="as a CUDA graph: the cause; run it without"):
        for _ in range(4):
            step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_that_cannot_be_captured_names_what_prevents_it():
    ones = torch.ones(3, device="cuda")
    step = CapturedStep(lambda: (ones + torch.rand_like(ones)).sum().item(), torch.device("cuda"))
    with pytest.raises(
        RuntimeError, match=r"_local_scalar_dense.default reads a value .*test_capture.py"
    ):
        for _ in range(5):
            step()
    assert torch.rand_like(ones).sum().item() < 3  # the device and its generator still work
