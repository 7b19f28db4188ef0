"""The conditioner's products in bfloat16, by AMX and emulated, against the reference in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridflow.kernels import conv_conditioner, native

if not native.available():
    pytest.skip(native.why_missing(), allow_module_level=True)

from hybridflow.kernels.conv_conditioner import native_impl, reference

# samples, inputs, hidden, outputs, height, width, window
SHAPES = [
    (20, 2, 40, 4, 16, 16, 3),  # many chunks, the last one smaller
    (11, 4, 128, 8, 8, 8, 3),
    (17, 8, 30, 16, 4, 4, 3),
    (33, 32, 100, 64, 2, 2, 3),  # windows without a row to spare
    (1, 2, 7, 4, 16, 16, 3),
    (3, 2, 24, 4, 12, 5, 3),
    (2, 1, 1, 1, 5, 3, 3),
    (3, 5, 13, 3, 1, 1, 3),
    (9, 3, 20, 6, 7, 1, 3),
    (4, 11, 65, 26, 3, 9, 3),
    (2, 3, 33, 2, 31, 31, 3),  # an image larger than a chunk
    (5, 2, 32, 4, 6, 5, 1),
    (40, 3, 50, 6, 9, 4, 1),
    (1, 1, 3, 2, 1, 1, 1),
    (5, 3, 600, 6, 4, 4, 3),  # hidden rows in several items
    (0, 2, 9, 4, 4, 4, 3),
]


@pytest.fixture(autouse=True, params=["amx", "emulated"])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    library = native.load()
    if request.param == "amx" and library.tiles is None:
        pytest.skip("this processor, its kernel or the library's compiler lacks AMX")
    with library.using_tiles(request.param):
        yield request.param


def _operands(shape: tuple[int, ...], whole: bool = False) -> tuple[list[Tensor], Tensor]:
    """a, weights and biases, and the gradient of the output; if `whole`, small whole numbers."""
    samples, inputs, hidden, outputs, height, width, size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def made(*sizes: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, sizes, generator=generator).float()
        return torch.randn(*sizes, generator=generator)

    operands = [
        made(samples, inputs, height, width),
        *(made(hidden, inputs, size, size), made(hidden)),
        *(made(outputs, hidden, size, size), made(outputs)),
    ]
    return operands, made(samples, outputs, height, width)


def _tiles(operands: list[Tensor], grad: Tensor, parts: int = 1) -> list[Tensor]:
    out = native_impl.forward(*operands, parts=parts)
    return [out, *native_impl.backward(grad, *operands[:4], parts=parts)]


def _reference(operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [v.double().requires_grad_() for v in operands]
    out = reference.forward_rounded(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_where_every_sum_is_exact_so_is_every_result(shape, parts):
    operands, grad = _operands(shape, whole=True)
    for got, want in zip(_tiles(operands, grad, parts), _reference(operands, grad), strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda s: "-".join(map(str, s)))
def test_otherwise_results_differ_by_little_more_than_sums_in_float32(shape):
    """A hidden number that lies where its rounding changes differs by 2^-8 of it. Of those a sum in float32
    moves, one in some thousands; without rounding at all, results differ by 3e-3 and more."""
    operands, grad = _operands(shape)
    for got, want in zip(_tiles(operands, grad), _reference(operands, grad), strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda s: "-".join(map(str, s)))
def test_two_parts_hold_sixteen_bits_of_what_is_multiplied(shape):
    """What the ReLU sees is a whole number and a half, of more digits than one part has."""
    operands, grad = _operands(shape, whole=True)
    generator = torch.Generator().manual_seed(0)
    operands[0] = torch.randint(-700, 701, operands[0].shape, generator=generator).float()
    operands[2].fill_(0.5)
    operands[3] = torch.randn(operands[3].shape, generator=generator)
    grad = torch.randn(grad.shape, generator=generator)
    leaves = [v.double().requires_grad_() for v in operands]
    out = reference.forward(*leaves)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    for got, want in zip(_tiles(operands, grad, 2), exact, strict=True):
        assert (got - want).norm() <= 2e-5 * want.norm()
    of_one = _tiles(operands, grad, 1)[0]
    assert (of_one - exact[0]).norm() >= 1e-4 * exact[0].norm()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", [(70, 4, 40, 8, 8, 8, 3), (3, 12, 1100, 24, 2, 2, 3)])
def test_results_do_not_depend_on_the_run_or_the_number_of_threads(shape, parts):
    operands, grad = _operands(shape)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(_tiles(operands, grad, parts))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_what_an_earlier_call_left_in_memory_does_not_matter(parts):
    shape, other = SHAPES[0], SHAPES[3]
    clean = _tiles(*_operands(shape), parts)
    for poisoned in (shape, other):
        operands, grad = _operands(poisoned)
        nothing = [torch.full_like(v, float("nan")) for v in operands]
        _tiles(nothing, torch.full_like(grad, float("nan")), 3 - parts)
    again = _tiles(*_operands(shape), parts)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_reaches_what_depends_on_it_and_nothing_else(value, parts):
    operands, grad = _operands((6, 2, 40, 4, 8, 8, 3))
    operands[0][3, 0, 4, 5] = value
    want = _reference(operands, grad)[0]
    got = _tiles(operands, grad, parts)
    assert torch.equal(got[0].isfinite(), want.isfinite())
    assert not bool(got[2].isfinite().all())  # the gradient of weight1
    assert bool(got[5].isfinite().all())  # of bias2


def test_without_tiles_a_call_of_them_is_refused():
    with native.load().using_tiles(None), pytest.raises(native.NativeLibraryError, match="AMX"):
        _tiles(*_operands(SHAPES[5]))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_nan_before_the_relu_is_not_taken_for_zero(parts):
    operands, grad = _operands((2, 2, 5, 3, 4, 4, 3))
    operands[2][2] = float("nan")
    out, grad_a, *_ = _tiles(operands, grad, parts)
    assert bool(out.isnan().all()) and bool(grad_a.isfinite().all())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_unit_at_zero_or_at_minus_zero_has_no_gradient(parts):
    operands, grad = _operands((2, 2, 2, 3, 4, 4, 3))
    for operand, value in zip(operands[1:3], (0.0, -0.0), strict=True):
        operand.fill_(value)
    _, grad_a, grad_weight1, grad_bias1, *_ = _tiles(operands, grad, parts)
    assert not any(bool(g.any()) for g in (grad_a, grad_weight1, grad_bias1))


@pytest.mark.parametrize(("precision", "parts"), [("highest", 0), ("high", 2), ("medium", 1)])
def test_products_are_as_narrow_as_pytorch_is_told_its_own_may_be(precision, parts):
    operands, grad = _operands(SHAPES[2])
    leaves = [v.requires_grad_() for v in operands]
    torch.set_float32_matmul_precision(precision)
    try:
        out = conv_conditioner(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
    finally:
        torch.set_float32_matmul_precision("highest")
    want = _tiles([v.detach() for v in leaves], grad, parts)
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), want, strict=True))


def test_without_tiles_products_stay_in_float32():
    operands, grad = _operands(SHAPES[2])
    torch.set_float32_matmul_precision("high")
    try:
        with native.load().using_tiles(None):
            out = conv_conditioner(*operands)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(out, _tiles(operands, grad, 0)[0])
