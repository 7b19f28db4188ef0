"""Every implementation against the specification, the specification against calculus, and the noise
against what it should be."""

import itertools
import math
import shutil

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import _backend, _philox, native
from hybridflow.kernels.dequantize_logit import (
    dequantize_logit,
    logit_transform,
    logit_transform_inverse,
    reference,
)

# Images, odd sizes, vectors, one value, no sample, one sample, longer than a tile, no value.
SHAPES = (
    *((5, 3, 4, 4), (3, 5, 3), (33, 2), (18, 7), (6, 1), (0, 4, 2), (1, 2, 65), (2, 3, 30, 30)),
    *((4, 130), (7,), (2, 0)),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
alphas = pytest.mark.parametrize("alpha", (0.0, 1e-6, 0.05, 0.3))


def seed_of(value, device="cpu"):
    return torch.tensor(value, device=device)


def grey_levels(*shape, levels=256, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(levels, shape, generator=generator, dtype=torch.uint8).to(device)


def unit(*shape, dtype=torch.float32, device="cpu"):
    """Values inside (0, 1), and operands of the results' weighted sum: gradients of y and log-det."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 0.01 + 0.98 * torch.rand(shape, generator=generator, dtype=torch.float64)
    log_det, grad_log_det = torch.randn(2, shape[0], generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype) for t in (x, log_det, grad, grad_log_det)]


def logit_everything(x, log_det, grad, grad_log_det, alpha=0.05):
    """Both results, both gradients, the way back and its gradient."""
    x, log_det = x.detach().requires_grad_(), log_det.detach().requires_grad_()
    y, total = logit_transform(x, alpha=alpha, log_det=log_det)
    torch.autograd.backward((y, total), (grad, grad_log_det))
    out = y.detach().requires_grad_()
    back = logit_transform_inverse(out, alpha=alpha)
    back.backward(grad)
    return [y.detach(), total.detach(), x.grad, log_det.grad, back.detach(), out.grad]


def specified(function, *tensors, **choices):
    with _backend.using("reference"):
        return function(*(t.detach().cpu().double() for t in tensors), **choices)


def assert_close(got, want, roundings=40):
    """Within some fp32 roundings of the largest element: sums have no smaller unit."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3), f"output {i}"


# --- dequantize_logit ----------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("given", (False, True), ids=("drawn", "given"))
def test_dequantised_values_match_the_specification(implementation, device, shape, given):
    choices = {"levels": 32, "alpha": 0.01} if given else {}
    x = grey_levels(*shape, levels=choices.get("levels", 256), device=device)
    seed, columns = seed_of(-(2**40) - 5, device), x.shape[1:].numel()
    log_det = unit(*shape, device=device)[1]
    noise = _philox.uniforms(seed.cpu(), shape[0], columns, torch.float64).view(shape)
    want = reference.dequantize(
        x.cpu(), None, noise, log_det.cpu().double(), *(choices.values() or (256, 0.05))
    )
    source = {"noise": noise.float().to(device)} if given else {"seed": seed}
    got = dequantize_logit(x, log_det=log_det, **source, **choices)
    assert [t.dtype for t in got] == [torch.float32] * 2
    assert_close(got, want)


def test_dequantised_values_are_those_of_the_formula():
    x, noise = grey_levels(4, 3, 5), torch.rand(4, 3, 5, dtype=torch.float64)
    y, log_det = dequantize_logit(x, noise=noise)
    scaled = (x + noise) / 256
    scaled.requires_grad_()
    want = torch.logit(0.05 + 0.9 * scaled)
    (slope,) = torch.autograd.grad(want.sum(), scaled)
    torch.testing.assert_close(y, want.detach())
    torch.testing.assert_close(log_det, slope.log().flatten(1).sum(1))


def test_every_implementation_draws_the_same_bits(implementation, device):
    """With one grey level of two and α = 0, u = 2σ(y), which gives small u back exactly."""
    for shape in ((3, 4099), (40, 130)):
        seed = seed_of(2**62 + 12345, device)
        x = torch.zeros(shape, dtype=torch.uint8, device=device)
        y = dequantize_logit(x, levels=2, alpha=0.0, seed=seed)[0].cpu().double()
        want = 2**24 * _philox.uniforms(seed.cpu(), *shape, torch.float64)
        got = 2**25 * y.sigmoid()
        small = want < 2**18
        assert small.sum() > 50
        assert torch.equal(got[small].round(), want[small])
        assert (got - want).abs().max() < 8


def test_the_random_bits_are_those_of_the_published_generator():
    """The known answer of Random123 for key 0 and counter 0, and the words of other counters by
    Python's own integers."""
    words = _philox.philox(seed_of(0), torch.zeros(1, dtype=torch.int64), 0)
    assert [w.item() for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed, block, stream in ((-1, 2**40 + 3, 1), (2**63 - 1, 2**32 - 1, 0)):
        key = [seed % 2**32, (seed >> 32) % 2**32]
        a, b, c, d = block % 2**32, block >> 32, stream, 0
        for _ in range(10):
            first, second = a * 0xD2511F53, c * 0xCD9E8D57
            a, b = (second >> 32) ^ b ^ key[0], second % 2**32
            c, d = (first >> 32) ^ d ^ key[1], first % 2**32
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        words = _philox.philox(seed_of(seed), torch.tensor([block]), stream)
        assert [w.item() for w in words] == [a, b, c, d]


def test_the_noise_is_uniform_and_independent():
    """Moments, occupation of 64 cells, neighbours, samples and seeds; limits at five deviations."""
    n = 200 * 1003
    draws = torch.stack(
        [_philox.uniforms(seed_of(s), 200, 1003, torch.float64).flatten() for s in (1, 2, 2**32)]
    )
    assert 0 <= draws.min() and draws.max() < 1
    assert (draws.mean(1) - 1 / 2).abs().max() < 5 / math.sqrt(12 * n)
    assert (draws.var(1) - 1 / 12).abs().max() < 5 / math.sqrt(180 * n)
    cells = torch.stack([torch.histc(u, 64, 0, 1) for u in draws])
    chi_square = ((cells - n / 64).square() / (n / 64)).sum(1)
    assert (chi_square - 63).abs().max() < 5 * math.sqrt(2 * 63)
    centred = (draws - 1 / 2) * math.sqrt(12)
    for lag in (1, 251, 1003):  # neighbours, quarters of a sample, samples
        correlation = (centred[:, lag:] * centred[:, :-lag]).mean(1)
        assert correlation.abs().max() < 5 / math.sqrt(n - lag)
    between = centred @ centred.T / n - torch.eye(3)
    assert (between - between.diag().diag()).abs().max() < 5 / math.sqrt(n)


def test_calls_draw_anew_and_manual_seed_repeats_them(implementation, device):
    x = grey_levels(3, 20, device=device)
    torch.manual_seed(1)
    first, second = dequantize_logit(x)[0], dequantize_logit(x)[0]
    torch.manual_seed(1)
    again = dequantize_logit(x)[0]
    assert torch.equal(first, again)
    assert (first != second).float().mean() > 0.9
    seed = seed_of(3, device)
    same, other = (dequantize_logit(x, seed=s)[0] for s in (seed, seed_of(4, device)))
    assert torch.equal(same, dequantize_logit(x, seed=seed)[0])
    assert (same != other).float().mean() > 0.9


def test_white_and_black_stay_finite_without_a_margin(implementation, device):
    """At α = 0, x + u must not round to `levels`, nor 1 - v to 0."""
    x = torch.tensor([[255, 0]], dtype=torch.uint8, device=device)
    noise = torch.tensor([[1 - 2**-24, 2**-24]], device=device)
    y, log_det = dequantize_logit(x, alpha=0.0, noise=noise)
    want = 32 * math.log(2)
    assert y.flatten().tolist() == pytest.approx([want, -want], rel=1e-5)
    assert log_det.item() == pytest.approx(2 * want, rel=1e-5)


def test_only_the_log_det_has_a_gradient(implementation, device):
    log_det = torch.zeros(3, device=device, requires_grad=True)
    noise = torch.rand(3, 5, device=device, requires_grad=True)
    y, total = dequantize_logit(grey_levels(3, 5, device=device), noise=noise, log_det=log_det)
    assert not y.requires_grad
    weights = torch.tensor([1.0, -2.0, 3.0], device=device)
    total.backward(weights)
    assert torch.equal(log_det.grad, weights)
    assert noise.grad is None


# --- logit_transform and its inverse -------------------------------------------------------------


@shapes
@alphas
def test_values_and_every_gradient_match_the_specification(implementation, device, shape, alpha):
    tensors = unit(*shape, device=device)
    got = logit_everything(*tensors, alpha=alpha)
    assert_close(got, specified(logit_everything, *tensors, alpha=alpha))


@pytest.mark.float64
def test_gradients_match_finite_differences(implementation, device):
    x, log_det = (t.requires_grad_() for t in unit(2, 3, 2, dtype=torch.float64, device=device)[:2])
    fast = implementation == "triton"  # along one random direction: the interpreter is slow
    assert gradcheck(lambda x, ld: logit_transform(x, log_det=ld), (x, log_det), fast_mode=fast)
    assert gradcheck(logit_transform_inverse, 6 * x.detach().requires_grad_() - 3, fast_mode=fast)


@pytest.mark.float64
@alphas
def test_log_det_is_that_of_the_jacobian_and_inverse_undoes(implementation, device, alpha):
    x = unit(1, 5, dtype=torch.float64, device=device)[0]
    y, log_det = logit_transform(x, alpha=alpha)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: logit_transform(v[None], alpha=alpha)[0][0], x[0]
    )
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-11)
    assert (logit_transform_inverse(y, alpha=alpha) - x).abs().max() < 1e-14


def test_the_ends_are_infinite_and_beyond_them_there_is_nothing(implementation, device):
    x = torch.tensor([[0.0], [1.0], [-0.1], [1.1], [math.nan], [1e4], [-1e4]], device=device)
    y, log_det = logit_transform(x, alpha=0.0)
    torch.testing.assert_close(y, x.logit(), equal_nan=True)
    want = torch.tensor([math.inf] * 2 + [math.nan] * 5, device=device)
    torch.testing.assert_close(log_det, want, equal_nan=True)


def test_large_operands_stay_finite(implementation, device):
    y = torch.tensor([-1e4, -80.0, 80.0, 1e4], device=device, requires_grad=True)
    x = logit_transform_inverse(y, alpha=0.0)
    x.sum().backward()
    want = y.detach().sigmoid()
    assert torch.equal(x[[0, 2, 3]], want[[0, 2, 3]])
    assert x[1].item() == pytest.approx(math.exp(-80), rel=1e-5)
    assert y.grad.tolist() == pytest.approx([0, math.exp(-80), math.exp(-80), 0], rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_errors_are_those_of_the_types_own_rounding(dtype):
    """Against float64, at most twice the error of the same formula in PyTorch in that type."""
    if not native.available():
        pytest.skip(native.why_missing())
    tensors = unit(20, 3, 17)
    x, grad, grad_log_det = (t.to(dtype) for t in (tensors[0], *tensors[2:]))

    def plain(x, grad, grad_log_det):
        x = x.detach().requires_grad_()
        y = (0.05 + 0.9 * x).logit()
        w = y.sigmoid()
        total = (math.log(0.9) - w.log() - (1 - w).log()).flatten(1).sum(1)
        torch.autograd.backward((y, total), (grad, grad_log_det.to(total)))
        return y.detach(), total.detach(), x.grad

    def ours(x, grad, grad_log_det):
        x = x.detach().requires_grad_()
        y, total = logit_transform(x)
        torch.autograd.backward((y, total), (grad, grad_log_det.to(total)))
        return y.detach(), total.detach(), x.grad

    want = plain(x.double(), grad.double(), grad_log_det)
    got = ours(x, grad, grad_log_det)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype]
    for g, p, w in zip(got, plain(x, grad, grad_log_det), want, strict=True):
        assert (g - w).abs().max() <= 2 * (p - w).abs().max()
    assert (got[1] - want[1]).abs().max() < 1e-4
    back = logit_transform_inverse(got[0])
    assert back.dtype == dtype
    assert (back - x).abs().max() <= 4 * torch.finfo(dtype).eps


# --- both ----------------------------------------------------------------------------------------


def everything(x, *tensors):
    drawn = dequantize_logit(grey_levels(*x.shape, device=x.device), seed=seed_of(9, x.device))
    return [*drawn, *logit_everything(x, *tensors)]


def test_every_element_of_the_results_is_written(implementation, device):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape in ((3, 5, 3), (18, 7), (0, 4, 2), (2, 300)):
            assert all(t.isfinite().all() for t in everything(*unit(*shape, device=device)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_are_bit_equal(implementation, device):
    tensors = unit(17, 6, 5, device=device)
    runs = [everything(*tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_results_do_not_depend_on_the_number_of_threads():
    tensors = unit(70, 12, 16, 16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(everything(*tensors))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_missing_gradient_counts_as_zero(implementation, device):
    x, log_det = (t.requires_grad_() for t in unit(3, 4, 2, device=device)[:2])
    for used in (0, 1):

        def gradients(x, log_det, used=used):
            x, log_det = x.detach().requires_grad_(), log_det.detach().requires_grad_()
            out = logit_transform(x, log_det=log_det)[used]
            return torch.autograd.grad(out.sum(), (x, log_det), allow_unused=True)

        got, want = gradients(x, log_det), specified(gradients, x, log_det)
        assert [g is None for g in got] == [w is None for w in want] == [False, used == 0]
        assert_close(got[: 1 + used], want[: 1 + used])
    assert logit_transform(x.detach(), log_det=log_det)[1].requires_grad


@pytest.mark.parametrize("layout", ("expanded", "transposed", "sliced"))
def test_gradients_and_inputs_of_any_layout(implementation, device, layout):
    def lay_out(t):
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((t, t), dim=-1)[..., 0]

    tensors = [lay_out(t) for t in unit(4, 3, 4, device=device)]
    got = logit_everything(*tensors)
    assert_close(got, specified(logit_everything, *tensors))
    x, noise = lay_out(grey_levels(4, 3, 4, device=device)), tensors[0]
    got = dequantize_logit(x, noise=noise, log_det=tensors[1])
    want = dequantize_logit(x.contiguous(), noise=noise.contiguous(), log_det=tensors[1])
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_operands_and_gradients_are_left_as_they_were(implementation, device):
    tensors = unit(3, 4, 2, device=device)
    x, seed = grey_levels(3, 4, 2, device=device), seed_of(1, device)
    operands = [*tensors, x, seed]
    before = [t.clone() for t in operands]
    logit_everything(*tensors)
    dequantize_logit(x, seed=seed, log_det=tensors[1])
    dequantize_logit(x, noise=tensors[0], log_det=tensors[1])
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def test_operators_are_registered_correctly():
    ops = torch.ops.hybridflow
    y, log_det, *_ = unit(3, 5)
    x = grey_levels(3, 5)
    for op, arguments in (
        (ops.dequantize_logit, (x, seed_of(1), None, log_det, 256, 0.05)),
        (ops.dequantize_logit, (x, None, y, None, 256, 0.05)),
        (ops.logit_transform, (y, log_det, 0.05)),
        (ops.logit_transform, (y.bfloat16(), None, 0.05)),
        (ops.logit_transform_backward, (y, log_det, y, 0.05)),
        (ops.logit_transform_inverse, (y, 0.05)),
        (ops.logit_transform_inverse_backward, (y, y, 0.05)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_two_calls_draw_different_numbers(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")

    @torch.compile(fullgraph=True, backend=backend)
    def step(grey, x, log_det):
        first, log_det = dequantize_logit(grey, log_det=log_det)
        second, log_det = dequantize_logit(grey, log_det=log_det)
        y, log_det = logit_transform(x, log_det=log_det)
        return first, second, y, log_det, logit_transform_inverse(2 * y)

    grey, x = grey_levels(5, 40), unit(5, 40)[0].requires_grad_()
    log_det = torch.zeros(5, requires_grad=True)
    torch.manual_seed(1)
    out = step(grey, x, log_det)
    assert (out[0] != out[1]).float().mean() > 0.9
    got = torch.autograd.grad(out[3].sum() + out[4].sum(), (x, log_det))
    y, total = logit_transform(x, log_det=log_det)
    want = torch.autograd.grad(total.sum() + logit_transform_inverse(2 * y).sum(), (x, log_det))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    torch.manual_seed(1)
    again = step(grey, x, log_det)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


def test_wrong_operands_are_named():
    x, y = grey_levels(3, 4), torch.rand(3, 4)

    def message(function, *args, **choices):
        with pytest.raises(ValueError) as error:
            function(*args, **choices)
        return str(error.value)

    for got, want in (
        (message(dequantize_logit, y), "x: got torch.float32, want torch.uint8"),
        (message(dequantize_logit, x[0, 0]), "x: got shape (), want (B, *dims)"),
        (message(dequantize_logit, x, levels=1), "levels: got 1, want from 2 to 256"),
        (
            message(dequantize_logit, x, alpha=0.5),
            "alpha: got 0.5, want at least 0 and below 1/2",
        ),
        (message(dequantize_logit, x, seed=torch.zeros(1).long()), "seed: got shape (1,), want ()"),
        (
            message(dequantize_logit, x, seed=torch.tensor(1.0)),
            "seed: got torch.float32, want torch.int64",
        ),
        (
            message(dequantize_logit, x, seed=seed_of(1, "meta")),
            "seed: got a tensor on meta, want cpu",
        ),
        (
            message(dequantize_logit, x, seed=seed_of(1), noise=y),
            "seed: got one beside noise, want one of the two",
        ),
        (message(dequantize_logit, x, noise=y[:, :2]), "noise: got shape (3, 2), want (3, 4)"),
        (message(dequantize_logit, x, noise=x), "noise: got torch.uint8, want a floating type"),
        (
            message(dequantize_logit, x, noise=y, log_det=y[:, 0].double()),
            "log_det: got torch.float64, want torch.float32",
        ),
        (message(logit_transform, x), "x: got torch.uint8, want a floating type"),
        (message(logit_transform, y, log_det=y), "log_det: got shape (3, 4), want (3,)"),
        (
            message(logit_transform, y, alpha=-0.1),
            "alpha: got -0.1, want at least 0 and below 1/2",
        ),
        (message(logit_transform_inverse, x), "y: got torch.uint8, want a floating type"),
        (
            message(logit_transform_inverse, y, alpha=math.nan),
            "alpha: got nan, want at least 0 and below 1/2",
        ),
    ):
        assert got == want


def test_the_gate_lists_every_kernel():
    pytest.importorskip("triton")
    from hybridflow.kernels.dequantize_logit import gate

    for shape, dtype in itertools.product(((4, 4, 4), (3,)), (torch.float32, torch.bfloat16)):
        names = {launch.kernel.fn.__name__ for launch, _ in gate.launches(shape, dtype)}
        assert len(names) == 5
