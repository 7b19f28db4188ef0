"""Shapes, noise only while training, and what weight norm and its initialisation promise."""

import pytest
import torch
from torch import nn

from hybridflow.config import DiscriminatorConfig
from hybridflow.discriminator import ConvDiscriminator, DenseDiscriminator
from hybridflow.errors import InputError
from hybridflow.networks import build_discriminator


def networks():
    return [
        (DenseDiscriminator(64, 10, (32, 16)), (1, 8, 8)),
        (DenseDiscriminator(2, 5, (16,)), (2,)),
        (ConvDiscriminator(3, 10, (8, 16)), (3, 32, 32)),
    ]


@pytest.mark.parametrize(("network", "shape"), networks())
def test_logits_and_their_gradients(network, shape):
    x = torch.rand(6, *shape, requires_grad=True)
    logits = network(x)
    assert logits.shape == (6, network.layers[-1].out_features)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize(("network", "shape"), networks())
def test_noise_is_added_while_training_only(network, shape):
    x = torch.rand(6, *shape)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(("network", "shape"), networks())
def test_initialise_standardises_the_output(network, shape):
    network.eval()
    x = torch.rand(200, *shape)
    network.initialise(x)
    logits = network(x)
    assert logits.mean(0).abs().max() < 1e-3
    assert (logits.var(0, correction=0) - 1).abs().max() < 1e-2


def test_conv_gains_are_frozen_but_the_last():
    network = ConvDiscriminator(3, 10, (8, 16))
    weighted = [m for m in network.layers if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 10
    trained = [m.parametrizations.weight.original0.requires_grad for m in weighted]
    assert trained == [False] * 9 + [True]


def test_dense_of_the_thesis_has_its_layers():
    network = DenseDiscriminator(1024, 10)
    sizes = [m.out_features for m in network.layers if isinstance(m, nn.Linear)]
    assert sizes == [1000, 500, 250, 250, 250, 10]


def test_no_widths_are_refused():
    with pytest.raises(ValueError, match="widths: got none"):
        ConvDiscriminator(3, 10, ())


@pytest.mark.parametrize(("widths", "side"), [((4,), 5), ((4, 4), 9), ((4, 4, 4), 17)])
def test_conv_blocks_fit_the_smallest_image_and_nothing_smaller(widths, side: int):
    config = DiscriminatorConfig(kind="conv", widths=widths)
    network = build_discriminator(config, torch.Size((2, side, side)), 3)
    assert network(torch.rand(1, 2, side, side)).shape == (1, 3)
    with pytest.raises(InputError, match=f"want dense, or images of at least {side}x{side}"):
        build_discriminator(config, torch.Size((2, side, side - 1)), 3)


def test_features_are_what_the_last_layer_is_given():
    for network in DenseDiscriminator(64, 3, (8, 6)), ConvDiscriminator(1, 3, (4, 6)):
        x = torch.rand(5, 1, 16, 4 if isinstance(network, DenseDiscriminator) else 16)
        features = network.eval().features(x)
        assert features.shape == (5, 6)
        assert torch.allclose(network.layers[-1](features), network(x))
