"""coupling_chain against the same steps one by one, and the memory it keeps."""

import functools

import pytest
import torch
from torch import nn

from hybridflow.kernels import (
    ChainStep,
    CouplingForm,
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    coupling_chain,
)

SIZE, TRANSFORMED = 5, 2


def make_steps(count=4, norm=True, index=None, dtype=torch.float64):
    def vector(n):
        return torch.randn(n, dtype=dtype, requires_grad=True)

    steps = []
    for i in range(count):
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2 * TRANSFORMED)).to(dtype)
        vectors = (vector(SIZE), vector(SIZE)) if norm else (None, None)
        form = CouplingForm("tanh" if i % 2 else "atan", shift_first=i == 2)
        flip = index is None and i % 2 == 1
        steps.append(ChainStep(net, TRANSFORMED, *vectors, vector(TRANSFORMED), form, flip, index))
    return steps


def one_by_one(x, steps, log_det, inverse):
    for step in reversed(steps) if inverse else steps:
        choices = {"form": step.form, "flip": step.flip, "index": step.index}
        if inverse or step.log_scale is None:
            order = torch.arange(SIZE) if step.index is None else step.index
            kept = order[TRANSFORMED:] if step.flip else order[: SIZE - TRANSFORMED]
            a = x[:, kept]
        else:
            vectors = (step.log_scale, step.bias)
            a = actnorm_identity(x, *vectors, transformed=TRANSFORMED, **choices)
        direction = actnorm_coupling_inverse if inverse else actnorm_coupling
        x, log_det = direction(x, step.conditioner(a), *step.vectors(), log_det, **choices)
    return x, log_det


def parameters_of(steps):
    vectors = [v for s in steps for v in s.vectors() if v is not None]
    return vectors + [p for s in steps for p in s.conditioner.parameters()]


def outputs_and_gradients(function, x, steps, log_det, inverse):
    out, total = function(x, steps, log_det, inverse=inverse)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + (total * total).sum()
    return [out, total, *torch.autograd.grad(loss, [x, log_det, *parameters_of(steps)])]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.float64
@pytest.mark.parametrize("inverse", (False, True), ids=("forward", "inverse"))
@pytest.mark.parametrize("norm", (True, False), ids=("actnorm", "bare"))
@pytest.mark.parametrize("index", (None, [4, 0, 2, 1, 3]), ids=("halves", "index"))
def test_values_and_gradients_are_those_of_the_steps(implementation, inverse, norm, index):
    index = None if index is None else torch.tensor(index)
    steps = make_steps(norm=norm, index=index)
    x = torch.randn(6, SIZE, dtype=torch.float64, requires_grad=True)
    log_det = torch.randn(6, dtype=torch.float64, requires_grad=True)
    want = outputs_and_gradients(one_by_one, x, steps, log_det, inverse)
    for keep_every in (None, 1, 3):
        chain = functools.partial(coupling_chain, keep_every=keep_every)
        got = outputs_and_gradients(chain, x, steps, log_det, inverse)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_in_float32_a_long_chain_keeps_its_gradients():
    """Inputs are recomputed through all later steps: their roundings add up, and stay small."""
    steps = make_steps(48, dtype=torch.float32)
    with torch.no_grad():
        for p in parameters_of(steps):
            p.mul_(0.3)
    x = torch.randn(32, SIZE, requires_grad=True)
    log_det = torch.zeros(32, requires_grad=True)
    got = outputs_and_gradients(coupling_chain, x, steps, log_det, False)
    want = outputs_and_gradients(one_by_one, x, steps, log_det, False)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-4 * w.abs().max()


def test_what_is_kept_for_the_backward_is_one_output_in_so_many():
    def kept(count, keep_every):
        steps = make_steps(count, dtype=torch.float32)
        parameters = {p.data_ptr() for p in parameters_of(steps)}
        sizes = []

        def pack(t):
            sizes.append(0 if t.data_ptr() in parameters else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x = torch.randn(32, SIZE, requires_grad=True)
            coupling_chain(x, steps, keep_every=keep_every)
        return sum(sizes)

    assert kept(48, None) == kept(8, None) == kept(8, 12) == 32 * SIZE
    assert kept(48, 12) == 4 * 32 * SIZE


def test_parameters_that_are_not_trained_get_no_gradient():
    steps = make_steps(2)
    frozen = steps[0].conditioner[0].weight.requires_grad_(False)
    x = torch.randn(3, SIZE, dtype=torch.float64)
    out, _ = coupling_chain(x, steps)
    out.sum().backward()
    assert frozen.grad is None and steps[0].conditioner[0].bias.grad is not None


def test_autocast_in_force_in_the_forward_is_so_in_the_backward():
    seen = []

    class Spy(nn.Linear):
        def forward(self, a):
            out = super().forward(a)
            seen.append(out.dtype)
            return out

    step = ChainStep(Spy(3, 2 * TRANSFORMED), TRANSFORMED)
    x = torch.randn(4, SIZE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = coupling_chain(x, [step])
    out.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_bad_arguments_are_refused_by_name():
    with _backend.using("reference"), pytest.raises(ValueError, match="steps: got none"):
        coupling_chain(torch.randn(3, 4), [])
    with pytest.raises(ValueError, match="keep_every: got 0, want at least 1"):
        coupling_chain(torch.randn(3, SIZE), make_steps(2), keep_every=0)
