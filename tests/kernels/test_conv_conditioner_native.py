"""The native conditioner against torch's convolutions in float64, for every instruction set."""

import platform
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.kernels import native

if not native.available():
    pytest.skip(native.why_missing(), allow_module_level=True)

from hybridflow.kernels.conv_conditioner import native_impl

# samples, inputs, hidden, outputs, height, width, window
SHAPES = [
    (20, 2, 40, 4, 16, 16, 3),
    (37, 4, 128, 8, 8, 8, 3),
    (17, 8, 30, 16, 4, 4, 3),
    (33, 32, 100, 64, 2, 2, 3),
    (1, 2, 7, 4, 16, 16, 3),  # in strips of one row
    (3, 2, 24, 4, 12, 5, 3),  # in strips of several
    (2, 1, 1, 1, 5, 3, 3),
    (3, 5, 13, 3, 1, 1, 3),
    (9, 3, 20, 6, 7, 1, 3),
    (4, 11, 65, 26, 3, 9, 3),
    (5, 2, 32, 4, 6, 5, 1),
    (40, 3, 50, 6, 9, 4, 1),
    (1, 1, 3, 2, 1, 1, 1),
    (24, 6, 512, 12, 8, 8, 3),  # hidden rows in several items
    (0, 2, 9, 4, 4, 4, 3),
]
# Of these, points of blocks need fewer products than positions, with any instruction set.
IN_BLOCKS = [
    (64, 2, 40, 4, 16, 16, 3),
    (96, 5, 27, 14, 4, 4, 3),
    (33, 12, 30, 25, 8, 8, 3),
    (64, 3, 1, 4, 4, 8, 3),
    (40, 3, 25, 7, 12, 20, 3),  # with an empty lane or two
    (9, 6, 50, 13, 20, 28, 3),  # an image in several groups
    (40, 6, 512, 12, 4, 8, 3),  # hidden rows in several items
    (65, 5, 37, 13, 2, 2, 3),  # blocks of two by two
    (20, 12, 512, 24, 2, 2, 3),  # the same in several items
    (34, 29, 35, 10, 2, 2, 3),  # more channels than a register has lanes
    (33, 21, 30, 9, 4, 4, 3),  # a few more
]


@pytest.fixture(autouse=True, params=native.load().supported)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.load().using(request.param):
        yield request.param


def _operands(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    samples, inputs, hidden, outputs, height, width, size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    operands = {
        "a": normal(samples, inputs, height, width),
        "weight1": normal(hidden, inputs, size, size) / (inputs * size**2) ** 0.5,
        "bias1": 0.3 * normal(hidden),
        "weight2": normal(outputs, hidden, size, size) / (hidden * size**2) ** 0.5,
        "bias2": normal(outputs),
    }
    return operands, normal(samples, outputs, height, width)


def _native(o: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    operands = tuple(o.values())
    return [native_impl.forward(*operands), *native_impl.backward(grad, *operands[:4])]


def _convolutions(leaves: list[Tensor]) -> Tensor:
    a, weight1, bias1, weight2, bias2 = leaves
    padding = weight1.shape[-1] // 2
    hidden = F.conv2d(a, weight1, bias1, padding=padding).relu()
    return F.conv2d(hidden, weight2, bias2, padding=padding)


def _reference(o: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [v.double().requires_grad_() for v in o.values()]
    out = _convolutions(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def _magnitudes(o: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    """The results if every operand and every sum had the sign +: what a rounding is relative to."""
    return _reference({k: v.abs() for k, v in o.items()}, grad.abs())


def _terms(shape: tuple[int, ...]) -> int:
    """An upper bound on the roundings on the way to one number of any result."""
    samples, inputs, hidden, outputs, height, width, size = shape
    return 4 + size**2 * (inputs + hidden + outputs) + samples * height * width


def _check(shape: tuple[int, ...], o: dict[str, Tensor], grad: Tensor) -> None:
    """|error| <= 2 sqrt(n) eps Σ|terms|: roundings of n operations that add up as a random walk
    (the guaranteed bound has n in place of its root), and 2 for the largest of many numbers. A unit
    whose sum is so close to zero that its rounding decides on which side of the ReLU it falls moves a
    gradient by more, but there the sum itself is that small; the operands here have none."""
    names = ("out", "grad_a", "grad_weight1", "grad_bias1", "grad_weight2", "grad_bias2")
    bound = 2 * _terms(shape) ** 0.5 * torch.finfo(torch.float32).eps
    results = _native(o, grad), _reference(o, grad), _magnitudes(o, grad)
    for name, got, want, magnitude in zip(names, *results, strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32, name
        assert bool(((got - want).abs() <= bound * magnitude).all()), name


@pytest.mark.parametrize("shape", SHAPES + IN_BLOCKS, ids=lambda s: "-".join(map(str, s)))
def test_output_and_every_gradient_are_those_of_two_convolutions(shape):
    _check(shape, *_operands(shape))


@pytest.mark.parametrize(
    "shape",
    [
        (64, 4, 130, 8, 8, 8, 3),
        (65, 12, 512, 24, 2, 2, 3),
        (24, 6, 512, 12, 4, 8, 3),
        (20, 5, 130, 8, 6, 8, 3),
        (24, 6, 512, 12, 7, 5, 3),
    ],
)
def test_results_do_not_depend_on_the_run_or_the_number_of_threads(shape):
    operands, grad = _operands(shape)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(_native(operands, grad))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("shape", "other"),
    [(SHAPES[9], SHAPES[3]), (IN_BLOCKS[0], SHAPES[9]), (IN_BLOCKS[4], IN_BLOCKS[5])],
)
def test_what_an_earlier_call_left_in_memory_does_not_matter(shape, other):
    clean = _native(*_operands(shape))
    for poisoned in (shape, other):
        operands, grad = _operands(poisoned)
        nothing = {k: torch.full_like(v, float("nan")) for k, v in operands.items()}
        _native(nothing, torch.full_like(grad, float("nan")))
    again = _native(*_operands(shape))
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_reaches_what_depends_on_it_and_nothing_else(value):
    shape = (20, 2, 40, 4, 7, 8, 3)
    operands, grad = _operands(shape)
    operands["a"][3, 0, 4, 5] = value
    want = _reference(operands, grad)[0]
    got = _native(operands, grad)
    assert torch.equal(got[0].isfinite(), want.isfinite())
    assert torch.equal(got[0].isnan(), want.isnan())
    assert not bool(got[3 - 1].isfinite().all())  # the gradient of weight1
    assert bool(got[5].isfinite().all())  # of bias2


@pytest.mark.parametrize(
    "shape", [s for s in IN_BLOCKS if s[4] > 2], ids=lambda s: "-".join(map(str, s))
)
def test_whole_batches_are_multiplied_in_blocks(shape):
    """Seen by what a pixel that is not finite takes along."""
    operands, grad = _operands(shape)
    operands["a"][0, 0, 0, 0] = float("nan")
    depends = _reference(operands, grad)[0].isnan()
    spread = _native(operands, grad)[0].isnan()
    assert bool((spread & ~depends).any()) and not bool((depends & ~spread).any())


def test_in_blocks_what_is_not_finite_may_reach_the_neighbours_that_share_a_block_and_nothing_else():
    operands, grad = _operands(IN_BLOCKS[0])
    operands["a"][3, 0, 4, 9] = float("inf")
    depends = _reference(operands, grad)[0].isfinite().logical_not()
    spread = _native(operands, grad)[0].isfinite().logical_not()
    assert bool((spread | ~depends).all())
    # Hidden blocks at rows 0 to 7 and columns 8 to 11 see the pixel, and their neighbours see these.
    spread[3, :, :9, 7:13] = False
    assert not bool(spread.any())


@pytest.mark.parametrize("shape", [(20, 2, 40, 4, 7, 8, 3), IN_BLOCKS[0]])
def test_a_gradient_that_is_not_finite_stays_in_its_image(shape):
    operands, grad = _operands(shape)
    grad[3, 1, 4, 5] = float("nan")
    _, grad_a, *_, grad_bias2 = _native(operands, grad)
    finite = grad_a.isfinite().flatten(1).all(1)
    assert finite.sum() == shape[0] - 1 and not finite[3]
    assert grad_bias2.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(2, 2, 5, 3, 4, 4, 3), (64, 2, 5, 3, 4, 4, 3)])
def test_a_nan_before_the_relu_is_not_taken_for_zero(shape):
    operands, grad = _operands(shape)
    operands["bias1"][2] = float("nan")
    out, grad_a, *_ = _native(operands, grad)
    assert bool(out.isnan().all()) and bool(grad_a.isfinite().all())


def test_empty_batches_have_gradients_of_zero():
    shape = (0, 2, 9, 4, 4, 4, 3)
    out, grad_a, *grads = _native(*_operands(shape))
    assert out.shape == (0, 4, 4, 4) and grad_a.shape == (0, 2, 4, 4)
    assert all(not bool(g.any()) for g in grads)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there this is asked for")
@pytest.mark.parametrize("shape", [(20, 2, 40, 4, 7, 8, 3), IN_BLOCKS[0]])
def test_denormal_numbers_count_as_zero_inside_and_nowhere_else(shape):
    operands, grad = _operands(shape)
    tiny = torch.full_like(grad, 1e-39)
    _, grad_a, *grads = _native(operands, tiny)
    assert not any(bool(g.any()) for g in (grad_a, *grads[:3]))  # but for bias2, which sums them
    assert bool((torch.full((4,), 2e-38) * 0.5 > 0).all())
