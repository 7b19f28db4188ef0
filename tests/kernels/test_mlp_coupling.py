"""Every implementation against the specification, and the specification against PyTorch and calculus."""

import shutil

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import (
    CouplingForm,
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    mlp_coupling,
    mlp_coupling_inverse,
    native,
)

DIRECTIONS = (mlp_coupling, mlp_coupling_inverse)
# Samples, entries, both hidden layers: odd numbers of each, no sample and one, several panels and
# blocks of samples, more hidden units than a tile has, layers of two sizes.
SHAPES = (
    (5, 2, 3, 3),
    (1, 3, 20, 20),
    (0, 5, 20, 20),
    (37, 5, 20, 20),
    (33, 2, 64, 64),
    (19, 6, 70, 70),
    (3, 3, 20, 5),
    (16, 4, 7, 33),
)

directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda f: f.__name__)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
flips = pytest.mark.parametrize("flip", (False, True), ids=("last", "first"))


def operands(*shape, transformed=None, dtype=torch.float64, device="cpu"):
    """Random x, weights and biases, log_scale, bias, gain and log_det; none of them is near zero."""
    samples, size, first, second = shape
    moved = size // 2 if transformed is None else transformed
    kept = size - moved
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*n):
        return torch.randn(*n, generator=generator, dtype=torch.float64)

    values = [
        normal(samples, size),
        normal(first, kept) / kept**0.5,
        0.5 * normal(first),
        normal(second, first) / first**0.5,
        0.5 * normal(second),
        normal(2 * moved, second) / second**0.5,
        normal(2 * moved),
        0.3 * normal(size),
        normal(size),
        0.7 * normal(moved),
        normal(samples),
    ]
    return [v.to(device, dtype).requires_grad_() for v in values]


def outputs_and_gradients(direction, tensors, weights=None, **choices):
    """Both outputs, and the gradient of every operand that is given."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outputs = direction(*leaves, **choices)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator) for t in outputs]
    torch.autograd.backward(outputs, [w.to(t) for w, t in zip(weights, outputs, strict=True)])
    return [*(t.detach() for t in outputs), *(t.grad for t in leaves if t is not None)]


def specification(direction, tensors, weights=None, **choices):
    with _backend.using("reference"):
        doubles = [None if t is None else t.detach().cpu().double() for t in tensors]
        return outputs_and_gradients(direction, doubles, weights, **choices)


def assert_close(got, want, tolerance):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= tolerance * w.abs().max().clamp_min(1), f"output {i}"


# A product over H hidden units has the rounding of its terms; a sum over samples likewise.
TOLERANCE = {torch.float32: 400 * 2**-24, torch.float64: 1e-12}


@directions
@shapes
@flips
def test_values_and_every_gradient_match_the_specification(
    implementation, device, direction, shape, flip
):
    tensors = operands(*shape, dtype=torch.float32, device=device)
    got = outputs_and_gradients(direction, tensors, flip=flip)
    want = specification(direction, tensors, flip=flip)
    assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.float64
@directions
@shapes
def test_in_float64_they_match_to_its_rounding(implementation, device, direction, shape):
    tensors = operands(*shape, device=device)
    got, want = (f(direction, tensors) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float64])


@directions
@pytest.mark.parametrize(
    ("transformed", "absent"),
    ((1, ()), (1, (7, 8)), (2, (9,)), (3, (10,)), (4, (7, 8, 9, 10))),
    ids=str,
)
def test_splits_and_absent_operands(implementation, device, direction, transformed, absent):
    tensors = operands(18, 5, 9, 9, transformed=transformed, dtype=torch.float32, device=device)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    got, want = (f(direction, tensors, flip=True) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float32])


FORMS = (
    CouplingForm("exp", interleaved=True, leading="shift", factor=0.3),
    CouplingForm("tanh", clamp=0.8, norm_shift_first=True),
    CouplingForm("atan", clamp=1.3, interleaved=True, norm_shift_first=True),
    CouplingForm("two_sigmoid", shift_first=True, leading="shift"),
    CouplingForm("soft_clamp", clamp=2.0, shift_first=True, norm_shift_first=True),
    CouplingForm("sigmoid", eps=1e-3),
    CouplingForm("sigmoid", factor=-0.5),
    CouplingForm("inverse_sigmoid", factor=0.5),
)
forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: f.key)


@directions
@forms
def test_every_form_matches_the_specification(implementation, device, direction, form):
    tensors = operands(20, 5, 9, 6, dtype=torch.float32, device=device)
    got, want = (f(direction, tensors, form=form) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.float64
@directions
@forms
def test_every_form_matches_it_in_float64(implementation, device, direction, form):
    tensors = operands(5, 5, 9, 6, device=device)
    got, want = (f(direction, tensors, form=form) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float64])


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
@flips
@pytest.mark.parametrize(
    "shape", ((700, 2, 64, 64), (260, 64, 128, 128), (50, 130, 9, 260)), ids=str
)
def test_more_samples_and_units_than_a_native_block_has(direction, shape, flip):
    """Also wider hidden layers and vectors than the Triton kernels take."""
    tensors = operands(*shape, dtype=torch.float32)
    want = specification(direction, tensors, flip=flip)
    for isa in native.load().supported:
        with native.load().using(isa):
            got = outputs_and_gradients(direction, tensors, flip=flip)
        assert_close(got, want, 4 * TOLERANCE[torch.float32])


@directions
def test_a_triton_program_takes_several_blocks(monkeypatch, direction):
    triton_impl = pytest.importorskip("hybridflow.kernels.mlp_coupling.triton_impl")
    if torch.cuda.is_available():
        pytest.skip("it is the interpreter that is small")
    monkeypatch.setattr(triton_impl, "_PROGRAMS", 2)
    tensors = operands(16 * 4 + 3, 3, 4, 4)
    with _backend.using("triton"):
        got = outputs_and_gradients(direction, tensors)
    assert_close(got, specification(direction, tensors), TOLERANCE[torch.float64])


@directions
@flips
def test_the_specification_is_three_layers_and_the_coupling(direction, flip):
    tensors = operands(3, 5, 6, 7)

    def composed(x, w1, b1, w2, b2, w3, b3, log_scale, bias, gain, log_det, flip):
        if direction is mlp_coupling:
            a, coupling = actnorm_identity(x, log_scale, bias, flip=flip), actnorm_coupling
        else:
            a, coupling = x[:, 2:] if flip else x[:, :3], actnorm_coupling_inverse
        h1 = torch.nn.functional.linear(a, w1, b1).relu()
        h2 = torch.nn.functional.linear(h1, w2, b2).relu()
        params = torch.nn.functional.linear(h2, w3, b3)
        return coupling(x, params, log_scale, bias, gain, log_det, flip=flip)

    want = outputs_and_gradients(composed, tensors, flip=flip)
    assert_close(specification(direction, tensors, flip=flip), want, 1e-12)


@pytest.mark.float64
@directions
@flips
def test_gradients_match_finite_differences(implementation, device, direction, flip):
    tensors = operands(3, 3, 4, 5, device=device)
    fast = implementation == "triton"  # along one random direction: the interpreter is slow
    assert gradcheck(lambda *t: direction(*t, flip=flip), tensors, fast_mode=fast)


@pytest.mark.float64
@directions
@flips
@pytest.mark.parametrize("size", (2, 3, 5))
def test_log_det_is_that_of_the_jacobian(implementation, device, direction, flip, size):
    x, *others, _ = operands(1, size, 4, 4, device=device)
    others = [t.detach() for t in others]

    def flat(v):
        return direction(v.view_as(x), *others, flip=flip)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, x.detach().flatten())
    log_det = direction(x, *others, flip=flip)[1]
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-12)


@pytest.mark.float64
@flips
def test_inverse_undoes_forward_and_the_log_det(implementation, device, flip):
    x, *others, log_det = operands(7, 5, 20, 20, device=device)
    y, total = mlp_coupling(x, *others, log_det, flip=flip)
    back, zero = mlp_coupling_inverse(y, *others, total, flip=flip)
    assert (back - x).abs().max() < 1e-10
    assert (zero - log_det).abs().max() < 1e-10


@directions
@pytest.mark.parametrize("shape", ((0, 3, 5, 5), (21, 5, 20, 5), (35, 4, 64, 64)), ids=str)
def test_every_element_of_the_results_is_written(implementation, device, direction, shape):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        tensors = operands(*shape, dtype=torch.float32, device=device)
        assert all(t.isfinite().all() for t in outputs_and_gradients(direction, tensors))
    finally:
        torch.use_deterministic_algorithms(False)


@directions
def test_two_runs_are_bit_equal(implementation, device, direction):
    tensors = operands(37, 6, 40, 40, dtype=torch.float32, device=device)
    runs = [outputs_and_gradients(direction, tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
def test_results_do_not_depend_on_the_number_of_threads(direction):
    tensors = operands(2000, 6, 64, 64, dtype=torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(direction, tensors))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@directions
def test_a_sample_does_not_depend_on_the_others(implementation, device, direction):
    tensors = operands(40, 4, 16, 16, dtype=torch.float32, device=device)
    x, *others, log_det = (t.detach() for t in tensors)
    whole = direction(x, *others, log_det)
    for part in (slice(0, 1), slice(17, 40)):
        alone = direction(x[part], *others, log_det[part])
        for w, a in zip(whole, alone, strict=True):
            torch.testing.assert_close(a, w[part])


@directions
@pytest.mark.parametrize("layout", ("expanded", "transposed", "sliced"))
def test_gradients_and_inputs_of_any_layout(implementation, device, direction, layout):
    def lay_out(t):
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "transposed" and t.dim() > 1:
            return t.t().contiguous().t()
        return torch.stack((t, t), dim=-1)[..., 0]

    tensors = [t.detach() for t in operands(18, 4, 8, 8, dtype=torch.float32, device=device)]
    tensors = [lay_out(t) for t in tensors]
    outputs = (tensors[0], tensors[-1])
    weights = [lay_out(torch.linspace(-1, 1, t.numel()).view_as(t)) for t in outputs]
    leaves = [t.detach().requires_grad_() for t in tensors]  # the layouts are kept
    out, total = direction(*leaves)
    assert out.is_contiguous()
    torch.autograd.backward((out, total), [w.to(out) for w in weights])
    got = [out.detach(), total.detach(), *(t.grad for t in leaves)]
    assert_close(got, specification(direction, tensors, weights), TOLERANCE[torch.float32])


@directions
def test_a_missing_gradient_counts_as_zero(implementation, device, direction):
    for used in (0, 1):
        tensors = operands(3, 4, 8, 8, dtype=torch.float32, device=device)
        with _backend.using("reference"):
            doubles = [t.detach().cpu().double().requires_grad_() for t in tensors]
            want = torch.autograd.grad(direction(*doubles)[used].sum(), doubles, allow_unused=True)
        got = torch.autograd.grad(direction(*tensors)[used].sum(), tensors, allow_unused=True)
        assert [g is None for g in got] == [w is None for w in want] == [False] * 10 + [used == 0]
        assert_close(got[: 10 + used], want[: 10 + used], TOLERANCE[torch.float32])


@directions
def test_operands_and_gradients_are_left_as_they_were(implementation, device, direction):
    tensors = operands(18, 4, 8, 8, dtype=torch.float32, device=device)
    out, log_det = direction(*tensors)
    everything = [*tensors, torch.ones_like(out), torch.ones_like(log_det)]
    before = [t.detach().clone() for t in everything]
    torch.autograd.backward((out, log_det), everything[-2:])
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@directions
def test_large_operands_stay_finite(implementation, device, direction):
    """An actnorm that is far from its data's, and samples beside padding."""
    tensors = operands(3, 4, 8, 8, dtype=torch.float32, device=device)
    with torch.no_grad():
        tensors[0].mul_(1e4)
    want = specification(direction, tensors)
    assert all(w.isfinite().all() for w in want)
    assert_close(outputs_and_gradients(direction, tensors), want, TOLERANCE[torch.float32])


def test_only_the_output_is_kept_for_the_backward():
    tensors = operands(3, 4, 8, 8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, _ = mlp_coupling(*tensors)
    known = {t.data_ptr() for t in (out, *tensors)}
    assert kept and all(t.data_ptr() in known for t in kept)
    assert tensors[0].data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@directions
def test_16_bit_results_have_the_types_of_their_operands(direction, dtype):
    """x narrow, parameters float32, as in a model whose activations are narrow."""
    x, *others = operands(9, 5, 8, 8, dtype=torch.float32)
    tensors = [x.detach().to(dtype), *others]
    got = outputs_and_gradients(direction, tensors)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, *[torch.float32] * 10]
    assert_close(got, specification(direction, tensors), 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("given", (False, True))
def test_operators_are_registered_correctly(given):
    tensors = [t.detach() for t in operands(3, 5, 4, 6, dtype=torch.float32)]
    x, *parameters, gain, log_det = tensors
    if not given:
        parameters[6:] = None, None
    operands_ = (*parameters, gain if given else None)
    choices = (CouplingForm("atan", shift_first=given).key, given, not given)
    for op, arguments in (
        (torch.ops.hybridflow.mlp_coupling, (x, *operands_, log_det if given else None)),
        (torch.ops.hybridflow.mlp_coupling_backward, (x, log_det, x, *operands_)),
    ):
        torch.library.opcheck(op.default, (*arguments, *choices))


def step(x, *others):
    y, total = mlp_coupling(x, *others, flip=True)
    back, zero = mlp_coupling_inverse(y * 2, *others[:-1], flip=True)
    return (back * y).sum() + (total * zero).sum()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_the_functions_give_the_same(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    tensors = operands(3, 4, 8, 8, dtype=torch.float32)
    want = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*tensors), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_second_derivative_raises():
    tensors = operands(3, 4, 8, 8, dtype=torch.float32)
    loss = mlp_coupling(*tensors)[0].square().sum()
    (grad,) = torch.autograd.grad(loss, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_operands_are_named():
    x, w1, b1, w2, b2, w3, b3, log_scale, bias, gain, log_det = operands(3, 5, 6, 7)

    def message(*args, **choices):
        with pytest.raises(ValueError) as error:
            mlp_coupling(*args, **choices)
        return str(error.value)

    layers = (w1, b1, w2, b2, w3, b3)
    assert message(x[0], *layers) == "x: got shape (5,), want (B, D) with D at least 2"
    assert message(x[:, :1], *layers).startswith("x: got shape (3, 1), want")
    assert message(x.long(), *layers) == "x: got torch.int64, want a floating type"
    assert message(x, *layers[:4], w3[:3], b3).startswith("weight3: got shape (3, 7), want (2T,")
    assert message(x, *layers[:4], w3[0], b3).startswith("weight3: got shape (7,), want (2T,")
    assert message(x, *layers[:4], w3[:, :6], b3) == "weight3: got shape (4, 6), want (4, 7)"
    assert message(x, *layers[:5], b3[:3]) == "bias3: got shape (3,), want (4,)"
    assert message(x, w1, b1, w2[0], b2, w3, b3).startswith(
        "weight2: got shape (6,), want (H2, H1)"
    )
    assert message(x, w1, b1, w2[:, :5], b2, w3, b3) == "weight1: got shape (6, 3), want (5, 3)"
    assert message(x, w1, b1, w2, b2[:5], w3, b3) == "bias2: got shape (5,), want (7,)"
    assert message(x, w1[:, :2], *layers[1:]) == "weight1: got shape (6, 2), want (6, 3)"
    assert message(x, w1, b1[:5], *layers[2:]) == "bias1: got shape (5,), want (6,)"
    assert message(x, w1.to("meta"), *layers[1:]) == "weight1: got a tensor on meta, want cpu"
    assert message(x, *layers, log_scale).startswith("bias: got None, want both")
    assert message(x, *layers, log_scale, bias[:4]) == "bias: got shape (4,), want (5,)"
    assert message(x, *layers, log_scale, bias, gain[:1]) == "gain: got shape (1,), want (2,)"
    assert message(x, *layers, log_scale, bias, gain, log_det.float()) == (
        "log_det: got torch.float32, want torch.float64"
    )
    with pytest.raises(ValueError, match=r"^y: got shape"):
        mlp_coupling_inverse(x[0], *layers)
