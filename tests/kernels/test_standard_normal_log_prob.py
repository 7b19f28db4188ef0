"""Every implementation against the specification, and the specification against calculus."""

import math
import shutil

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal

from hybridflow.kernels import _backend, native
from hybridflow.kernels.standard_normal_log_prob import standard_normal_log_prob

# Images, vectors, scalars, longer than a tile and odd, no sample, one sample, no element.
SHAPES = ((5, 4, 4, 4), (33, 2), (7,), (2, 4999), (3, 1, 67), (0, 4, 2), (1, 6), (3, 0))

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
added = pytest.mark.parametrize("added", (False, True), ids=("alone", "added"))


def make(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    z = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    log_det_type = torch.float64 if dtype == torch.float64 else torch.float32
    log_det = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return z.requires_grad_(), log_det.to(device, log_det_type).requires_grad_()


def outputs_and_gradients(z, log_det, weight=None):
    """log_prob and the gradients of z and, if given, log_det."""
    leaves = [t for t in (z, log_det) if t is not None]
    log_prob = standard_normal_log_prob(z, log_det)
    if weight is None:
        weight = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    return log_prob.detach(), *torch.autograd.grad(log_prob, leaves, weight.to(log_prob))


def specification(z, log_det, weight=None):
    doubles = [None if t is None else t.detach().cpu().double() for t in (z, log_det)]
    with _backend.using("reference"):
        return outputs_and_gradients(
            *(None if t is None else t.requires_grad_() for t in doubles), weight
        )


def assert_close(got, want, roundings=4):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3)


@shapes
@added
def test_values_and_every_gradient_match_the_specification(implementation, device, shape, added):
    z, log_det = make(*shape, device=device)
    log_det = log_det if added else None
    assert_close(outputs_and_gradients(z, log_det), specification(z, log_det))


@pytest.mark.float64
def test_the_density_is_that_of_torch_distributions(implementation, device):
    z, log_det = make(4, 3, 5, dtype=torch.float64, device=device)
    want = Normal(0, 1).log_prob(z).sum((1, 2)) + log_det
    torch.testing.assert_close(standard_normal_log_prob(z, log_det), want)


@pytest.mark.float64
def test_gradients_match_finite_differences(implementation, device):
    assert gradcheck(standard_normal_log_prob, make(3, 2, 4, dtype=torch.float64, device=device))


@pytest.mark.parametrize("layout", ("channels last", "expanded", "transposed", "sliced"))
def test_gradients_and_inputs_of_any_layout(implementation, device, layout):
    def lay_out(t):
        if layout == "channels last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((t, t), dim=-1)[..., 0]

    z, log_det = (lay_out(t.detach()).requires_grad_() for t in make(4, 3, 5, 6, device=device))
    weight = lay_out(torch.linspace(-1, 1, 4, dtype=log_det.dtype, device=device))
    log_prob = standard_normal_log_prob(z, log_det)
    got = log_prob.detach(), *torch.autograd.grad(log_prob, (z, log_det), weight)
    assert_close(got, specification(z, log_det, weight.cpu()))
    if layout == "channels last":
        assert got[1].is_contiguous(memory_format=torch.channels_last)


def test_only_the_gradients_that_are_needed_are_computed(implementation, device):
    z, log_det = make(3, 4, device=device)
    only_z = standard_normal_log_prob(z, log_det.detach())
    only_log_det = standard_normal_log_prob(z.detach(), log_det)
    assert torch.equal(torch.autograd.grad(only_z.sum(), z)[0], -z)
    assert torch.equal(
        torch.autograd.grad(only_log_det.sum(), log_det)[0], torch.ones_like(log_det)
    )


def test_large_operands_stay_finite(implementation, device):
    z, log_det = make(4, 300, device=device)
    with torch.no_grad():
        z.copy_(1e4 * z.sign())
    got = outputs_and_gradients(z, log_det)
    assert all(g.isfinite().all() for g in got)
    assert_close(got, specification(z, log_det))


def test_every_element_of_the_results_is_written(implementation, device):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape in ((5, 3, 7), (2, 1500), (0, 4)):
            got = outputs_and_gradients(*make(*shape, device=device))
            assert all(t.isfinite().all() for t in got)
    finally:
        torch.use_deterministic_algorithms(False)


def test_operands_and_gradients_are_left_as_they_were(implementation, device):
    z, log_det = make(3, 4, device=device)
    log_prob = standard_normal_log_prob(z, log_det)
    everything = [z, log_det, torch.ones_like(log_prob)]
    before = [t.detach().clone() for t in everything]
    log_prob.backward(everything[2])
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_two_runs_are_bit_equal(implementation, device):
    operands = make(37, 67, device=device)
    runs = [outputs_and_gradients(*operands) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_results_do_not_depend_on_the_number_of_threads():
    operands = make(70, 12, 16, 16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(*operands))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@pytest.mark.parametrize("shape", ((5, 67), (3, 2500)), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("isa", native.load().supported if native.available() else ())
def test_16_bit_types_differ_by_their_own_rounding(isa, dtype, shape):
    """The result is float32; the gradient is that of the rounded z, rounded once."""
    z, log_det = make(*shape, dtype=dtype)
    with native.load().using(isa):
        got = outputs_and_gradients(z, log_det)
    want = specification(z, log_det)
    assert [g.dtype for g in got] == [torch.float32, dtype, torch.float32]
    assert_close((got[0], got[2]), (want[0], want[2]))
    assert torch.equal(got[1], want[1].float().to(dtype))


@added
def test_operators_are_registered_correctly(added):
    ops = torch.ops.hybridflow
    z, log_det = (t.detach() for t in make(3, 4, 2, 5))
    for laid_out in (z, z.contiguous(memory_format=torch.channels_last)):
        arguments = laid_out, log_det if added else None
        torch.library.opcheck(ops.standard_normal_log_prob.default, arguments)
        torch.library.opcheck(ops.standard_normal_log_prob_backward.default, (log_det, laid_out))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_the_function_gives_the_same(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")

    def step(z, log_det):
        first = standard_normal_log_prob(z, log_det)
        return (standard_normal_log_prob(2 * z) * first).sum()

    leaves = make(4, 3, 2)
    want = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=backend)(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_the_constant_counts_every_dimension():
    assert standard_normal_log_prob(torch.zeros(1, 2, 3, 4)).item() == pytest.approx(
        -12 * math.log(2 * math.pi)
    )


def test_wrong_operands_are_named():
    z, log_det = make(3, 4)

    def message(*args):
        with pytest.raises(ValueError) as error:
            standard_normal_log_prob(*args)
        return str(error.value)

    assert message(torch.tensor(1.0)) == "z: got shape (), want (B, *dims)"
    assert message(z.long()) == "z: got torch.int64, want a floating type"
    assert message(z, log_det[:2]) == "log_det: got shape (2,), want (3,)"
    assert message(z, log_det.double()) == "log_det: got torch.float64, want torch.float32"
    assert message(z, log_det.to("meta")) == "log_det: got a tensor on meta, want cpu"
