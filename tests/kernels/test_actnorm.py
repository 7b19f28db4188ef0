"""Actnorm alone: the map, and statistics in one pass."""

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import _backend, actnorm, actnorm_inverse, actnorm_statistics, native

SHAPES = ((300, 4, 4, 4), (5, 3, 7), (1, 2), (1, 3, 5), (700, 6), (33, 130, 3, 3))
DIRECTIONS = (actnorm, actnorm_inverse)

directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda f: f.__name__)


def operands_of(shape, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (shape, shape[1:2], shape[1:2], shape[:1])
    values = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return [v.to(device, dtype).requires_grad_() for v in values]


def outputs_and_gradients(direction, tensors, **choices):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, log_det = direction(*leaves, **choices)
    ((out * out).sum() + (log_det * log_det).sum()).backward()
    return [out.detach(), log_det.detach(), *(t.grad for t in leaves)]


def assert_close(got, want, roundings=100):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        error = (g.cpu().double() - w).abs().max()
        assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3), f"output {i}"


@directions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift_first", (False, True))
def test_values_and_gradients_match_the_specification(
    implementation, device, direction, shape, shift_first
):
    tensors = operands_of(shape, device)
    with _backend.using("reference"):
        doubles = [t.cpu().double() for t in tensors]
        want = outputs_and_gradients(direction, doubles, shift_first=shift_first)
    assert_close(outputs_and_gradients(direction, tensors, shift_first=shift_first), want)


@pytest.mark.float64
@pytest.mark.parametrize("shift_first", (False, True))
def test_inverse_undoes_forward_and_gradients_match_finite_differences(
    implementation, device, shift_first
):
    x, log_scale, bias, log_det = operands_of((3, 4, 2), device, torch.float64)
    y, total = actnorm(x, log_scale, bias, log_det, shift_first=shift_first)
    back, zero = actnorm_inverse(y, log_scale, bias, total, shift_first=shift_first)
    assert (back - x).abs().max() < 1e-12 and (zero - log_det).abs().max() < 1e-12
    assert (total - log_det - 2 * log_scale.sum()).abs().max() < 1e-12
    for direction in DIRECTIONS:
        assert gradcheck(
            lambda *t, f=direction: f(*t, shift_first=shift_first),
            (x, log_scale, bias, log_det),
            fast_mode=implementation == "triton",
        )


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
@pytest.mark.parametrize("used", ((0,), (1,), (0, 1)), ids=("y", "log-det", "both"))
@pytest.mark.parametrize("expanded", (False, True), ids=("", "expanded gradients"))
def test_operands_that_have_to_be_arranged_give_the_same_bits(direction, used, expanded):
    tensors = operands_of((5, 3, 4, 2))
    runs = []
    for step in (1, 2):  # a log_scale with gaps is arranged, and takes the general path
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        log_scale = leaves[1].repeat_interleave(step)[::step]
        results = direction(leaves[0], log_scale, *leaves[2:])
        if expanded:
            loss = sum(results[i].sum() for i in used)
        else:
            loss = sum((results[i] * results[i].cos()).sum() for i in used)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        runs.append([*results, *(torch.zeros(()) if g is None else g for g in grads)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", (0.0, 1e4))
@pytest.mark.parametrize("channels_last", (False, True))
def test_statistics_are_exact_far_from_zero_too(
    implementation, device, shape, offset, channels_last
):
    if channels_last and len(shape) != 4:
        pytest.skip("channels-last is a format of images")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    x[:, 0] = offset
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with _backend.using("reference"):
        want_scale, want_bias = actnorm_statistics(x.double())
    log_scale, bias = actnorm_statistics(x.to(device))
    assert log_scale.dtype == bias.dtype == torch.float32
    scale_error = (log_scale.cpu() - want_scale).abs().max()
    bias_error = (bias.cpu() - want_bias).abs() / (want_bias.abs() + 1)
    assert scale_error < (2e-6 if implementation == "native" or offset == 0 else 1e-3)
    assert bias_error.max() < (1e-5 if implementation == "native" or offset == 0 else 1e-3)


def test_statistics_standardise_and_survive_constant_channels(implementation, device):
    x = 3 * torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0)) - 2
    x[:, 2] = 7
    y, _ = actnorm(x.to(device), *actnorm_statistics(x.to(device)))
    y = y.cpu()
    moving = [0, 1, 3]
    assert y.mean((0, 2))[moving].abs().max() < 1e-5
    assert (y.var((0, 2), correction=0)[moving] - 1).abs().max() < 1e-5
    assert y[:, 2].abs().max() < 1e-3
    one = torch.randn(1, 3, device=device)
    assert all(t.isfinite().all() for t in actnorm_statistics(one))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_statistics_do_not_depend_on_the_number_of_threads():
    x = torch.randn(700, 12, 8, 8)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(actnorm_statistics(x))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_wrong_operands_are_named():
    x, log_scale, bias, _ = (t.detach() for t in operands_of((3, 4, 2)))
    for call, message in (
        (lambda: actnorm(x[0, 0], log_scale, bias), r"x: got shape \(2,\), want \(B, C"),
        (lambda: actnorm_inverse(x, log_scale[:2], bias), r"log_scale: got shape \(2,\), want"),
        (lambda: actnorm_inverse(x.int(), log_scale, bias), "y: got torch.int32"),
        (lambda: actnorm_statistics(x[:0]), r"x: got shape \(0, 4, 2\), want at least one"),
        (lambda: actnorm_statistics(x, variance_floor=0.0), r"variance_floor: got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
