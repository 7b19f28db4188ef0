"""Every implementation against the specification, and the specification against PyTorch and calculus."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hybridflow.kernels import (
    CouplingForm,
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    conv_coupling,
    conv_coupling_inverse,
    native,
)

DIRECTIONS = (conv_coupling, conv_coupling_inverse)
# Samples, channels, height, width, hidden channels: odd numbers of each, no sample, one pixel, images
# of four pixels at most (dense weights) with and without hidden units split among programs.
SHAPES = (
    (5, 5, 3, 5, 7),
    (3, 3, 2, 2, 8),
    (3, 2, 1, 1, 3),
    (1, 3, 1, 4, 70),
    (0, 4, 4, 4, 8),
)
# An image of several tiles, and one with more columns than a block: cut alike in both directions.
LARGE = ((conv_coupling, (1, 3, 5, 13, 8)), (conv_coupling_inverse, (1, 18, 3, 2, 8)))
CONV, DENSE = (3, 5, 3, 2, 6), (3, 3, 2, 2, 4)

# The interpreter is slow: where a property holds of each alike, both directions and both ways to
# convolve are tried, but not every pair of them.


def _name(value):
    return getattr(value, "__name__", str(value))


directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda f: f.__name__)
pairs = pytest.mark.parametrize(
    ("direction", "shape", "flip"),
    ((conv_coupling, CONV, False), (conv_coupling_inverse, DENSE, True)),
    ids=("forward", "inverse"),
)


def operands(*shape, transformed=None, size=3, dtype=torch.float64, device="cpu"):
    """Random x, weights and biases, log_scale, bias, gain and log_det; none of them is near zero."""
    samples, channels, height, width, hidden = shape
    moved = channels // 2 if transformed is None else transformed
    kept = channels - moved
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*n):
        return torch.randn(*n, generator=generator, dtype=torch.float64)

    values = [
        normal(samples, channels, height, width),
        normal(hidden, kept, size, size) / (kept * size**2) ** 0.5,
        0.5 * normal(hidden),
        normal(2 * moved, hidden, size, size) / (hidden * size**2) ** 0.5,
        normal(2 * moved),
        0.3 * normal(channels),
        normal(channels),
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


# A product over H hidden units has the rounding of its terms; a sum over pixels likewise. In float16 a
# value that is rounded for a product may fall to either side, and what follows is off by a rounding.
TOLERANCE = {torch.float16: 8 * 2**-11, torch.float32: 400 * 2**-24, torch.float64: 1e-12}


@pytest.mark.float64
@pytest.mark.parametrize(
    ("direction", "shape"), (*itertools.product(DIRECTIONS, SHAPES), *LARGE), ids=_name
)
def test_values_and_every_gradient_match_the_specification(
    implementation, device, direction, shape
):
    tensors = operands(*shape, device=device)
    flip = direction is conv_coupling
    got = outputs_and_gradients(direction, tensors, flip=flip)
    assert_close(got, specification(direction, tensors, flip=flip), TOLERANCE[torch.float64])


@directions
@pytest.mark.parametrize("shape", ((3, 4, 4, 4, 32), (3, 3, 2, 2, 20), (0, 4, 4, 4, 8)), ids=str)
def test_in_float32_they_match_to_its_rounding(implementation, device, direction, shape):
    tensors = operands(*shape, dtype=torch.float32, device=device)
    got = outputs_and_gradients(direction, tensors)
    assert_close(got, specification(direction, tensors), TOLERANCE[torch.float32])


@directions
@pytest.mark.parametrize("shape", ((2, 4, 4, 2, 20), (2, 4, 2, 2, 20)), ids=("conv", "dense"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_products_of_16_bits_are_rounded_as_specified(
    implementation, device, direction, shape, dtype
):
    """Values and their gradient are of the given type, parameters, their gradients and the log-det have
    32 bits."""
    x, *others = operands(*shape, dtype=torch.float32, device=device)
    tensors = (x.detach().to(dtype), *others)
    got = outputs_and_gradients(direction, tensors, products=torch.float16)
    with _backend.using("reference"):
        want = outputs_and_gradients(direction, tensors, products=torch.float16)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    narrow = 2 if dtype is torch.float16 else 0  # the output, and the gradient of x
    assert [t.dtype for t in got].count(torch.float16) == narrow
    assert_close(got, [t.double() for t in want], TOLERANCE[torch.float16])


MIXED = (
    *itertools.product(DIRECTIONS, (CONV, DENSE, (1, 9, 3, 2, 8))),
    (conv_coupling, (1, 30, 2, 3, 8)),
)


@pytest.mark.float64
@pytest.mark.parametrize(("direction", "shape"), MIXED, ids=_name)
def test_every_operand_of_narrow_products_is_rounded_and_nothing_else(
    implementation, device, direction, shape
):
    """With float64 around float16 products, whatever is rounded elsewhere shows."""
    tensors = operands(*shape, device=device)
    flip = direction is conv_coupling
    choices = {"flip": flip, "products": torch.float16}
    got = outputs_and_gradients(direction, tensors, **choices)
    want = specification(direction, tensors, **choices)
    assert_close(got, want, TOLERANCE[torch.float64])
    exact = specification(direction, tensors, flip=flip)
    assert not any(map(torch.equal, want[:6], exact[:6]))  # results, gradients of x and of weights


class Rounded(torch.autograd.Function):
    """Its gradient is that of the identity."""

    @staticmethod
    def forward(ctx, v, dtype):
        return v.to(dtype).to(v)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, dtype):
        ctx.dtype = dtype
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad), None


@directions
@pytest.mark.parametrize("products", (torch.float16, torch.bfloat16))
def test_the_specification_of_narrow_products_is_convolutions_of_rounded_operands(
    direction, products
):
    tensors = operands(3, 5, 4, 3, 6)

    def convolution(v, weight, bias):
        v, weight = Rounded.apply(v, products), Rounded.apply(weight, products)
        out = RoundedGradient.apply(F.conv2d(v, weight, padding=1), products)
        return out + bias[:, None, None]

    def composed(x, w1, b1, w2, b2, log_scale, bias, gain, log_det):
        if direction is conv_coupling:
            a, coupling = actnorm_identity(x, log_scale, bias), actnorm_coupling
        else:
            a, coupling = x[:, :3], actnorm_coupling_inverse
        params = convolution(convolution(a, w1, b1).relu(), w2, b2)
        return coupling(x, params, log_scale, bias, gain, log_det)

    want = outputs_and_gradients(composed, tensors)
    assert_close(specification(direction, tensors, products=products), want, 1e-12)


@directions
def test_narrow_products_err_at_most_twice_as_much_as_pytorch_under_autocast(
    implementation, device, direction
):
    """In float32, where no rounding switches a ReLU. Of results of few numbers, whose error is a matter of
    luck, on average."""
    interpreted = implementation == "triton" and device == "cpu"
    products = torch.float16 if interpreted else torch.bfloat16
    tensors = operands(12, 6, 4, 4, 16, dtype=torch.float32, device=device)
    tensors[2] = 10 - 20.0 * (torch.arange(16, device=device) % 2)

    def layers(x, w1, b1, w2, b2, log_scale, bias, gain, log_det):
        with torch.autocast(device, products):
            if direction is conv_coupling:
                a, coupling = actnorm_identity(x, log_scale, bias), actnorm_coupling
            else:
                a, coupling = x[:, :3], actnorm_coupling_inverse
            params = F.conv2d(F.conv2d(a, w1, b1, padding=1).relu(), w2, b2, padding=1)
            assert params.dtype is products
            return coupling(x, params, log_scale, bias, gain, log_det)

    exact = specification(direction, tensors)
    ours = outputs_and_gradients(direction, tensors, products=products)
    with _backend.using("reference"):
        pytorchs = outputs_and_gradients(layers, tensors)

    def errors(got):
        pairs = zip(got[:-1], exact[:-1], strict=True)
        return [float((g.cpu() - w).norm() / w.norm()) for g, w in pairs]

    of_ours, of_pytorchs = errors(ours), errors(pytorchs)
    for one, other, want in zip(of_ours, of_pytorchs, exact[:-1], strict=True):
        assert one <= 2 * other or want.numel() < 32
    assert sum(of_ours) <= 2 * sum(of_pytorchs)
    assert all(g.dtype is torch.float32 for g in ours)


@directions
@pytest.mark.parametrize("products", (None, torch.float16))
def test_autocast_changes_nothing(implementation, device, direction, products):
    tensors = operands(3, 4, 3, 2, 4, dtype=torch.float32, device=device)
    want = outputs_and_gradients(direction, tensors, products=products)
    with torch.autocast(device, torch.bfloat16):
        got = outputs_and_gradients(direction, tensors, products=products)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_products_of_the_type_of_x_are_what_is_made_without_a_choice():
    tensors = operands(*CONV, dtype=torch.float32)
    runs = [
        outputs_and_gradients(conv_coupling, tensors, products=p) for p in (None, torch.float32)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.float64
@pytest.mark.parametrize(
    ("direction", "shape", "size", "transformed", "absent"),
    (
        (conv_coupling, CONV, 1, 1, ()),
        (conv_coupling_inverse, CONV, 3, 4, (5, 6)),
        (conv_coupling, CONV, 3, 2, (7, 8)),
        (conv_coupling_inverse, DENSE, 1, 2, (7,)),
        (conv_coupling, DENSE, 3, 1, (5, 6, 7, 8)),
    ),
    ids=str,
)
def test_sizes_splits_and_absent_operands(
    implementation, device, direction, shape, size, transformed, absent
):
    tensors = operands(*shape, transformed=transformed, size=size, device=device)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]
    got, want = (f(direction, tensors, flip=True) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float64])


FORMS = (
    CouplingForm("exp", interleaved=True, leading="shift", factor=0.3),
    CouplingForm("atan", clamp=1.3, norm_shift_first=True),
    CouplingForm("two_sigmoid", shift_first=True, leading="shift"),
    CouplingForm("soft_clamp", clamp=2.0, shift_first=True, norm_shift_first=True),
    CouplingForm("sigmoid", eps=1e-3),
    CouplingForm("inverse_sigmoid", factor=0.5),
)


@pytest.mark.float64
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.scale)
def test_every_form_matches_the_specification(implementation, device, form):
    """Interleaved ones of dense weights too; what else a form chooses does not know of these."""
    direction = DIRECTIONS[FORMS.index(form) % 2]
    tensors = operands(*(DENSE if form.interleaved else CONV), device=device)
    got, want = (f(direction, tensors, form=form) for f in (outputs_and_gradients, specification))
    assert_close(got, want, TOLERANCE[torch.float64])


@directions
@pytest.mark.parametrize("flip", (False, True), ids=("last", "first"))
def test_the_specification_is_two_convolutions_and_the_coupling(direction, flip):
    tensors = operands(3, 5, 4, 3, 6)

    def composed(x, w1, b1, w2, b2, log_scale, bias, gain, log_det, flip):
        if direction is conv_coupling:
            a, coupling = actnorm_identity(x, log_scale, bias, flip=flip), actnorm_coupling
        else:
            a, coupling = x[:, 2:] if flip else x[:, :3], actnorm_coupling_inverse
        params = F.conv2d(F.conv2d(a, w1, b1, padding=1).relu(), w2, b2, padding=1)
        return coupling(x, params, log_scale, bias, gain, log_det, flip=flip)

    want = outputs_and_gradients(composed, tensors, flip=flip)
    assert_close(specification(direction, tensors, flip=flip), want, 1e-12)


@pytest.mark.float64
@pytest.mark.parametrize(
    ("direction", "shape", "flip"),
    ((conv_coupling, (1, 2, 1, 5, 2), False), (conv_coupling_inverse, (1, 2, 1, 2, 2), True)),
    ids=("forward", "inverse"),
)
def test_gradients_match_finite_differences(implementation, device, direction, shape, flip):
    tensors = operands(*shape, device=device)
    once = implementation == "triton"  # along one random direction, of x and both weights
    if once:
        tensors = [t if i in (0, 1, 3) else t.detach() for i, t in enumerate(tensors)]
    assert gradcheck(
        lambda *t: direction(*t, flip=flip), tensors, fast_mode=once, check_undefined_grad=not once
    )


@pytest.mark.float64
@pytest.mark.parametrize(
    ("direction", "shape", "flip"),
    ((conv_coupling, (1, 2, 1, 5, 2), True), (conv_coupling_inverse, (1, 3, 1, 2, 4), False)),
    ids=("forward", "inverse"),
)
def test_log_det_is_that_of_the_jacobian(implementation, device, direction, shape, flip):
    x, *others, _ = operands(*shape, device=device)
    others = [t.detach() for t in others]

    def flat(v):
        return direction(v.view_as(x), *others, flip=flip)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, x.detach().flatten())
    log_det = direction(x, *others, flip=flip)[1]
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-12)


@pytest.mark.float64
@pytest.mark.parametrize(("shape", "flip"), ((CONV, True), (DENSE, False)), ids=("conv", "dense"))
def test_inverse_undoes_forward_and_the_log_det(implementation, device, shape, flip):
    x, *others, log_det = (t.detach() for t in operands(*shape, device=device))
    y, total = conv_coupling(x, *others, log_det, flip=flip)
    back, zero = conv_coupling_inverse(y, *others, total, flip=flip)
    assert (back - x).abs().max() < 1e-10
    assert (zero - log_det).abs().max() < 1e-10


@pairs
def test_every_element_of_the_results_is_written_the_same_in_each_run(
    implementation, device, direction, shape, flip
):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    tensors = operands(*shape, dtype=torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        runs = [outputs_and_gradients(direction, tensors, flip=flip) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("direction", "shape"),
    ((conv_coupling, (5, 3, 3, 3, 6)), (conv_coupling_inverse, (70, 2, 1, 2, 2))),
    ids=("conv", "dense"),
)
def test_in_slices_of_little_memory_and_in_two_launches_results_are_the_same(
    direction, shape, monkeypatch
):
    """Groups stay whole, so that even sums are of the same partial sums."""
    triton_impl = _triton_impl()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = operands(*shape, dtype=torch.float32, device=device)
    with _backend.using("triton"):
        whole = outputs_and_gradients(direction, tensors)
        monkeypatch.setattr(triton_impl, "_SCRATCH", 1)
        monkeypatch.setattr(triton_impl, "_BARRIER_ORDERS_STORES", False)
        plan = triton_impl.make_plan(
            shape[1], shape[1] // 2, *shape[2:4], 3, shape[4], torch.float32
        )
        assert len(plan.slices(shape[0], plan.forward, 2, 1)) == 2
        sliced = outputs_and_gradients(direction, tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


def test_scratch_memory_is_bounded_whatever_the_batch():
    triton_impl = _triton_impl()
    limit = triton_impl._SCRATCH // 4
    for channels, side, hidden in ((4, 16, 128), (12, 16, 512), (48, 4, 512), (192, 2, 1024)):
        plan = triton_impl.make_plan(channels, channels // 2, side, side, 3, hidden, torch.bfloat16)
        for product, part in ((plan.forward, channels), (plan.backward, channels // 2)):
            slices = plan.slices(100_000, product, part, limit)
            assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
            assert (slices[0].start, slices[-1].stop) == (0, 100_000)
            assert all(s.start % 16 == 0 for s in slices)
            assert all(plan.scratch(s.stop - s.start, product, part) <= limit for s in slices)
            assert len(slices) < 2 + plan.scratch(100_000, product, part) / (limit * 0.9)


def _triton_impl():
    pytest.importorskip("triton")
    from hybridflow.kernels.conv_coupling import triton_impl

    return triton_impl


@directions
def test_a_sample_does_not_depend_on_the_others(implementation, device, direction):
    tensors = operands(9, 4, 4, 2, 6, dtype=torch.float32, device=device)
    x, *others, log_det = (t.detach() for t in tensors)
    whole = direction(x, *others, log_det)
    for part in (slice(0, 1), slice(4, 9)):
        alone = direction(x[part], *others, log_det[part])
        for w, a in zip(whole, alone, strict=True):
            torch.testing.assert_close(a, w[part])


LAYOUTS = ("channels-last", "expanded", "transposed", "sliced")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_inputs_of_any_layout(implementation, device, layout):
    direction = DIRECTIONS[LAYOUTS.index(layout) % 2]

    def lay_out(t):
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "channels-last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.stack((t, t), dim=-1)[..., 0]

    tensors = [t.detach() for t in operands(3, 4, 3, 2, 4, dtype=torch.float32, device=device)]
    tensors = [lay_out(t) if t.dim() == 4 else t for t in tensors]
    shapes = (tensors[0], tensors[-1])
    weights = [lay_out(torch.linspace(-1, 1, t.numel()).view_as(t)) for t in shapes]
    leaves = [t.detach().requires_grad_() for t in tensors]  # the layouts are kept
    out, total = direction(*leaves)
    if layout == "channels-last":
        assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    else:
        assert out.is_contiguous()
    torch.autograd.backward((out, total), [w.to(out) for w in weights])
    got = [out.detach(), total.detach(), *(t.grad for t in leaves)]
    assert_close(got, specification(direction, tensors, weights), TOLERANCE[torch.float32])


@directions
def test_a_missing_gradient_counts_as_zero(implementation, device, direction):
    for used in (0, 1):
        tensors = operands(3, 4, 2, 2, 4, dtype=torch.float32, device=device)
        with _backend.using("reference"):
            doubles = [t.detach().cpu().double().requires_grad_() for t in tensors]
            want = torch.autograd.grad(direction(*doubles)[used].sum(), doubles, allow_unused=True)
        got = torch.autograd.grad(direction(*tensors)[used].sum(), tensors, allow_unused=True)
        assert [g is None for g in got] == [w is None for w in want] == [False] * 8 + [used == 0]
        assert_close(got[: 8 + used], want[: 8 + used], TOLERANCE[torch.float32])


@directions
def test_operands_and_gradients_are_left_as_they_were(implementation, device, direction):
    tensors = operands(3, 4, 3, 2, 4, dtype=torch.float32, device=device)
    out, log_det = direction(*tensors)
    everything = [*tensors, torch.ones_like(out), torch.ones_like(log_det)]
    before = [t.detach().clone() for t in everything]
    torch.autograd.backward((out, log_det), everything[-2:])
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_only_the_output_is_kept_for_the_backward_and_on_a_cpu_raw_and_shift(dtype):
    tensors = operands(3, 4, 4, 4, 8, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, _ = conv_coupling(*tensors)
    known = {t.data_ptr() for t in (out, *tensors)}
    others = [t.shape for t in kept if t.data_ptr() not in known]
    on_cpu = _backend.choose(out) == "native"
    assert kept and others == ([(3, 4, 4, 4)] if on_cpu else [])
    assert tensors[0].data_ptr() not in {t.data_ptr() for t in kept}


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
@pytest.mark.parametrize("flip", (False, True))
def test_in_one_native_call_with_raw_and_shift_kept_or_made_again_it_is_the_same(direction, flip):
    tensors = operands(5, 5, 3, 5, 7, dtype=torch.float32)
    weights = operands(5, 5, 3, 5, 7, dtype=torch.float32)[0], torch.ones(5)
    kept = outputs_and_gradients(direction, tensors, weights, flip=flip)
    tensors[0] = tensors[0].detach().to(memory_format=torch.channels_last)
    again = outputs_and_gradients(direction, tensors, weights, flip=flip)
    assert_close(again, [t.double() for t in kept], TOLERANCE[torch.float32])


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("given", (False, True))
def test_operators_are_registered_correctly(channels_last, given):
    tensors = [t.detach() for t in operands(3, 5, 2, 3, 4, dtype=torch.float32)]
    x, *parameters, gain, log_det = tensors
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if not given:
        parameters[4:] = None, None
    operands_ = (*parameters, gain if given else None)
    products = torch.bfloat16 if given else torch.float32
    choices = (CouplingForm("atan", shift_first=given).key, given, not given, products)
    for op, arguments in (
        (torch.ops.hybridflow.conv_coupling, (x, *operands_, log_det if given else None)),
        (torch.ops.hybridflow.conv_coupling_backward, (x, log_det, x, *operands_)),
    ):
        torch.library.opcheck(op.default, (*arguments, *choices))


def step(x, *others, products=None):
    y, total = conv_coupling(x, *others, flip=True, products=products)
    back, zero = conv_coupling_inverse(y * 2, *others[:-1], flip=True, products=products)
    return (back * y).sum() + (total * zero).sum()


@pytest.mark.parametrize("products", (None, torch.bfloat16))
def test_compiled_whole_the_functions_give_the_same(products):
    backend = "aot_eager" if products or shutil.which("g++") is None else "inductor"
    tensors = operands(3, 4, 3, 2, 8, dtype=torch.float32)
    want = torch.autograd.grad(step(*tensors, products=products), tensors)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*tensors, products=products), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_wrong_operands_are_named():
    x, w1, b1, w2, b2, log_scale, bias, gain, log_det = operands(3, 5, 4, 3, 6)

    def message(*args, **choices):
        with pytest.raises(ValueError) as error:
            conv_coupling(*args, **choices)
        return str(error.value)

    convolutions = (w1, b1, w2, b2)
    assert message(x[0], *convolutions).startswith("x: got shape (5, 4, 3), want (B, C, h, w)")
    assert message(x[:, :1], *convolutions).startswith("x: got shape (3, 1, 4, 3), want")
    assert message(x.long(), *convolutions) == "x: got torch.int64, want a floating type"
    assert message(x, w1, b1, w2[:3], b2).startswith("weight2: got shape (3, 6, 3, 3), want (2T,")
    assert message(x, w1, b1, w2[0], b2).startswith("weight2: got shape (6, 3, 3), want (2T,")
    assert message(x, w1, b1, w2[..., :2, :2], b2).endswith("and K one of (1, 3)")
    assert message(x, w1, b1, w2[..., :1], b2) == (
        "weight2: got shape (4, 6, 3, 1), want (4, 6, 3, 3)"
    )
    assert message(x, w1[:, :2], b1, w2, b2) == "weight1: got shape (6, 2, 3, 3), want (6, 3, 3, 3)"
    assert message(x, w1, b1[:5], w2, b2) == "bias1: got shape (5,), want (6,)"
    assert message(x, w1, b1, w2, b2[:3]) == "bias2: got shape (3,), want (4,)"
    assert message(x, w1.to("meta"), b1, w2, b2) == "weight1: got a tensor on meta, want cpu"
    assert message(x, *convolutions, log_scale).startswith("bias: got None, want both")
    assert message(x, *convolutions, log_scale, bias[:4]) == "bias: got shape (4,), want (5,)"
    assert message(x, *convolutions, log_scale, bias, gain[:1]) == "gain: got shape (1,), want (2,)"
    assert message(x, *convolutions, log_scale, bias, gain, log_det.float()) == (
        "log_det: got torch.float32, want torch.float64"
    )
    assert message(x, *convolutions, products=torch.float32) == (
        "products: got torch.float32, want torch.float64 or torch.float16 or torch.bfloat16 for x of "
        "torch.float64"
    )
    assert message(x.half(), *convolutions, products=torch.bfloat16) == (
        "products: got torch.bfloat16, want torch.float16 for x of torch.float16"
    )
    with pytest.raises(ValueError, match=r"^products: got torch.int8, .* for y of torch.float64$"):
        conv_coupling_inverse(x, *convolutions, products=torch.int8)
    with pytest.raises(ValueError, match=r"^y: got shape"):
        conv_coupling_inverse(x[0], *convolutions)
