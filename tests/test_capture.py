"""What would keep a step from becoming a CUDA graph is found on any device, and named."""

import pytest
import torch

from hybridflow.capture import CapturedStep, trace
from hybridflow.config import FlowConfig, ObjectiveConfig, OptimiserConfig
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
        terms=terms_of("full", ObjectiveConfig()),
        optimiser=OptimiserConfig(),
        total_steps=10,
        autocast=True,
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_that_cannot_be_captured_names_what_prevents_it():
    ones = torch.ones(3, device="cuda")
    step = CapturedStep(lambda: ones.sum().item(), torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense reads a value .*test_capture.py"):
        for _ in range(5):
            step()
    assert ones.sum().item() == 3  # the device still works
