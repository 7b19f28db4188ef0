"""One vector for all weights: what a network computes and how Adam trains it stay as they were."""

import copy

import pytest
import torch
from torch import nn

from hybridflow.config import OptimiserConfig
from hybridflow.discriminator import ConvDiscriminator
from hybridflow.optimiser import Optimiser

NO_CLIP = OptimiserConfig(clip=1e9)


def network(memory_format=torch.contiguous_format) -> ConvDiscriminator:
    torch.manual_seed(0)
    made = ConvDiscriminator(3, 4, (5, 6), input_noise=0, input_dropout=0, block_dropout=0)
    return made.to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_weights_keep_their_values_and_formats_and_follow_the_vector(memory_format):
    trained, plain = network(memory_format), network(memory_format)
    optimiser = Optimiser(trained, 1e-3, 0.9, NO_CLIP)
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(trained(x), plain(x))
    with torch.no_grad():
        optimiser.weights.zero_()
    assert all(not p.any() for p in optimiser.parameters)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_steps_are_those_of_adam_on_every_parameter(memory_format):
    trained, plain = network(memory_format), network(memory_format)
    optimiser = Optimiser(trained, 1e-3, 0.5, NO_CLIP)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    adam = torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))
    for seed in range(5):
        x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        optimiser.step(optimiser.gradient(trained(x).square().mean()))
        adam.zero_grad()
        plain(x).square().mean().backward()
        adam.step()
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5)
    assert max((a - b).abs().max() for a, b in zip(parameters, start, strict=True)) > 3e-3


def test_a_gradient_in_another_memory_format_moves_the_same_weights():
    moved = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        optimiser = Optimiser(network(), 1e-3, 0.9, NO_CLIP)
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(p.shape, generator=generator) for p in optimiser.parameters]
        grads = [g.contiguous(memory_format=memory_format) if g.dim() == 4 else g for g in grads]
        optimiser.step(optimiser.vector(grads))
        moved.append(optimiser.weights.detach())
    assert torch.equal(*moved)


def test_the_gradients_norm_is_clipped_and_its_direction_kept():
    layer = nn.Linear(3, 2)
    optimiser = Optimiser(layer, 1e-3, 0.9, OptimiserConfig(clip=0.5))
    gradient = torch.arange(8.0)
    optimiser.step(gradient.clone())
    assert torch.allclose(optimiser.weights.grad, 0.5 * gradient / gradient.norm())
    optimiser.step(0.01 * gradient)
    assert torch.allclose(optimiser.weights.grad, 0.01 * gradient)


def test_parameters_that_are_not_trained_or_not_used():
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    layer[0].bias.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    optimiser = Optimiser(layer, 0.1, 0.9, NO_CLIP)
    gradient = optimiser.gradient(layer[0](torch.ones(1, 3)).sum())
    assert gradient.shape == optimiser.weights.shape == (12,)
    assert gradient[:6].all() and not gradient[6:].any()
    optimiser.step(gradient)
    after = layer.state_dict()
    assert torch.equal(after["0.bias"], before["0.bias"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert set(optimiser.average) == {"0.weight", "1.weight", "1.bias"}
