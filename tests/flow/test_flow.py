"""The flow is an exact bijection with an exact log-determinant, whatever its parameters."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from hybridflow.flow import (
    ActNorm,
    AffineCoupling,
    FlowStep,
    GaussianMixture,
    LogitTransform,
    MixtureFlow,
    MultiScaleFlow,
    VectorFlow,
    conv_conditioner,
    dense_conditioner,
    depth_to_space,
    dequantise,
    space_to_depth,
    standard_normal_log_prob,
)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with parameters away from their (zero) starts."""
    torch.manual_seed(seed)
    module.double()
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def slogdet(function, x: Tensor) -> Tensor:
    """log|det| of the Jacobian of a map on one sample, by autograd."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None])[0].flatten(), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


def steps() -> list[tuple[FlowStep, tuple[int, ...]]]:
    return [
        (FlowStep(2, dense_conditioner(1, 8, 2)), (2,)),
        (FlowStep(5, dense_conditioner(3, 8, 4), flip=True), (5,)),
        (FlowStep(4, conv_conditioner(2, 8, 4)), (4, 2, 3)),
        (FlowStep(3, conv_conditioner(2, 8, 2), flip=True), (3, 3, 1)),
    ]


@pytest.mark.parametrize(("step", "shape"), steps())
def test_step_inverts_and_its_log_det_is_the_jacobians(step: FlowStep, shape: tuple[int, ...]):
    randomised(step)
    x = torch.randn(3, *shape, dtype=torch.float64)
    y, log_det = step(x)
    back, inverse_log_det = step.inverse(y)
    assert (back - x).abs().max() < 1e-10
    assert (log_det + inverse_log_det).abs().max() < 1e-10
    for i in range(3):
        assert abs(slogdet(lambda v: step(v)[0], x[i]) - log_det[i]) < 1e-10
    started = torch.ones(3, dtype=torch.float64)
    assert torch.equal(step(x, started)[1], started + log_det)


@pytest.mark.parametrize(("step", "shape"), steps())
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_step_gradients(step: FlowStep, shape: tuple[int, ...], direction: str):
    randomised(step)
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(step, direction), (x,))


def test_a_fresh_coupling_is_the_identity():
    x = torch.randn(4, 6, 2, 2)
    y, log_det = AffineCoupling(6, conv_conditioner(3, 8, 6))(x)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(4))


def test_the_gain_bounds_the_log_scale():
    coupling = AffineCoupling(4, nn.Conv2d(2, 4, 1))
    s, _ = coupling.scale_and_shift(1e4 * torch.randn(5, 2, 3, 3))
    assert s.abs().max() <= coupling.gain.abs().max()
    y, log_det = coupling(1e4 * torch.randn(5, 4, 3, 3))
    assert y.isfinite().all() and log_det.isfinite().all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [2, 5])
def test_coupling_split_and_merge_are_inverse(channels: int, flip: bool):
    coupling = AffineCoupling(channels, nn.Identity(), flip)
    x = torch.randn(2, channels, 3)
    identity, transformed = coupling.split(x)
    assert (identity.shape[1], transformed.shape[1]) == ((channels + 1) // 2, channels // 2)
    assert torch.equal(coupling.merge(identity, transformed), x)


def test_coupling_of_one_channel_is_refused():
    with pytest.raises(ValueError, match="channels: got 1"):
        AffineCoupling(1, nn.Identity())


def test_log_det_is_float32_for_16_bit_inputs():
    step = FlowStep(4, conv_conditioner(2, 8, 4)).bfloat16()
    assert step.coupling(torch.randn(2, 4, 2, 2).bfloat16())[1].dtype == torch.float32


class TestActNorm:
    def test_standardises_its_first_batch(self):
        x = 5 + 3 * torch.randn(64, 4, 3, 3)
        layer = ActNorm(4)
        layer.initialise(x)
        y = layer(x)
        assert y.mean((0, 2, 3)).abs().max() < 1e-5
        assert (y.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-4

    @pytest.mark.parametrize(
        "x", [torch.full((8, 2, 3, 3), 7.0), torch.randn(1, 2), torch.zeros(1, 2)]
    )
    def test_constant_channels_and_a_batch_of_one_stay_finite(self, x: Tensor):
        layer = ActNorm(2)
        layer.initialise(x)
        assert layer(x).isfinite().all() and layer.log_det(x).isfinite()
        assert torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)

    def test_the_flag_is_saved_so_a_loaded_layer_is_not_initialised_again(self):
        step = FlowStep(4, conv_conditioner(2, 8, 4))
        step.initialise(torch.randn(16, 4, 2, 2))
        loaded = FlowStep(4, conv_conditioner(2, 8, 4))
        loaded.load_state_dict(step.state_dict())
        before = copy.deepcopy(loaded.state_dict())
        loaded.initialise(10 + torch.randn(16, 4, 2, 2))
        assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


def test_space_to_depth_inverts():
    x = torch.randn(2, 3, 4, 6)
    y = space_to_depth(x)
    assert y.shape == (2, 12, 2, 3)
    assert torch.equal(depth_to_space(y), x)


@pytest.mark.parametrize(
    ("shape", "scales", "scale_shapes", "last", "latent"),
    [
        ((1, 32, 32), 3, [(4, 16, 16), (8, 8, 8), (16, 4, 4)], 64, 256),
        ((3, 32, 32), 3, [(12, 16, 16), (24, 8, 8), (48, 4, 4)], 192, 768),
    ],
)
def test_scale_shapes_are_those_of_tables_a1_to_a3(shape, scales, scale_shapes, last, latent):
    flow = MultiScaleFlow(shape, scales, couplings=1, hidden=4, last_hidden=4)
    seen: list[torch.Size] = []
    for chain in flow.scales:
        chain.steps[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1:]))
    z_k, z_n, _ = flow(torch.rand(2, *shape))
    assert [tuple(s) for s in seen] == scale_shapes
    assert flow.last.coupling.channels == last
    assert z_k.shape == (2, latent)
    assert flow.latent_sizes == (z_k.shape[1], z_n.shape[1])


@pytest.mark.parametrize(
    "model",
    [
        MixtureFlow(MultiScaleFlow((1, 8, 8), 2, 3, 8, 8), 10, logit=True),
        MixtureFlow(MultiScaleFlow((3, 4, 8), 1, 2, 8, 8), 3, logit=True),
        MixtureFlow(VectorFlow(3, 4, 8), 2, logit=False),
    ],
)
def test_model_is_a_bijection_with_exact_log_det(model: MixtureFlow):
    randomised(model)
    flow = model.flow
    shape = flow.shape if isinstance(flow, MultiScaleFlow) else (flow.size,)
    x = torch.rand(4, *shape, dtype=torch.float64)
    model.initialise(x)
    z_k, z_n, log_det = model(x)
    assert (model.inverse(z_k, z_n) - x).abs().max() < 1e-10
    assert abs(slogdet(lambda v: torch.cat(model(v)[:2], dim=1), x[0]) - log_det[0]) < 1e-9


def test_model_density_integrates_to_one():
    model = randomised(MixtureFlow(VectorFlow(2, 4, 8), 3, logit=False))
    edge = torch.linspace(-12, 12, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(edge, edge)
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (edge[1] - edge[0]) ** 2
    assert abs(mass - 1) < 1e-3


def test_class_logits_are_those_of_the_joint():
    model = randomised(MixtureFlow(MultiScaleFlow((1, 8, 8), 2, 2, 4, 4), 5, logit=True))
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(
        model.class_logits(x).softmax(1), model.joint_log_prob(x).softmax(1), atol=1e-12
    )


def test_samples_have_the_requested_classes_in_latent_space():
    model = randomised(MixtureFlow(VectorFlow(2, 4, 8), 3, logit=False))
    model.prior.initialise(20 * torch.eye(3, 2, dtype=torch.float64))
    labels = torch.tensor([0, 1, 2, 0])
    x = model.sample(labels).double()
    assert torch.equal(model.class_logits(x).argmax(1), labels)
    mode = model.sample(labels, temperature=0.0)
    assert torch.allclose(mode[0], mode[3])


@pytest.mark.parametrize("size", [32, 96])
def test_image_size_that_does_not_halve_is_refused(size: int):
    with pytest.raises(ValueError, match=r"shape: got 36x\d+ pixels, want multiples of 16"):
        MultiScaleFlow((1, 36, size), 3, 1, 4, 4)


class TestGaussianMixture:
    def test_matches_torch_distributions(self):
        prior = GaussianMixture(4, 3)
        prior.logits.data = torch.randn(4)
        z = torch.randn(7, 3)
        for k in range(4):
            normal = torch.distributions.Normal(prior.means[k], 1.0)
            expected = normal.log_prob(z).sum(1)
            assert torch.allclose(prior.component_log_prob(z)[:, k], expected, atol=1e-5)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=prior.logits),
            torch.distributions.Independent(torch.distributions.Normal(prior.means, 1.0), 1),
        )
        assert torch.allclose(prior.joint_log_prob(z).logsumexp(1), mixture.log_prob(z), atol=1e-5)

    def test_no_cancellation_far_from_the_origin(self):
        prior = GaussianMixture(3, 256)
        offset = 1000 * torch.ones(256)
        prior.initialise(offset + torch.randn(3, 256))
        z = offset + torch.randn(5, 256)
        exact = -0.5 * (
            (z.double()[:, None] - prior.means.double()).square().sum(2)
            + 256 * math.log(2 * math.pi)
        )
        assert (prior.component_log_prob(z) - exact).abs().max() < 1e-2

    def test_autocast_does_not_round_it(self):
        prior, z = GaussianMixture(3, 64), torch.randn(5, 64)
        expected = prior.component_log_prob(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prior.component_log_prob(z), expected)

    def test_gradients(self):
        prior = randomised(GaussianMixture(3, 4))
        z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *_: prior.joint_log_prob(z), (z, prior.means, prior.logits)
        )


def test_standard_normal():
    z = torch.randn(5, 7)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert torch.allclose(standard_normal_log_prob(z), expected, atol=1e-5)
    assert torch.equal(standard_normal_log_prob(z[:, :0]), torch.zeros(5))


def test_dequantise_stays_in_its_grey_level():
    x = torch.randint(0, 17, (50, 1, 8, 8), dtype=torch.uint8)
    v = dequantise(x, 17)
    assert v.dtype == torch.float32
    assert torch.equal((v * 17).floor().clamp(max=16).to(torch.uint8), x)
    assert not torch.equal(v, dequantise(x, 17))
    points = torch.randn(4, 2)
    assert dequantise(points, None) is points


def test_logit_transform():
    transform = LogitTransform()
    x = torch.rand(3, 5, dtype=torch.float64)
    y, log_det = transform(x)
    assert torch.allclose(transform.inverse(y), x, atol=1e-12)
    assert abs(slogdet(lambda v: transform(v)[0], x[0]) - log_det[0]) < 1e-10
    edges, log_det = transform(torch.tensor([[0.0, 1.0]]))
    assert edges.isfinite().all() and log_det.isfinite().all()
