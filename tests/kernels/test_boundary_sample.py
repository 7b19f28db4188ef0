"""Every implementation against the specification, the specification against calculus, and the samples
against their distribution."""

import math
import shutil

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import _backend, _philox, native
from hybridflow.kernels.boundary_sample import boundary_sample, op, reference

# (classes, size, count): odd sizes, two classes, one value, no sample, one sample, several blocks.
SIZES = ((3, 8, 20), (10, 64, 37), (2, 1, 9), (5, 2, 7), (7, 13, 1), (4, 6, 0), (17, 131, 3))
SIZES = (*SIZES, (3, 1050, 2), (100, 5, 6), (4, 20, 70))
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
betas = pytest.mark.parametrize("beta", (0.5, 0.3, 1.0))


def seed_of(value, device="cpu"):
    return torch.tensor(value, device=device)


def operands(classes, size, count, dtype=torch.float32, device="cpu"):
    """Means so near one another that every class has a share, and gradients of both results."""
    generator = torch.Generator().manual_seed(classes + size + count)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    spread = min(1.0, 2 / math.sqrt(size))
    return [1 + spread * normal(classes, size), normal(count, size), 10 * normal(count, classes)]


def samples_and_gradient(means, grad_z, grad_labels, beta=0.5, seed=5):
    means = means.detach().requires_grad_()
    key = seed_of(seed, means.device)
    z, labels = boundary_sample(means, grad_z.shape[0], beta=beta, seed=key)
    torch.autograd.backward((z, labels), (grad_z, grad_labels))
    return [z.detach(), labels.detach(), means.grad]


def specified(function, *tensors, **choices):
    with _backend.using("reference"):
        return function(*(t.detach().cpu().double() for t in tensors), **choices)


def assert_close(got, want, roundings=60):
    """Within some fp32 roundings of the largest element: sums have no smaller unit."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3), f"output {i}"


@sizes
@betas
def test_samples_and_gradients_match_the_specification(implementation, device, size, beta):
    tensors = operands(*size, device=device)
    got = samples_and_gradient(*tensors, beta=beta)
    want = specified(samples_and_gradient, *tensors, beta=beta)
    assert_close(got[:1], want[:1])
    # The logits are halves of squared distances, about d/2, and have the rounding of that.
    assert_close(got[1:], want[1:], roundings=60 + size[1] / 2)


def test_every_implementation_draws_the_same_classes(implementation, device):
    for classes in (2, 3, 10, 100):
        means = torch.zeros(classes, 2, device=device)
        seed = seed_of(-(2**45) + 1, device)
        got = op._forward(means, seed, 60, 0.5)[2]
        with _backend.using("reference"):
            assert torch.equal(got.cpu(), op._forward(means.cpu(), seed.cpu(), 60, 0.5)[2])


def test_the_samples_are_the_formula_of_their_classes_and_noise():
    means, _, _ = operands(4, 6, 30, dtype=torch.float64)
    seed = seed_of(8)
    z, labels, pair = reference.forward(means, seed, 30, 0.3)
    noise = math.hypot(0.3, 0.7) * _philox.normals(seed, 30, 6, torch.float64)
    torch.testing.assert_close(z, 0.3 * means[pair[:, 0]] + 0.7 * means[pair[:, 1]] + noise)
    normal = torch.distributions.Normal(means, 1.0)
    want = normal.log_prob(z[:, None]).sum(2).softmax(1)
    torch.testing.assert_close(labels, want)


@pytest.mark.float64
@betas
def test_gradients_match_finite_differences(implementation, device, beta):
    means = operands(3, 5, 4, dtype=torch.float64, device=device)[0].requires_grad_()
    seed, fast = seed_of(3, device), implementation == "triton"  # the interpreter is slow
    assert gradcheck(lambda m: boundary_sample(m, 4, beta=beta, seed=seed), means, fast_mode=fast)


@pytest.mark.float64
def test_float64_is_computed_as_such(implementation, device):
    tensors = operands(5, 11, 9, dtype=torch.float64, device=device)
    for g, w in zip(
        samples_and_gradient(*tensors), specified(samples_and_gradient, *tensors), strict=True
    ):
        assert (g.cpu() - w).abs().max() < 1e-12


# --- distribution --------------------------------------------------------------------------------


def test_the_noise_is_normal_and_independent():
    """Moments, tails, neighbours, samples and seeds; limits at five deviations."""
    n = 200 * 1003
    draws = torch.stack(
        [_philox.normals(seed_of(s), 200, 1003, torch.float64).flatten() for s in (1, 2, 2**32)]
    )
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        variance = math.prod(range(1, 2 * power, 2)) - moment**2
        error = (draws.pow(power).mean(1) - moment).abs().max()
        assert error < 5 * math.sqrt(variance / n), f"moment {power}"
    for limit in (1.0, 2.0, 3.0):
        share = math.erfc(limit / math.sqrt(2))
        error = ((draws.abs() > limit).double().mean(1) - share).abs().max()
        assert error < 5 * math.sqrt(share * (1 - share) / n), f"beyond {limit}"
    for lag in (1, 251, 502, 1003):  # neighbours, quarters of a sample, samples
        for f in (draws, (draws.square() - 1) / math.sqrt(2)):
            assert (f[:, lag:] * f[:, :-lag]).mean(1).abs().max() < 5 / math.sqrt(n - lag)
    between = draws @ draws.T / n
    assert (between - between.diag().diag()).abs().max() < 5 / math.sqrt(n)


def test_pairs_of_classes_are_different_and_uniform():
    for classes in (2, 3, 10):
        count = 50_000
        pair = reference._draw_classes(seed_of(11), count, classes)
        assert pair.min() == 0 and pair.max() == classes - 1
        assert (pair[:, 0] != pair[:, 1]).all()
        cells = torch.bincount(pair[:, 0] * classes + pair[:, 1], minlength=classes**2)
        share = 1 / (classes * (classes - 1))
        different = ~torch.eye(classes, dtype=torch.bool).flatten()
        error = (cells[different] / count - share).abs().max()
        assert error < 5 * math.sqrt(share / count)


def test_calls_draw_anew_and_manual_seed_repeats_them(implementation, device):
    means = operands(5, 8, 9, device=device)[0]
    torch.manual_seed(1)
    first, second = boundary_sample(means, 9), boundary_sample(means, 9)
    torch.manual_seed(1)
    again = boundary_sample(means, 9)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, c)
        assert (a != b).float().mean() > 0.9
    with_seed = [boundary_sample(means, 9, seed=seed_of(s, device))[0] for s in (3, 3, 4)]
    assert torch.equal(with_seed[0], with_seed[1])
    assert (with_seed[0] != with_seed[2]).float().mean() > 0.9


def test_soft_labels_do_not_depend_on_where_the_origin_is(implementation, device):
    """Means a thousand deviations away: ‖z‖² - 2zμ + ‖μ‖² would cancel; and one beyond float32."""
    for offset, limit in ((1e3, 2e-3), (1e4, 5e-2)):
        means = operands(4, 6, 30, device=device)[0]
        far = (means + offset).requires_grad_()
        z, labels = boundary_sample(far, 30, seed=seed_of(2, device))
        want = (-0.5 * (z.double()[:, None] - far.double()).square().sum(2)).softmax(1)
        assert (labels - want).abs().max() < 1e-5
        near = boundary_sample(means, 30, seed=seed_of(2, device))[1]
        assert (labels - near).abs().max() < limit  # what the rounding of z and the means leaves
        (z.sum() + labels[:, 0].sum()).backward()
        assert far.grad.isfinite().all()


def test_far_classes_have_no_share_and_everything_stays_finite(implementation, device):
    means = torch.tensor([[1e4, -1e4, 1e4], [-1e4, 1e4, 1e4]], device=device, requires_grad=True)
    z, labels = boundary_sample(means, 5, beta=1.0, seed=seed_of(2, device))
    assert torch.equal(labels.sort(1).values.cpu(), torch.tensor([[0.0, 1.0]]).expand(5, 2))
    (z.sum() + (labels * z[:, :1]).sum()).backward()
    assert means.grad.isfinite().all()


# --- autograd, memory, layouts -------------------------------------------------------------------


def test_every_element_of_the_results_is_written(implementation, device):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for size in ((3, 8, 20), (2, 1, 9), (4, 6, 0), (17, 131, 3)):
            results = samples_and_gradient(*operands(*size, device=device))
            assert all(t.isfinite().all() for t in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_are_bit_equal(implementation, device):
    tensors = operands(6, 30, 40, device=device)
    runs = [samples_and_gradient(*tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_results_do_not_depend_on_the_number_of_threads():
    tensors = operands(10, 700, 150)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(samples_and_gradient(*tensors))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_missing_gradient_counts_as_zero(implementation, device):
    means = operands(4, 6, 8, device=device)[0]
    for used in (0, 1):

        def gradient(means, used=used):
            means = means.detach().requires_grad_()
            out = boundary_sample(means, 8, seed=seed_of(1, means.device))[used]
            return torch.autograd.grad((out * out).sum(), means)

        assert_close(gradient(means), specified(gradient, means))


@pytest.mark.parametrize("layout", ("expanded", "transposed", "sliced"))
def test_gradients_and_means_of_any_layout(implementation, device, layout):
    def lay_out(t):
        if layout == "expanded":
            return t[:1, :1].expand(t.shape)
        if layout == "transposed":
            return t.T.contiguous().T
        return torch.stack((t, t), dim=-1)[..., 0]

    tensors = [lay_out(t) for t in operands(4, 6, 8, device=device)]
    assert_close(samples_and_gradient(*tensors), specified(samples_and_gradient, *tensors))


def test_operands_and_gradients_are_left_as_they_were(implementation, device):
    tensors = operands(4, 6, 8, device=device)
    before = [t.clone() for t in tensors]
    samples_and_gradient(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_of_16_bit_means_the_results_are_float32(dtype):
    """The means are the only 16-bit operand: results are those of float32 means of the same values."""
    means, *grads = operands(4, 6, 50)
    got = samples_and_gradient(means.to(dtype), *grads)
    want = samples_and_gradient(means.to(dtype).float(), *grads)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, dtype]
    assert all(torch.equal(g, w) for g, w in zip(got[:2], want[:2], strict=True))
    assert torch.equal(got[2], want[2].to(dtype))


# --- the compiler --------------------------------------------------------------------------------


def test_operators_are_registered_correctly():
    ops = torch.ops.hybridflow
    means, grad_z, grad_labels = operands(4, 6, 8)
    z, labels, pair = op._forward(means, seed_of(1), 8, 0.3)
    torch.library.opcheck(ops.boundary_sample.default, (means, seed_of(1), 8, 0.3))
    arguments = (grad_z, grad_labels, z, labels, pair, means, 0.3)
    torch.library.opcheck(ops.boundary_sample_backward.default, arguments)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_two_calls_draw_different_numbers(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")

    @torch.compile(fullgraph=True, backend=backend)
    def step(means, seed):
        z, labels = boundary_sample(means, 9)
        other, other_labels = boundary_sample(means, 9)
        fixed, fixed_labels = boundary_sample(means, 9, seed=seed)
        return z, labels, other, other_labels, fixed, fixed_labels

    means = operands(5, 7, 9)[0].requires_grad_()
    torch.manual_seed(1)
    out = step(means, seed_of(4))
    assert (out[0] != out[2]).float().mean() > 0.9
    want = boundary_sample(means, 9, seed=seed_of(4))
    assert all(torch.equal(g, w) for g, w in zip(out[4:], want, strict=True))
    got = torch.autograd.grad((out[4] * out[5].sum()).sum(), means)
    assert torch.equal(got[0], torch.autograd.grad((want[0] * want[1].sum()).sum(), means)[0])
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(out, step(means, seed_of(4)), strict=True))


def test_wrong_operands_are_named():
    means = torch.zeros(3, 4)

    def message(*args, **choices):
        with pytest.raises(ValueError) as error:
            boundary_sample(*args, **choices)
        return str(error.value)

    assert message(means[:1], 2) == "means: got shape (1, 4), want (K, d) with K at least 2"
    assert message(means[0], 2) == "means: got shape (4,), want (K, d) with K at least 2"
    assert message(means.long(), 2) == "means: got torch.int64, want a floating type"
    assert message(means, -1) == "count: got -1, want at least 0"
    assert message(means, 2, beta=math.inf) == "beta: got inf, want a finite number"
    assert message(means, 2, seed=torch.zeros(1).long()) == "seed: got shape (1,), want ()"
    assert message(means, 2, seed=seed_of(1, "meta")) == "seed: got a tensor on meta, want cpu"
    assert message(means, 2, seed=seed_of(1.0)) == "seed: got torch.float32, want torch.int64"


def test_the_gate_lists_every_kernel():
    pytest.importorskip("triton")
    from hybridflow.kernels.boundary_sample import gate

    for dtype in (torch.float32, torch.bfloat16):
        names = {launch.kernel.fn.__name__ for launch, _ in gate.launches((4, 8, 8), dtype)}
        assert len(names) == 3
