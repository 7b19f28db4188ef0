"""fuse on nflows' layers."""

import copy

import pytest
import torch
from torch import nn

from hybridflow.kernels import fuse

pytest.importorskip("nflows", reason="nflows is not installed")

from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import coupling


def vector_net(inputs, outputs):
    return ResidualNet(inputs, outputs, 8, context_features=2, num_blocks=1)


def coupling_of(features, i, net=vector_net):
    mask = [(j + i) % 2 for j in range(features)]
    return transforms.AffineCouplingTransform(mask, net)


def both_directions(context):
    def run(model, x):
        c = context.to(x.dtype)
        z, log_det = model._transform(x, c)
        return [model.log_prob(x, c), z, log_det, *model._transform.inverse(x, c)]

    return run


def test_vectors(unchanged_by_fuse):
    parts = []
    for i in range(8):
        parts += [transforms.ActNorm(5), coupling_of(5, i)]
    model = Flow(transforms.CompositeTransform(parts), StandardNormal([5]))
    x, context = torch.randn(16, 5), torch.randn(16, 2)
    with torch.no_grad():
        model.log_prob(x, context)
    unchanged_by_fuse(model, x, both_directions(context), layers=16)


def test_images(unchanged_by_fuse):
    def net(inputs, outputs):
        return ConvResidualNet(inputs, outputs, 4, context_channels=1, num_blocks=1)

    parts = []
    for i in range(8):
        parts += [transforms.ActNorm(3), coupling_of(3, i, net)]
    model = Flow(transforms.CompositeTransform(parts), StandardNormal([3, 4, 4])).eval()
    x, context = torch.randn(6, 3, 4, 4), torch.randn(6, 1, 4, 4)
    unchanged_by_fuse(model, x, both_directions(context), layers=16)


def test_the_first_training_batch_initialises_as_it_does_without(backend):
    plain, fused = transforms.ActNorm(3), transforms.ActNorm(3)
    fuse(fused)
    for x in 3 * torch.randn(3, 8, 3) + 1:
        want, got = plain(x), fused(x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert fused.initialized
    assert torch.equal(fused.log_scale, plain.log_scale)


def test_a_state_with_another_split_is_followed(backend):
    """The split is a buffer: what was derived from the old one must not be used again."""
    layer, other = (coupling_of(5, i, lambda i, o: ResidualNet(i, o, 8)) for i in (0, 2))
    other.identity_features, other.transform_features = (
        torch.tensor([0, 1, 3]),
        torch.tensor([2, 4]),
    )
    layer = transforms.AffineCouplingTransform([0, 1, 0, 1, 0], lambda i, o: ResidualNet(i, o, 8))
    x = torch.randn(4, 5)
    fuse(layer)
    layer(x)
    state = layer.state_dict()
    state["identity_features"] = torch.tensor([1, 2, 3])
    state["transform_features"] = torch.tensor([0, 4])
    layer.load_state_dict(state)
    plain = transforms.AffineCouplingTransform([0, 1, 0, 1, 0], lambda i, o: ResidualNet(i, o, 8))
    plain.load_state_dict(state)
    for a, b in zip(layer(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)


def test_the_release_with_scale_activations_is_known(backend, reasons, as_if):
    """HEAD of nflows takes a callable that gives the scale; its default is the formula of PyPI's."""

    @as_if("nflows.transforms.coupling")
    class AffineCouplingTransform(coupling.AffineCouplingTransform):
        DEFAULT_SCALE_ACTIVATION = lambda x: torch.sigmoid(x + 2) + 1e-3  # noqa: E731
        GENERAL_SCALE_ACTIVATION = lambda x: (nn.functional.softplus(x) + 1e-3).clamp(0, 3)  # noqa: E731

        def __init__(self, mask, net, scale_activation=DEFAULT_SCALE_ACTIVATION):
            self.scale_activation = scale_activation
            super().__init__(mask, net)

        def _scale_and_shift(self, transform_params):
            shift, raw = transform_params.chunk(2, dim=1)
            return self.scale_activation(raw), shift

    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, 8)

    layer = AffineCouplingTransform([0, 1, 1], net)
    plain = copy.deepcopy(layer)
    assert fuse(layer).swapped
    x = torch.randn(4, 3)
    for a, b in zip(layer(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)
    general = AffineCouplingTransform([0, 1], net, AffineCouplingTransform.GENERAL_SCALE_ACTIVATION)
    assert reasons(general) == ["its scale_activation is not the default one"]


def test_what_is_left_and_why(reasons, as_if):
    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, 8)

    assert "additive" in reasons(transforms.AdditiveCouplingTransform([0, 1], net))[0]
    unconditional = transforms.AffineCouplingTransform(
        [0, 1], net, unconditional_transform=lambda features: transforms.ActNorm(features)
    )
    unconditional.unconditional_transform.eval()
    report = fuse(unconditional)
    assert "unconditional" in report.left[""]

    @as_if("nflows.transforms.coupling")
    class AffineCouplingTransform(coupling.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            shift, raw = transform_params.chunk(2, dim=1)
            return raw.sigmoid(), shift

    changed = reasons(AffineCouplingTransform([0, 1], net))
    assert changed == ["it computes something else than is known of its class"]


def test_a_fused_model_compiles_into_one_graph(backend):
    """The original does not: an actnorm in training reads its flag in each call."""
    parts = transforms.ActNorm(5), coupling_of(5, 0)
    model, x, context = transforms.CompositeTransform(parts), torch.randn(4, 5), torch.randn(4, 2)
    fuse(model)
    with torch.no_grad():
        model(x, context)
    want = model(x, context)
    compiled = torch.compile(lambda x, c: model(x, c), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, context), want, strict=True):
        torch.testing.assert_close(a, b)
