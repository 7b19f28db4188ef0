"""fuse on FlowGMM's layers, of which these are doubles: FlowGMM is not on PyPI.

They have the names, attributes and formulas of the package flow_ssl, in other words.
"""

from enum import IntEnum

import pytest
import torch
from torch import nn

from hybridflow.kernels import fuse

COUPLING, NORM = "flow_ssl.realnvp.coupling_layer", "flow_ssl.invertible.normalizations"


class MaskType(IntEnum):
    CHECKERBOARD = 0
    CHANNEL_WISE = 1
    TABULAR = 2


class MaskChannelwise:
    type = MaskType.CHANNEL_WISE

    def __init__(self, reverse_mask):
        self.reverse_mask = reverse_mask

    def mask(self, x):
        first, second = x.chunk(2, dim=1)
        return (first, second) if self.reverse_mask else (second, first)

    def unmask(self, x_id, x_change):
        pair = (x_id, x_change) if self.reverse_mask else (x_change, x_id)
        return torch.cat(pair, dim=1)

    def mask_st_output(self, s, t):
        return s, t


class MaskTabular:
    type = MaskType.TABULAR

    def __init__(self, reverse_mask):
        self.reverse_mask = reverse_mask

    def mask(self, x):
        second = torch.arange(x.shape[1]) >= x.shape[1] // 2
        self.b = (second if self.reverse_mask else ~second).to(x.dtype)
        return x * self.b, x * (1 - self.b)

    def unmask(self, x_id, x_change):
        return x_id * self.b + x_change * (1 - self.b)

    def mask_st_output(self, s, t):
        return s * (1 - self.b), t * (1 - self.b)


class MaskCheckerboard(MaskTabular):
    type = MaskType.CHECKERBOARD


class Rescale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.weight * x


class CouplingLayerBase(nn.Module):
    def __init__(self, mask, st_net, rescale):
        super().__init__()
        self.mask, self.st_net = mask, st_net
        self.rescale = nn.utils.weight_norm(rescale)

    def _parts(self, x):
        kept, moved = self.mask.mask(x)
        s, t = self.st_net(kept).chunk(2, dim=1)
        return kept, moved, *self.mask.mask_st_output(self.rescale(s.tanh()), t)

    def forward(self, x, sldj=None, reverse=True):
        kept, moved, s, t = self._parts(x)
        if s.exp().isnan().any():
            raise RuntimeError("Scale factor has NaN entries")
        self._logdet = s.flatten(1).sum(1)
        return self.mask.unmask(kept, (moved + t) * s.exp())

    def inverse(self, y):
        kept, moved, s, t = self._parts(y)
        return self.mask.unmask(kept, moved * (-s).exp() - t)

    def logdet(self):
        return self._logdet


class CouplingLayer(CouplingLayerBase):
    __module__ = COUPLING

    def __init__(self, channels, mask):
        net = nn.Sequential(
            nn.Conv2d(channels // 2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, channels, 1)
        )
        super().__init__(mask, net, Rescale(channels // 2, 1, 1))


class CouplingLayerTabular(CouplingLayerBase):
    __module__ = COUPLING

    def __init__(self, dim, mask):
        net = nn.Sequential(nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, 2 * dim))
        super().__init__(mask, net, Rescale(dim))


class ActNormNd(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("initialized", torch.tensor(0))

    def forward(self, x):
        self._last_x_size = x.size()
        if not self.initialized:
            with torch.no_grad():
                rows = x.transpose(0, 1).flatten(1)
                self.bias.copy_(-rows.mean(1))
                self.weight.copy_(-0.5 * rows.var(1).clamp_min(0.2).log())
                self.initialized.fill_(1)
        return (x + self.bias.view(self.shape)) * self.weight.view(self.shape).exp()

    def inverse(self, y, logpy=None):
        assert self.initialized
        return y * (-self.weight.view(self.shape)).exp() - self.bias.view(self.shape)

    def logdet(self):
        return self.weight.view(self.shape).expand(self._last_x_size).flatten(1).sum(1)


class ActNorm1d(ActNormNd):
    __module__ = NORM
    shape = (1, -1)


class ActNorm2d(ActNormNd):
    __module__ = NORM
    shape = (1, -1, 1, 1)


class Flow(nn.Sequential):
    """Runs layers as flow_ssl's iSequential does."""

    def logdet(self):
        total = 0
        for layer in self:
            total += layer.logdet()
        return total

    def inverse(self, z):
        for layer in reversed(self):
            z = layer.inverse(z)
        return z


def both_directions(model, x):
    z = model(x)
    log_det = model.logdet()
    return [log_det - z.flatten(1).square().sum(1) / 2, z, log_det, model.inverse(x)]


def initialised(model, x):
    with torch.no_grad():
        model(x)
    return model


def couplings_and_norms(coupling, norm, size, mask):
    layers = []
    for i in range(8):
        layers += [norm(size), coupling(size, mask(reverse_mask=bool(i % 2)))]
    return Flow(*layers)


def fresh(model):
    """Without results of earlier calls, which as tensors of a graph cannot be copied."""
    for layer in model:
        layer.__dict__.pop("_logdet", None)
    return model


def run(model, x):
    results = both_directions(model, x)
    fresh(model)
    # weight_norm leaves its last weight on the module; without a graph it can be copied.
    with torch.no_grad():
        model(x)
    fresh(model)
    return results


def test_images(unchanged_by_fuse):
    x = torch.randn(6, 4, 3, 3)
    model = couplings_and_norms(CouplingLayer, ActNorm2d, 4, MaskChannelwise)
    unchanged_by_fuse(initialised(model, x), x, run, layers=16)


@pytest.mark.parametrize("size", (4, 5))
def test_vectors(unchanged_by_fuse, size):
    x = torch.randn(9, size)
    model = couplings_and_norms(CouplingLayerTabular, ActNorm1d, size, MaskTabular)
    unchanged_by_fuse(initialised(model, x), x, run, layers=16)


def test_the_first_batch_initialises_as_it_does_without(backend):
    plain, fused = ActNorm2d(3), ActNorm2d(3)
    fuse(fused)
    for x in 3 * torch.randn(2, 8, 3, 4, 4) + 1:
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(fused.logdet(), plain.logdet())
    assert fused.initialized == 1
    assert torch.equal(fused.weight, plain.weight)


def test_an_actnorm_that_was_never_initialised_has_no_inverse(backend):
    layer = ActNorm1d(3)
    fuse(layer)
    with pytest.raises(AssertionError):
        layer.inverse(torch.randn(2, 3))


def test_what_is_left_and_why(reasons):
    checkerboard = CouplingLayer(4, MaskCheckerboard(reverse_mask=False))
    assert "MaskCheckerboard" in reasons(checkerboard)[0]
    assert "MaskCheckerboard" in reasons(CouplingLayerTabular(4, checkerboard.mask))[0]

    class Mine(ActNorm1d):
        pass

    assert "subclass of ActNorm1d" in reasons(Mine(3))[0]
