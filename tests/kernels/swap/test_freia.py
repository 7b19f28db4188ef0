"""fuse on FrEIA's layers."""

import copy

import pytest
import torch
from torch import nn

from hybridflow.kernels import fuse

pytest.importorskip("FrEIA", reason="FrEIA is not installed")

import FrEIA.modules as Fm
from FrEIA.framework import SequenceINN

COUPLINGS = (
    Fm.GLOWCouplingBlock,
    Fm.RNVPCouplingBlock,
    Fm.AffineCouplingOneSided,
    Fm.AllInOneBlock,
)


def dense(inputs, outputs):
    return tame(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def convolutional(inputs, outputs):
    return tame(nn.Conv2d(inputs, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, outputs, 1))


def tame(*layers):
    """Sixteen half-couplings with scales up to e² make of rounding errors what they like."""
    with torch.no_grad():
        for p in layers[-1].parameters():
            p.mul_(0.2)
    return nn.Sequential(*layers)


def stack(coupling, sizes, net, condition=None):
    """Eight couplings, each after an actnorm that is initialised, with reversals between them."""
    model = SequenceINN(*sizes)
    for i in range(8):
        model.append(Fm.ActNorm)
        options = {} if condition is None else {"cond": 0, "cond_shape": condition}
        if coupling is not Fm.AllInOneBlock:
            options["clamp_activation"] = ("ATAN", "TANH", "SIGMOID")[i % 3]
        model.append(coupling, subnet_constructor=net, **options)
        model.append(Fm.PermuteRandom, seed=i)
    for module in model.modules():
        if isinstance(module, Fm.ActNorm):
            module.init_on_next_batch = False
    return model


def both_directions(condition=None):
    def run(model, x):
        c = None if condition is None else [condition.to(x.dtype)]
        z, log_det = model(x, c)
        log_prob = log_det - z.flatten(1).square().sum(1) / 2
        return [log_prob, z, log_det, *model(x, c, rev=True)]

    return run


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_vectors(unchanged_by_fuse, coupling):
    model = stack(coupling, (5,), dense, condition=(2,))
    unchanged_by_fuse(model, torch.randn(8, 5), both_directions(torch.randn(8, 2)), layers=16)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_images(unchanged_by_fuse, coupling):
    model = stack(coupling, (3, 4, 4), convolutional)
    unchanged_by_fuse(model, torch.randn(4, 3, 4, 4), both_directions(), layers=16)


def test_affine_transforms_by_a_condition(unchanged_by_fuse):
    model = SequenceINN(5)
    for _ in range(2):
        model.append(
            Fm.ConditionalAffineTransform, cond=0, cond_shape=(2,), subnet_constructor=dense
        )
    unchanged_by_fuse(model, torch.randn(8, 5), both_directions(torch.randn(8, 2)), layers=2)


@pytest.mark.parametrize("split", (1, 4))
def test_uneven_splits(backend, split):
    layer = Fm.GLOWCouplingBlock([(5,)], subnet_constructor=dense, split_len=split)
    x = [torch.randn(4, 5)]
    want = [layer(x, rev=rev) for rev in (False, True)]
    assert fuse(layer).swapped
    for rev, ((expected,), log_det) in zip((False, True), want, strict=True):
        out, got = layer(x, rev=rev)
        assert type(out) is tuple
        torch.testing.assert_close(out[0], expected)
        torch.testing.assert_close(got, log_det)


def test_the_first_batch_initialises_as_it_does_without(backend):
    plain, fused = Fm.ActNorm([(3, 4, 4)]), Fm.ActNorm([(3, 4, 4)])
    fuse(fused)
    for x in 3 * torch.randn(2, 8, 3, 4, 4) + 1:
        (want, log_det), (got, got_log_det) = plain([x]), fused([x])
        assert type(got) is type(want)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got_log_det, log_det)
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_networks_output_is_not_scaled_in_place(backend):
    """The release scales it in place, which a network that ends in tanh does not survive."""
    layer = Fm.AllInOneBlock(
        [(4,)], subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Tanh())
    )
    fuse(layer)
    (out,), log_det = layer([torch.randn(3, 4)])
    (out.sum() + log_det.sum()).backward()
    assert layer.subnet[0].weight.grad is not None


@pytest.mark.parametrize("sizes", ((4,), (3, 4, 4)))
def test_the_actnorm_with_locations_is_known(backend, as_if, sizes):
    """HEAD of FrEIA stores what is subtracted and the log of what is divided by, per element."""

    @as_if("FrEIA.modules.invertible_resnet")
    class ActNorm(Fm.InvertibleModule):
        def __init__(self, dims_in, dims_c=None):
            super().__init__(dims_in, dims_c)
            self.register_buffer("is_initialized", torch.tensor(False))
            self.log_scale = nn.Parameter(torch.empty(1, dims_in[0][0]))
            self.loc = nn.Parameter(torch.empty(1, dims_in[0][0]))

        def forward(self, x, c=None, rev=False, jac=True):
            if c is not None:
                raise ValueError("ActNorm is unconditional.")
            (x,) = x
            if not self.is_initialized:
                self.is_initialized.data = torch.tensor(True)
                self.log_scale.data = x.std(dim=0, keepdim=True).log()
                self.loc.data = x.mean(dim=0, keepdim=True)
            log_det = self.log_scale.flatten(1).sum(1)
            if rev:
                return (x * self.log_scale.exp() + self.loc,), log_det
            return ((x - self.loc) / self.log_scale.exp(),), -log_det

    plain = ActNorm([sizes])
    plain.log_scale.data.zero_()
    fused = copy.deepcopy(plain)
    assert fuse(fused).swapped
    for x in 3 * torch.randn(3, 8, *sizes) + 1:
        for rev in False, True:
            (want,), log_det = plain([x], rev=rev)
            (got,), got_log_det = fused([x], rev=rev)
            torch.testing.assert_close(got, want)
            assert got_log_det.shape == (1,)
            torch.testing.assert_close(got_log_det, log_det)
    with pytest.raises(ValueError, match="unconditional"):
        fused([x], c=[x])


def test_the_block_that_scales_a_copy_is_known(backend, as_if):
    """HEAD of FrEIA does what the release does, but not in place."""

    @as_if("FrEIA.modules.all_in_one_block")
    class AllInOneBlock(Fm.AllInOneBlock):
        def _affine(self, x, a, rev=False):
            return super()._affine(x, a.clone(), rev)

    layer = AllInOneBlock([(5,)], subnet_constructor=dense)
    x = [torch.randn(4, 5)]
    (want,), log_det = layer(x)
    assert fuse(layer).swapped
    (got,), got_log_det = layer(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_log_det, log_det)


def test_what_is_left_and_why(reasons):
    def of(kind, **options):
        return reasons(kind([(4,)], subnet_constructor=dense, **options))[0]

    assert "not known" in of(Fm.GLOWCouplingBlock, clamp_activation=lambda u: u.tanh())
    assert "clamp is 0" in of(Fm.GLOWCouplingBlock, clamp=0)
    assert "empty" in of(Fm.AffineCouplingOneSided, split_len=4)
    assert "sum to nothing" in of(Fm.GINCouplingBlock)
    assert "sum to nothing" in of(Fm.AllInOneBlock, gin_block=True)
    assert "additive" in of(Fm.NICECouplingBlock)

    class Mine(Fm.GLOWCouplingBlock):
        def _coupling1(self, x1, u2, rev=False):
            return x1, 0.0

    assert "subclass of GLOWCouplingBlock" in of(Mine)
    changed = Fm.AllInOneBlock([(4,)], subnet_constructor=dense)
    changed._affine = lambda x, a, rev=False: (x, 0)
    assert "_affine was replaced" in reasons(changed)[0]
