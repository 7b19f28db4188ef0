"""fuse on zuko's layers."""

import functools

import pytest
import torch
from torch import nn

from hybridflow.kernels import fuse

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

from zuko.flows.coupling import GeneralCouplingTransform  # noqa: E402
from zuko.transforms import (  # noqa: E402
    AdditiveTransform,
    CouplingTransform,
    MonotonicAffineTransform,
)

both_slopes = pytest.mark.parametrize("slope", (None, 1e-2))


def univariate(slope):
    if slope is None:
        return MonotonicAffineTransform
    return functools.partial(MonotonicAffineTransform, slope=slope)


def run(context):
    def both_directions(model, x):
        c = None if context is None else context.to(x.dtype)
        flow = model(c)
        z, log_det = flow.transform.call_and_ladj(x)
        y, inverse_log_det = flow.transform.inv.call_and_ladj(x)
        torch.manual_seed(1)
        samples, log_prob = flow.rsample_and_log_prob((3,))
        results = [z, log_det, y, inverse_log_det, samples, log_prob, flow.log_prob(x)]
        return [*results, flow.transform(x), flow.transform.inv(x)]

    return both_directions


def couplings(context, **options):
    return zuko.flows.NICE(5, context, transforms=8, randmask=True, hidden_features=(8,), **options)


@both_slopes
@pytest.mark.parametrize("shape", ((7,), (3, 2)))
def test_vectors_with_a_context(unchanged_by_fuse, slope, shape):
    model = couplings(2, univariate=univariate(slope))
    unchanged_by_fuse(model, torch.randn(*shape, 5), run(torch.randn(shape[-1], 2)), layers=8)


def test_a_single_vector(unchanged_by_fuse):
    unchanged_by_fuse(couplings(0), torch.randn(5), run(None), layers=8)


def test_an_empty_batch(backend):
    model = couplings(0)
    fuse(model)
    for shape in (0,), (2, 0):
        z, log_det = model().transform.call_and_ladj(torch.randn(*shape, 5))
        assert z.shape == (*shape, 5)
        assert log_det.shape == shape


def test_what_a_layer_returns_is_still_a_coupling(backend):
    layer = GeneralCouplingTransform(5, hidden_features=(8,))
    shown, inverse_shown = repr(layer()), repr(layer().inv)
    names = repr(layer)
    fuse(layer)
    assert isinstance(layer(), CouplingTransform)
    assert repr(layer()) == shown
    assert repr(layer().inv) == inverse_shown
    assert repr(layer) == names
    transform, x = layer(), torch.randn(4, 5)
    assert transform.inv.inv is transform
    torch.testing.assert_close(transform.inv(transform(x)), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(x, transform(x)), transform.call_and_ladj(x)[1]
    )
    assert transform.forward_shape((5,)) == (5,)


def test_the_log_det_is_that_of_the_jacobian(backend):
    layer = GeneralCouplingTransform(4, mask=torch.tensor([1, 0, 0, 1]), hidden_features=(8,))
    layer = layer.double()
    fuse(layer)
    x = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer(), x)
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(
        layer().call_and_ladj(x)[1].item(), abs=1e-12
    )


def test_an_inverse_evaluates_the_network_once(backend):
    layer = GeneralCouplingTransform(5, hidden_features=(8,))
    calls = []
    layer.hyper.register_forward_hook(lambda *_: calls.append(1))
    fuse(layer)
    layer().inv.call_and_ladj(torch.randn(3, 5))
    assert len(calls) == 1


def test_a_state_with_another_mask_is_followed(backend):
    """The mask is a buffer: what was derived from the old one must not be used again."""
    masks = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    layer, other = (GeneralCouplingTransform(5, mask=m, hidden_features=(8,)) for m in masks)
    x = torch.randn(3, 5)
    fuse(layer)
    layer()(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer()(x), other()(x))


def test_func_transforms_run(backend):
    layer = GeneralCouplingTransform(5, hidden_features=(8,))
    x = torch.randn(3, 5)
    want = torch.func.vmap(torch.func.jacrev(lambda v: layer()(v)))(x)
    fuse(layer)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(lambda v: layer()(v)))(x), want)


def test_what_is_left_and_why(reasons):
    class Bent(MonotonicAffineTransform):
        pass

    spline = zuko.flows.NSF(3, transforms=1)
    assert reasons(spline) == []
    additive = GeneralCouplingTransform(4, univariate=AdditiveTransform, shapes=[()])
    assert "not affine" in reasons(additive)[0]
    assert "not affine" in reasons(GeneralCouplingTransform(4, univariate=Bent))[0]

    class Mine(GeneralCouplingTransform):
        pass

    assert "subclass" in reasons(nn.ModuleList([Mine(4)]))[0]
