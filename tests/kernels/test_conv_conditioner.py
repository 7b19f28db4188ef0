"""The conditioner as an op, and in a fused step.

Its kernels: test_conv_conditioner_native.py, test_conv_conditioner_amx.py.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hybridflow.flow.coupling import FlowStep
from hybridflow.flow.coupling import conv_conditioner as make_conditioner
from hybridflow.kernels import _backend, conv_conditioner, fuse, native, unfuse
from hybridflow.kernels.conv_conditioner import reference
from hybridflow.kernels.swap import _choices
from hybridflow.kernels.swap import hybridflow as swap

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing())


def plain(a, weight1, bias1, weight2, bias2):
    pad = weight1.shape[2] // 2
    return F.conv2d(F.conv2d(a, weight1, bias1, padding=pad).relu(), weight2, bias2, padding=pad)


def operands(samples=5, inputs=3, hidden=20, outputs=6, size=3, image=(4, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (samples, inputs, *image),
        *((hidden, inputs, size, size), (hidden,), (outputs, hidden, size, size), (outputs,)),
    )
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [v.to(dtype).requires_grad_() for v in made]


def results(function, leaves):
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("image", ((4, 4), (1, 1), (5, 3)), ids=str)
def test_values_and_gradients_are_those_of_two_convolutions(size, image):
    leaves = operands(size=size, image=image)
    exact = results(plain, [v.detach().double().requires_grad_() for v in leaves])
    for got, want in zip(results(conv_conditioner, leaves), exact, strict=True):
        assert (got.double() - want).abs().max() <= 200 * 2**-24 * want.abs().max()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_other_types_are_left_to_pytorch(dtype):
    leaves = operands(dtype=dtype)
    for got, want in zip(results(conv_conditioner, leaves), results(plain, leaves), strict=True):
        assert torch.equal(got, want)


def test_compiled_whole_it_is_pytorchs_own():
    leaves = operands()
    compiled = torch.compile(conv_conditioner, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, leaves), results(plain, leaves), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_rounded_products_without_amx_are_the_reference_in_eager_mode_and_compiled():
    leaves = operands()
    want = results(reference.forward_rounded, leaves)
    rounded = functools.partial(conv_conditioner, products=torch.bfloat16)
    with native.load().using_tiles(None):
        assert all(map(torch.equal, results(rounded, leaves), want))
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, results(rounded, leaves), want))
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled, leaves), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "dtype", "products"),
    (
        ("products", torch.float32, torch.float16),
        ("products", torch.float32, torch.float32),
        ("a", torch.bfloat16, torch.bfloat16),
        ("a", torch.float64, torch.bfloat16),
    ),
)
def test_types_without_rounded_products_are_named(name, dtype, products):
    with pytest.raises(ValueError, match=f"^{name}: got torch.*, want torch"):
        conv_conditioner(*operands(dtype=dtype), products=products)


def test_an_expanded_gradient_and_strided_operands_are_read_right():
    leaves = operands()
    strided = [v.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for v in leaves]
    assert not any(v.is_contiguous() for v in strided)
    got = torch.autograd.grad(conv_conditioner(*strided).sum(), strided)
    want = torch.autograd.grad(plain(*leaves).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 200 * 2**-24 * w.abs().max()


def test_a_second_derivative_is_refused():
    leaves = operands()
    squares = conv_conditioner(*leaves).square()
    (grad,) = torch.autograd.grad(squares.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "position", "value"),
    (
        ("a", 0, torch.randn(5, 3, 4)),
        ("weight1", 1, torch.randn(20, 3, 2, 2)),
        ("weight1", 1, torch.randn(20, 4, 3, 3)),
        ("bias1", 2, torch.randn(19)),
        ("weight2", 3, torch.randn(6, 20, 1, 1)),
        ("bias2", 4, torch.randn(6, dtype=torch.float64)),
    ),
)
def test_operands_that_do_not_fit_are_named(name, position, value):
    given = operands()
    given[position] = value
    with pytest.raises(ValueError, match=f"^{name}: got .*, want "):
        conv_conditioner(*given)


# --- in a fused step -----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often a fused step takes the fused conditioner, where the table leaves it the choice."""
    made = []

    def counted(*operands, products=None):
        made.append(products)
        return conv_conditioner(*operands, products=products)

    monkeypatch.setattr(swap, "conv_conditioner", counted)
    with _choices.using(True):
        yield made


def step(conditioner=None, flip=False):
    torch.manual_seed(0)
    made = FlowStep(6, make_conditioner(3, 8, 6) if conditioner is None else conditioner, flip)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made.initialise(torch.randn(9, 6, 4, 4))
    return made


@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_a_fused_channels_last_step_takes_it_and_unfused_it_is_as_before(calls, direction):
    model, x = step(), torch.randn(9, 6, 4, 4).to(memory_format=torch.channels_last)
    before, log_det = getattr(model, direction)(x)
    fuse(model)
    after, fused_log_det = getattr(model, direction)(x)
    assert len(calls) == 1
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)
    assert torch.allclose(fused_log_det, log_det, rtol=1e-5, atol=1e-4)
    unfuse(model)
    assert torch.equal(getattr(model, direction)(x)[0], before) and len(calls) == 1


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_a_fused_step_multiplies_as_pytorch_is_told_to(calls, direction):
    """A contiguous one is a single op, but in float32 alone."""
    model, x = step(), torch.randn(9, 6, 4, 4)
    fuse(model)
    before, log_det = getattr(model, direction)(x)
    assert not calls
    torch.set_float32_matmul_precision("high")
    try:
        with native.load().using_tiles("emulated"):
            after, other_log_det = getattr(model, direction)(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls == [None]
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert torch.allclose(other_log_det, log_det, rtol=1e-3, atol=1e-3)


def strange(change):
    made = make_conditioner(3, 8, 6)
    change(made)
    return made


@pytest.mark.parametrize(
    "conditioner",
    (
        lambda: strange(lambda net: net[0].register_forward_hook(lambda *_: None)),
        lambda: strange(lambda net: net.register_forward_hook(lambda *_: None)),
        lambda: strange(lambda net: weight_norm(net[2])),
        lambda: strange(lambda net: net.__setitem__(1, nn.LeakyReLU())),
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
            *(nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        ),
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        ),
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        ),
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        ),
    ),
    ids=(
        "hook",
        "hook-of-all",
        "weight-norm",
        "leaky",
        "circular",
        "dilated",
        "no-bias",
        "1x1-3x3",
    ),
)
def test_any_other_conditioner_runs_as_it_is(calls, conditioner):
    model, x = step(conditioner()), torch.randn(9, 6, 4, 4)
    before = model(x)
    fuse(model)
    for got, want in zip(model(x), before, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not calls


def recorded(monkeypatch):
    """Both directions of conv_coupling as the step calls them, and the products asked for, on a "GPU"."""
    asked = []
    monkeypatch.setattr(swap, "_is_on_gpu", lambda x: True)

    def call(op, *args, products, **choices):
        asked.append((op.__name__, products))
        return op(*args, products=products, **choices)

    for op in (swap.conv_coupling, swap.conv_coupling_inverse):
        monkeypatch.setattr(swap, op.__name__, functools.partial(call, op))
    return asked


@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_under_autocast_on_a_gpu_the_step_is_one_op_with_its_products(
    calls, monkeypatch, direction
):
    """Results and gradients stay float32, and are as near to the exact ones as layer by layer."""
    asked, keys = recorded(monkeypatch), []
    device_key = swap.device_key
    monkeypatch.setattr(swap, "device_key", lambda *a: keys.append(a[1]) or device_key(*a))
    model, x = step(), torch.randn(9, 6, 4, 4)

    def run(model, x):
        got = getattr(model, direction)(x)
        return [*got, *torch.autograd.grad(sum(t.sum() for t in got), [*model.parameters()])]

    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, x)
        fuse(model)
        got = run(model, x)
    op = "conv_coupling" if direction == "forward" else "conv_coupling_inverse"
    assert asked == [(op, torch.bfloat16)] and keys == [torch.bfloat16] and not calls
    assert all(g.dtype is torch.float32 for g in got)

    def error(results):
        return sum((r - e).norm() / e.norm() for r, e in zip(results, exact, strict=True))

    assert error(got) <= 2 * error(plain)


@pytest.mark.parametrize(
    ("dtype", "autocast", "products"),
    (
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float16, None),
        (torch.float64, torch.bfloat16, None),
    ),
    ids=str,
)
def test_products_on_a_gpu_are_those_of_autocast(monkeypatch, dtype, autocast, products):
    """None: the layers run as they are."""
    asked, model = recorded(monkeypatch), step().to(dtype)
    fuse(model)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        model(torch.randn(9, 6, 4, 4, dtype=dtype))
    assert asked == ([("conv_coupling", products)] if products else [])


def test_while_it_is_traced_the_step_is_not_one_op(monkeypatch):
    asked, model = recorded(monkeypatch), step()
    fuse(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(9, 6, 4, 4))
    assert not asked


def test_it_is_not_taken_where_the_table_says_so(calls):
    model = step()
    fuse(model)
    with _choices.using(False):
        model(torch.randn(9, 6, 4, 4).to(memory_format=torch.channels_last))
    assert not calls


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_under_autocast_without_amx_a_fused_step_stays_float32(calls, direction):
    model, x = step(), torch.randn(9, 6, 4, 4)
    fuse(model)
    want = getattr(model, direction)(x)
    last = getattr(model, direction)(x.to(memory_format=torch.channels_last))
    assert calls == [None]
    with native.load().using_tiles(None), torch.autocast("cpu", torch.bfloat16):
        got = getattr(model, direction)(x)
        got_last = getattr(model, direction)(x.to(memory_format=torch.channels_last))
    assert calls == [None, None]
    for a, b in zip((*got, *got_last), (*want, *last), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    with native.load().using_tiles(None), torch.autocast("cpu", torch.float16):
        assert not torch.equal(getattr(model, direction)(x)[0], want[0])


@pytest.mark.parametrize("direction", ("forward", "inverse"))
def test_under_autocast_to_bfloat16_its_products_are_of_that_type(calls, direction):
    model, x = step(), torch.randn(9, 6, 4, 4)
    fuse(model)
    with native.load().using_tiles("emulated"):
        with torch.autocast("cpu", torch.bfloat16):
            rounded, log_det = getattr(model, direction)(x)
        with torch.autocast("cpu", torch.float16):
            getattr(model, direction)(x)
    assert calls == [torch.bfloat16]
    with _backend.using("reference"):
        exact, exact_log_det = getattr(model, direction)(x)
    assert 1e-4 < (rounded - exact).abs().max() < 0.1
    assert torch.allclose(log_det, exact_log_det, rtol=0.01, atol=0.2)


@pytest.mark.parametrize("direction", ("forward", "inverse"))
@pytest.mark.parametrize("flip", (False, True))
@pytest.mark.parametrize("on_gpu", (False, True))
def test_contiguous_or_on_a_gpu_the_whole_step_is_one_op(
    calls, monkeypatch, direction, flip, on_gpu
):
    if on_gpu:
        monkeypatch.setattr(swap, "_is_on_gpu", lambda x: True)
    whole = []
    for name in ("conv_coupling", "conv_coupling_inverse"):
        op = getattr(swap, name)
        monkeypatch.setattr(swap, name, lambda *a, op=op, **k: whole.append(op) or op(*a, **k))
    model, x, total = step(flip=flip), torch.randn(9, 6, 4, 4), torch.randn(9)
    want = getattr(model, direction)(x, total)
    fuse(model)
    got = getattr(model, direction)(x, total)
    assert len(whole) == 1 and not calls
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=1e-5, atol=1e-4)
    parameters = [*model.parameters()]
    grads = torch.autograd.grad(sum(t.sum() for t in got), parameters)
    for g, w in zip(
        grads, torch.autograd.grad(sum(t.sum() for t in want), parameters), strict=True
    ):
        assert torch.allclose(g, w, rtol=1e-3, atol=1e-3 * float(w.detach().abs().max()))
    with _choices.using(False):
        getattr(model, direction)(x)
    assert len(whole) == 1
