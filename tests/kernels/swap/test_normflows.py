"""fuse on normflows' layers."""

import pickle

import pytest
import torch

from hybridflow.kernels import fuse, unfuse

nf = pytest.importorskip("normflows", reason="normflows is not installed")


def both_directions(model, x):
    z, inverse_log_det = model.inverse_and_log_det(x)
    y, log_det = model.forward_and_log_det(x)
    return [model.log_prob(x), z, inverse_log_det, y, log_det]


def initialised(model, x):
    with torch.no_grad():
        model.inverse_and_log_det(x)
    return model


@pytest.mark.parametrize("scale_map", ("exp", "sigmoid", "sigmoid_inv"))
def test_vectors(unchanged_by_fuse, scale_map):
    flows = []
    for i in range(8):
        split = ("channel", "channel_inv")[i % 2]
        sizes = [2, 16, 6] if i % 2 else [3, 16, 4]
        net = nf.nets.MLP(sizes)
        flows += [nf.flows.AffineCouplingBlock(net, scale_map=scale_map, split_mode=split)]
        flows += [nf.flows.ActNorm(5), nf.flows.AffineConstFlow(5, shift=False)]
    x = torch.randn(16, 5)
    model = initialised(nf.NormalizingFlow(nf.distributions.DiagGaussian(5), flows), x)
    unchanged_by_fuse(model, x, both_directions, layers=24)


def test_images(unchanged_by_fuse):
    flows = [nf.flows.GlowBlock(4, 8, split_mode=s) for s in ("channel", "channel_inv") * 4]
    flows += [nf.flows.AffineConstFlow((4, 2, 2))]
    x = torch.randn(16, 4, 2, 2)
    model = initialised(nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 2)), flows), x)
    unchanged_by_fuse(model, x, both_directions, layers=17)


def test_masked_flows(unchanged_by_fuse):
    masks = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])
    nets = [[nf.nets.MLP([4, 16, 4]) for _ in range(2)] for _ in range(6)]
    flows = [nf.flows.MaskedAffineFlow(masks[i % 2], *pair) for i, pair in enumerate(nets)]
    flows += [nf.flows.MaskedAffineFlow(masks[0], nets[0][0]) for _ in range(2)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)
    unchanged_by_fuse(model, torch.randn(9, 4), both_directions, layers=8)


def test_a_masked_flow_marks_what_is_not_finite_as_the_original_does(backend):
    class Wild(torch.nn.Module):
        def forward(self, z):
            return torch.tensor([[0.1, float("inf"), -float("inf"), 0.3]]).expand_as(z)

    layer = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0]), Wild(), Wild())
    x = torch.randn(3, 4)
    want = layer.inverse(x)
    assert fuse(layer).swapped
    for got, expected in zip(layer.inverse(x), want, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_coupling_keeps_its_lists(backend):
    layer = nf.flows.AffineCoupling(nf.nets.MLP([3, 8, 4]))
    parts = [torch.randn(4, 3), torch.randn(4, 2)]
    want, want_log_det = layer(parts)
    assert fuse(layer).swapped
    got, log_det = layer(parts)
    assert isinstance(got, list)
    assert got[0] is parts[0]
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(log_det, want_log_det)


@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_the_first_batch_initialises_as_it_does_without(backend, direction):
    plain, fused = nf.flows.ActNorm((3, 1, 1)), nf.flows.ActNorm((3, 1, 1))
    fuse(fused)
    for x in 3 * torch.randn(2, 8, 3, 4, 4) + 1:
        want, log_det = getattr(plain, direction)(x)
        got, got_log_det = getattr(fused, direction)(x)
        torch.testing.assert_close(got, want)
        assert got_log_det.shape == log_det.shape == ()
        torch.testing.assert_close(got_log_det, log_det)
    assert fused.data_dep_init_done == 1
    assert torch.equal(fused.s, plain.s)
    assert torch.equal(fused.t, plain.t)


def test_what_is_left_and_why(reasons):
    flows = nf.flows
    net = nf.nets.MLP([2, 8, 4])
    assert "additive" in reasons(flows.AffineCoupling(net, scale=False))[0]
    assert "'other'" in reasons(flows.AffineCoupling(net, scale_map="other"))[0]
    assert "class label" in reasons(flows.CCAffineConst(3, 2))[0]
    half = flows.MaskedAffineFlow(torch.tensor([0.5, 1.0]), net)
    assert "besides 0 and 1" in reasons(half)[0]

    class Mine(flows.ActNorm):
        pass

    assert reasons(Mine(3)) == ["a subclass of ActNorm, whose behaviour may differ"]


def test_blocks_that_split_otherwise_or_whose_parts_have_hooks_are_left(backend):
    blocks = torch.nn.ModuleList(
        nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), split_mode=mode)
        for mode in ("checkerboard", "channel", "channel")
    )
    blocks[1].flows[2].register_forward_hook(lambda *_: None)
    report = fuse(blocks)
    assert "'checkerboard'" in report.left["0"]
    assert "hooks" in report.left["1"]
    # The coupling in a block that is left is swapped; that in a block that is swapped is part of it.
    assert set(report.swapped) == {"0.flows.1", "1.flows.1", "2"}


def test_a_network_layer_of_the_same_name_is_none_of_ours(backend):
    report = fuse(nf.utils.ActNorm((3, 1, 1)))
    assert set(report.swapped) == {"actNorm"}
    assert not report.left


def test_a_fused_model_can_be_pickled(backend):
    layer = nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]))
    fuse(layer)
    x = torch.randn(3, 4)
    copied = pickle.loads(pickle.dumps(layer))
    assert type(copied) is type(layer)
    assert all(torch.equal(a, b) for a, b in zip(copied(x), layer(x), strict=True))
    unfuse(copied)
    assert type(copied) is nf.flows.AffineCouplingBlock


def test_a_layer_in_another_type_than_its_input_promotes_as_it_does_without(backend):
    layer = nf.flows.AffineConstFlow(3).double()
    x = torch.randn(4, 3)
    want = layer(x)
    fuse(layer)
    got = layer(x)
    assert [v.dtype for v in got] == [v.dtype for v in want] == [torch.float64] * 2
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
