"""Every implementation against the specification, and the specification against calculus."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import (
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    native,
)

DIRECTIONS = (actnorm_coupling, actnorm_coupling_inverse)
# Images, odd channels, vectors, one position, no sample, one sample, longer than a tile.
SHAPES = (
    (5, 4, 4, 4),
    (3, 5, 3),
    (33, 2),
    (18, 7),
    (6, 6, 1, 1),
    (0, 4, 2),
    (1, 2, 2),
    (2, 6, 20, 20),
)

directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda f: f.__name__)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
flips = pytest.mark.parametrize("flip", (False, True), ids=("last", "first"))


def outputs_and_gradients(direction, tensors, flip, weights=None):
    """Both outputs, the conditioner's input, and the gradient of every operand."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, log_det = direction(*leaves, flip=flip)
    a = actnorm_identity(leaves[0], *leaves[2:4], flip=flip)
    generator = torch.Generator().manual_seed(1)
    if weights is None:
        weights = [torch.randn(t.shape, generator=generator) for t in (out, log_det, a)]
    weights = [w.to(t) for w, t in zip(weights, (out, log_det, a), strict=True)]
    torch.autograd.backward((out, log_det, a), weights)
    return [out.detach(), log_det.detach(), a.detach(), *(t.grad for t in leaves)]


def specification(direction, tensors, flip, weights=None):
    with _backend.using("reference"):
        doubles = [t.detach().cpu().double() for t in tensors]
        return outputs_and_gradients(direction, doubles, flip, weights)


def assert_close(got, want, roundings=40):
    """Within some fp32 roundings of the largest element: sums have no smaller unit."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3), f"output {i}"


@directions
@shapes
@flips
def test_values_and_every_gradient_match_the_specification(
    implementation, device, operands, direction, shape, flip
):
    tensors = operands(*shape, device=device)
    got = outputs_and_gradients(direction, tensors, flip)
    assert_close(got, specification(direction, tensors, flip))


@pytest.mark.float64
@flips
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (4, 3)], ids=str)
def test_inverse_undoes_forward_and_the_log_det(implementation, device, operands, shape, flip):
    x, *others, log_det = operands(*shape, dtype=torch.float64, device=device)
    y, total = actnorm_coupling(x, *others, log_det, flip=flip)
    back, zero = actnorm_coupling_inverse(y, *others, total, flip=flip)
    assert (back - x).abs().max() < 1e-10
    assert (zero - log_det).abs().max() < 1e-10


@pytest.mark.float64
@directions
@flips
def test_gradients_match_finite_differences(implementation, device, operands, direction, flip):
    tensors = operands(2, 3, 2, dtype=torch.float64, device=device)
    fast = implementation == "triton"  # along one random direction: the interpreter is slow
    assert gradcheck(lambda *t: direction(*t, flip=flip), tensors, fast_mode=fast)
    identity = [tensors[i] for i in (0, 2, 3)]
    assert gradcheck(lambda *t: actnorm_identity(*t, flip=flip), identity, fast_mode=fast)


@pytest.mark.float64
@directions
@flips
def test_log_det_is_that_of_the_jacobian(implementation, device, operands, direction, flip):
    tensors = operands(1, 3, 2, dtype=torch.float64, device=device)
    x, *others = tensors[:5]

    def flat(v):
        return direction(v.view_as(x), *others, flip=flip)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, x.detach().flatten())
    log_det = direction(x, *others, flip=flip)[1]
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-12)


@directions
def test_every_element_of_the_results_is_written(implementation, device, operands, direction):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape, flip in itertools.product(((3, 5, 3), (18, 7), (0, 4, 2)), (False, True)):
            tensors = operands(*shape, device=device)
            assert all(t.isfinite().all() for t in outputs_and_gradients(direction, tensors, flip))
    finally:
        torch.use_deterministic_algorithms(False)


@directions
def test_two_runs_are_bit_equal(implementation, device, operands, direction):
    tensors = operands(37, 6, 4, device=device)
    runs = [outputs_and_gradients(direction, tensors, False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
def test_results_do_not_depend_on_the_number_of_threads(operands, direction):
    tensors = operands(70, 12, 16, 16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(direction, tensors, False))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@directions
def test_a_missing_gradient_counts_as_zero(implementation, device, operands, direction):
    for used in (0, 1):
        tensors = operands(3, 4, 2, device=device)
        with _backend.using("reference"):
            doubles = [t.detach().cpu().double().requires_grad_() for t in tensors]
            want = torch.autograd.grad(direction(*doubles)[used].sum(), doubles, allow_unused=True)
        got = torch.autograd.grad(direction(*tensors)[used].sum(), tensors, allow_unused=True)
        assert [g is None for g in got] == [w is None for w in want] == [False] * 5 + [used == 0]
        assert_close(got[: 5 + used], want[: 5 + used])


@directions
@pytest.mark.parametrize("layout", ("expanded", "transposed", "sliced"))
def test_gradients_and_inputs_of_any_layout(implementation, device, operands, direction, layout):
    shape = (4, 4, 3, 3)

    def lay_out(t):
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((t, t), dim=-1)[..., 0]

    plain = [t.detach() for t in operands(*shape, device=device)]
    tensors = [*map(lay_out, plain[:2]), *plain[2:]]
    out, log_det, a = outputs_and_gradients(direction, tensors, False)[:3]
    weights = [lay_out(torch.linspace(-1, 1, t.numel()).view_as(t)) for t in (out, log_det, a)]
    got = outputs_and_gradients(direction, tensors, False, weights)
    assert_close(got, specification(direction, tensors, False, weights))


@directions
def test_operands_and_gradients_are_left_as_they_were(implementation, device, operands, direction):
    tensors = operands(3, 4, 2, device=device)
    out, log_det = direction(*tensors)
    everything = [*tensors, torch.ones_like(out), torch.ones_like(log_det)]
    before = [t.detach().clone() for t in everything]
    torch.autograd.backward((out, log_det), everything[-2:])
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@directions
def test_large_operands_stay_finite(implementation, device, operands, direction):
    tensors = operands(4, 4, 8, device=device)
    with torch.no_grad():
        for t in tensors[:2]:
            t.copy_(1e4 * t.sign())
    want = specification(direction, tensors, False)
    assert all(w.isfinite().all() for w in want)
    assert_close(outputs_and_gradients(direction, tensors, False), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@directions
def test_16_bit_types_differ_by_their_own_rounding(operands, direction, dtype):
    """On the CPU these run by the reference; log-dets stay float32."""
    tensors = [t.detach().to(dtype) for t in operands(4, 4, 8)[:5]]
    out, log_det = direction(*tensors)
    with _backend.using("reference"):
        want, want_log_det = direction(*(t.double() for t in tensors))
    assert (out.dtype, log_det.dtype) == (dtype, torch.float32)
    assert (out - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    assert (log_det - want_log_det).abs().max() < 1e-5


def test_wrong_operands_are_named(operands):
    x, params, log_scale, bias, gain, log_det = operands(3, 4, 2)

    def message(*args):
        with pytest.raises(ValueError) as error:
            actnorm_coupling(*args)
        return str(error.value)

    assert message(x[:, :1], params, log_scale, bias, gain).startswith("x: got shape (3, 1, 2)")
    assert message(x, params[:, :2], log_scale, bias, gain) == (
        "params: got shape (3, 2, 2), want (3, 4, 2)"
    )
    assert message(x, params, log_scale, bias[:3], gain) == "bias: got shape (3,), want (4,)"
    assert message(x, params, log_scale, bias, gain, log_det.double()) == (
        "log_det: got torch.float64, want torch.float32"
    )
    assert message(x, params.to("meta"), log_scale, bias, gain) == (
        "params: got a tensor on meta, want cpu"
    )
    assert message(x, params, log_scale.long(), bias, gain).startswith("log_scale: got torch.int64")
