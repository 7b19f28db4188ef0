"""Every implementation against the specification, and the specification against calculus."""

import itertools
import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.kernels import (
    CouplingForm,
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    native,
)
from hybridflow.kernels.actnorm_coupling.form import Scale

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


def assert_close(got, want, roundings=40, unit=1e-3):
    """Within some fp32 roundings of the largest element, and of the unit: a sum of terms that cancel
    has an error of the size of its terms."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(unit), f"output {i}"


@directions
@shapes
@flips
def test_values_and_every_gradient_match_the_specification(
    implementation, device, operands, direction, shape, flip
):
    tensors = operands(*shape, device=device)
    got = outputs_and_gradients(direction, tensors, flip)
    assert_close(got, specification(direction, tensors, flip))


# Of samples, channels and positions: a few of each, and more rows and columns than a tile has.
FEW = ((1, 3, 17), (2, 3, 5, 8), ((), (3,), (2, 3), (4, 4)))
MANY = ((70, 97), (67, 130, 1030), ((), (3,), (1, 2)))


def cases(count, seed, pool=FEW):
    """Random choices of form, split, memory format, shape, and of operands that may be absent."""
    draw = random.Random(seed)
    for i in range(count):
        samples, channels, positions = (draw.choice(options) for options in pool)
        shape = (samples, channels, *positions)
        form = CouplingForm(
            scale=get_args(Scale)[i % len(get_args(Scale))],
            clamp=draw.choice((0.8, 2.0)),
            eps=draw.choice((0.0, 1e-3)),
            factor=draw.choice((1.0, 0.1)),
            shift_first=draw.random() < 0.5,
            interleaved=draw.random() < 0.5,
            leading=draw.choice(("scale", "shift")),
            norm_shift_first=draw.random() < 0.5,
        )
        split = draw.choice(("last", "first", "index"))
        channels_last = len(shape) == 4 and draw.random() < 0.5
        present = {name for name in ("norm", "gain", "log_det") if draw.random() < 0.7}
        case = (shape, form, draw.randint(1, channels), split, channels_last, present)
        yield pytest.param(case, id=f"{i}-{form.scale}")


def apply_case(direction, tensors, case, weights=None):
    """Outputs and gradients of every operand that the case has."""
    _, form, _, split, channels_last, present = case
    x, params, log_scale, bias, gain, log_det = tensors
    choices = {"form": form, "flip": split == "first"}
    if split == "index":
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))
        choices["index"] = order.to(x.device)
    norm = "norm" in present
    operands = [x, params, *((log_scale, bias) if norm else (None, None))]
    operands += [gain if "gain" in present else None, log_det if "log_det" in present else None]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    given = list(leaves)
    if channels_last:
        given[:2] = (t.to(memory_format=torch.channels_last) for t in leaves[:2])
    out, total = direction(*given, **choices)
    if channels_last and not x.is_contiguous(memory_format=torch.channels_last):
        assert out.is_contiguous(memory_format=torch.channels_last)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator) for t in (out, total)]
    torch.autograd.backward(
        (out, total), [w.to(t) for w, t in zip(weights, (out, total), strict=True)]
    )
    grads = [t.grad for t in leaves if t is not None]
    return [out.detach(), total.detach(), *grads]


def case_operands(operands, case, **options):
    shape, _, transformed, *_ = case
    return operands(*shape, transformed=transformed, **options)


@directions
@pytest.mark.parametrize("case", list(cases(42, seed=0)))
def test_every_form_split_and_layout_matches_the_specification(
    implementation, device, operands, direction, case
):
    tensors = case_operands(operands, case, device=device)
    with _backend.using("reference"):
        doubles = [t.detach().cpu().double() for t in tensors]
        want = apply_case(direction, doubles, case)
    assert_close(apply_case(direction, tensors, case), want, roundings=100, unit=1)


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@directions
@pytest.mark.parametrize("case", list(cases(21, seed=1, pool=MANY)))
def test_more_rows_and_columns_than_a_native_tile_has(operands, direction, case):
    tensors = case_operands(operands, case)
    with _backend.using("reference"):
        want = apply_case(direction, [t.detach().double() for t in tensors], case)
    for isa in native.load().supported:
        with native.load().using(isa):
            assert_close(apply_case(direction, tensors, case), want, roundings=200, unit=1)


@pytest.mark.float64
@directions
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("plain", (True, False), ids=("plain", "every-other-choice"))
def test_every_scale_agrees_with_finite_differences_and_the_jacobian(
    implementation, device, operands, direction, scale, plain
):
    form = CouplingForm(scale, clamp=1.3)
    if not plain:
        form = replace(
            form, eps=1e-3, factor=0.5, shift_first=True, interleaved=True, leading="shift",
            norm_shift_first=True,
        )  # fmt: skip
    index = None if plain else torch.tensor([2, 0, 1], device=device)
    x, *others = operands(2, 3, 2, dtype=torch.float64, device=device)
    fast = implementation == "triton"

    def call(*t):
        return direction(*t, form=form, index=index)

    assert gradcheck(call, (x, *others), fast_mode=fast)
    others = [t.detach() for t in others]
    others[0] = others[0][:1]

    def flat(v):
        return call(v.view(1, 3, 2), *others[:4])[0].flatten()

    first = x.detach()[:1].flatten()
    jacobian = torch.autograd.functional.jacobian(flat, first)
    log_det = call(first.view(1, 3, 2), *others[:4])[1]
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-12)


def test_a_form_survives_the_string_an_operator_is_given():
    form = CouplingForm("atan", 1.9, 1e-3, 0.1, True, True, "shift", True)
    assert CouplingForm.parse(form.key) == form
    assert CouplingForm.parse(CouplingForm().key) == CouplingForm()


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("scale", "relu"),
        ("clamp", 0.0),
        ("eps", -1e-3),
        ("factor", float("inf")),
        ("leading", "bias"),
    ),
)
def test_a_form_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got {value!r}"):
        CouplingForm(**{field: value})


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


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("scale", get_args(Scale))
@directions
def test_16_bit_errors_are_at_most_twice_those_of_pytorch(operands, direction, scale, dtype):
    """Every output and gradient against float64; log-det and parameter gradients are float32."""
    form = CouplingForm(scale)
    tensors = operands(4, 4, 8)
    narrow = [t.detach().to(dtype) for t in tensors[:2]]
    wide = [t.detach() for t in tensors[2:]]
    present = {"norm", "gain", "log_det"}
    case = (tensors[0].shape, form, 2, "last", False, present)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(*n, generator=generator).to(dtype) for n in ((4, 4, 8), (4,))]
    got = apply_case(direction, [*narrow, *wide], case, weights)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, *[torch.float32] * 4]

    def plain(*t, form, flip):
        return in_pytorch(*t, form, direction)

    with _backend.using("reference"):
        doubles = [t.double() for t in (*narrow, *wide)]
        exact = apply_case(direction, doubles, case, weights)
    theirs = apply_case(plain, [t.to(dtype) for t in (*narrow, *wide)], case, weights)
    for i, (g, p, e) in enumerate(zip(got, theirs, exact, strict=True)):
        limit = 2 * (p.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max() / 4
        assert (g.double() - e).abs().max() <= limit, f"output {i}"


def in_pytorch(x, params, log_scale, bias, gain, log_det, form, direction):
    """What a user of PyTorch writes, in the type of its operands."""

    def channel(v):
        return v.view(-1, 1)

    raw, shift = params.chunk(2, dim=1)
    s = (
        channel(gain)
        * {
            "exp": lambda: raw,
            "tanh": raw.tanh,
            "atan": lambda: 0.636 * raw.atan(),
            "two_sigmoid": lambda: 2 * raw.sigmoid() - 1,
            "soft_clamp": lambda: raw / (1 + raw.abs()),
            "sigmoid": lambda: (raw + 2).sigmoid().log(),
            "inverse_sigmoid": lambda: -(raw + 2).sigmoid().log(),
        }[form.scale]()
    )
    own = s.flatten(1).sum(1) + x.shape[2] * log_scale.sum()
    if direction is actnorm_coupling:
        kept, moved = (x * channel(log_scale).exp() + channel(bias)).chunk(2, dim=1)
        return torch.cat((kept, moved * s.exp() + shift), dim=1), log_det + own
    kept, moved = x.chunk(2, dim=1)
    u = torch.cat((kept, (moved - shift) * (-s).exp()), dim=1)
    return (u - channel(bias)) * (-channel(log_scale)).exp(), log_det - own


@directions
def test_params_may_have_another_type_than_x(implementation, device, operands, direction):
    """As under autocast, where the conditioner computes in bfloat16."""
    if implementation == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    tensors = operands(5, 4, 4, 4, device=device)
    tensors[1] = tensors[1].detach().bfloat16().requires_grad_()
    got = outputs_and_gradients(direction, tensors, False)
    assert got[4].dtype == torch.bfloat16
    want = specification(direction, tensors, False)
    assert_close([*got[:4], *got[5:]], [*want[:4], *want[5:]])
    assert (got[4].double() - want[4]).abs().max() <= 2**-8 * want[4].abs().max()


def test_wrong_operands_are_named(operands):
    x, params, log_scale, bias, gain, log_det = operands(3, 4, 2)

    def message(*args, **choices):
        with pytest.raises(ValueError) as error:
            actnorm_coupling(*args, **choices)
        return str(error.value)

    assert message(x[:, 0, 0], params, log_scale, bias, gain).startswith("x: got shape (3,), want")
    assert message(x, params[:, :3], log_scale, bias, gain).startswith(
        "params: got shape (3, 3, 2)"
    )
    assert message(x, params[:2], log_scale, bias, gain) == (
        "params: got shape (2, 4, 2), want (3, 4, 2)"
    )
    assert message(x, params, log_scale, bias[:3], gain) == "bias: got shape (3,), want (4,)"
    assert message(x, params, log_scale).startswith("bias: got None, want both")
    assert message(x, params, log_scale, bias, gain, log_det.double()) == (
        "log_det: got torch.float64, want torch.float32"
    )
    assert message(x, params.to("meta"), log_scale, bias, gain) == (
        "params: got a tensor on meta, want cpu"
    )
    assert message(x, params, log_scale.long(), bias, gain).startswith("log_scale: got torch.int64")
    index = torch.arange(4)
    assert message(x, params, index=index[:3]) == "index: got shape (3,), want (4,)"
    assert message(x, params, index=index.int()) == "index: got torch.int32, want torch.int64"
    assert message(x, params, index=index, flip=True).startswith("flip: got True with an index")
    with pytest.raises(ValueError, match="transformed: got 4, want from 1 to 3"):
        actnorm_identity(x, log_scale, bias, transformed=4)


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@pytest.mark.parametrize("index", ([0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 1, 3]), ids=str)
def test_an_index_that_is_no_permutation_is_refused(operands, index):
    x, params, *_ = operands(3, 4, 2)
    with pytest.raises(ValueError, match="index: got"):
        actnorm_coupling(x, params, index=torch.tensor(index))
