"""How a coupling is cut into tiles, and its weights as the matrices that the Triton kernels multiply by.

A plan depends on shape and type alone, so that sums are formed alike on every machine.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..actnorm_coupling.form import CouplingForm

__all__ = [
    "Plan",
    "Product",
    "blocks",
    "halves",
    "laid_out",
    "make_plan",
    "of_weight1",
    "of_weight2",
    "padded",
    "unhalved",
]

_DENSE_PIXELS = 4
_FEWEST_HIDDEN = 64  # below, a thread's share of a tile of weights is less than 16 bytes
_LARGEST_IMAGE = 2**31  # offsets from a program's first sample are counted in 32 bits


# --- plans ---------------------------------------------------------------------------------------


class Product(NamedTuple):
    """How the hidden units are walked: `units` at a time, `chunks` one after another in a program,
    `splits` programs side by side; and the blocks of the columns that come out."""

    units: int
    chunks: int
    splits: int
    columns: int
    column_blocks: int


class Plan(NamedTuple):
    """How a coupling is cut into tiles."""

    channels: int
    moved: int
    height: int
    width: int
    size: int  # of the convolutions' kernels
    dense: bool
    hidden: int  # padded, and with `dense` of all pixels
    inputs: int  # a block of the patches' columns
    input_blocks: int
    outputs: int
    output_blocks: int
    forward: Product
    backward: Product
    first_width: int  # of the rows of the first weights, transposed, with padding
    second_width: int
    tile: int
    widest: int  # columns of a tile of the weights' gradients

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def kept(self) -> int:
        return self.channels - self.moved

    @property
    def taps(self) -> int:
        return self.pixels if self.dense else self.size**2

    @property
    def slots(self) -> int:
        return triton.next_power_of_2(self.pixels)

    @property
    def row_slots(self) -> int:
        """Rows of a sample in a product."""
        return 1 if self.dense else self.slots

    @property
    def tiles(self) -> int:
        """Of the coupling, in an image, or 1 where images share one."""
        return triton.cdiv(self.pixels, self.tile)

    def groups(self, samples: int, slots: int, tile: int) -> int:
        """Programs of a batch whose samples have so many rows."""
        return triton.cdiv(samples, max(1, tile // slots))

    def slices(self, samples: int, product: Product, part: int, limit: int) -> list[slice]:
        """Of the batch, groups of which each has at most `limit` elements of scratch memory, but at
        least one group of every kernel's; and whole multiples of 16 samples, whose begin is aligned."""
        group = max(1, self.tile // self.row_slots)
        step = max(group, limit // self.scratch(1, product, part) // group * group)
        if step > 16:
            step -= step % 16
        return [slice(i, min(i + step, samples)) for i in range(0, samples, step)]

    def scratch(self, samples: int, product: Product, part: int) -> int:
        """Elements of a product's result: for each split, row and column."""
        columns = part * (1 if self.dense else self.taps)
        return product.splits * samples * self.pixels * columns


def blocks(length: int, widest: int, otherwise: int) -> tuple[int, int]:
    """Size and number of the blocks that `length` columns are padded to: one, or some of another size."""
    if length <= widest:
        return max(16, triton.next_power_of_2(length)), 1
    return otherwise, triton.cdiv(length, otherwise)


def _product(length: int, hidden: int, dense: bool, narrow: bool) -> Product:
    columns, column_blocks = blocks(length, *(256, 128) if narrow else (64, 64))
    if column_blocks > 1:
        units = min(128 if narrow else 32, hidden)
        return Product(units, 1, hidden // units, columns, column_blocks)
    units = min(64 if narrow else 32, hidden)
    # Of a small image there are few tiles: more programs come from the hidden units.
    splits = max(1, hidden // 128) if dense else 1
    return Product(units, hidden // splits // units, splits, columns, 1)


@functools.cache
def make_plan(
    channels: int,
    moved: int,
    height: int,
    width: int,
    size: int,
    hidden: int,
    dtype: torch.dtype,
) -> Plan:
    pixels, narrow = height * width, dtype.itemsize == 2
    dense = pixels <= _DENSE_PIXELS
    hidden *= pixels if dense else 1
    hidden, chunks = blocks(max(hidden, _FEWEST_HIDDEN), 128, 128)
    hidden *= chunks
    taps = pixels if dense else size**2
    if pixels * taps * 2 * channels >= _LARGEST_IMAGE:
        raise ValueError(
            f"x: got {channels} channels of {height}x{width}, want fewer than {_LARGEST_IMAGE} elements "
            f"of their {size}x{size} patches, twice"
        )
    inputs, outputs = taps * (channels - moved), taps * 2 * moved
    deep, widest = (32, 128) if narrow else (16, 64)  # columns of a block
    return Plan(
        *(channels, moved, height, width, size, dense, hidden),
        *(*blocks(inputs, deep, deep), *blocks(outputs, deep, deep)),
        _product(outputs, hidden, dense, narrow),
        _product(inputs, hidden, dense, narrow),
        first_width=_padded_to(inputs),
        second_width=_padded_to(outputs),
        tile=64,
        widest=widest,
    )


def _padded_to(length: int) -> int:
    """A multiple of every block's size."""
    return triton.cdiv(length, 128) * 128 if length > 128 else blocks(length, 128, 128)[0]


# --- weights as matrices -------------------------------------------------------------------------


def halves(v: Tensor, form: CouplingForm) -> Tensor:
    """Outputs of the second convolution (dimension 0), raw before shift."""
    first, second = (v[0::2], v[1::2]) if form.interleaved else v.chunk(2)
    return torch.cat((first, second) if form.leading == "scale" else (second, first))


def unhalved(v: Tensor, form: CouplingForm) -> Tensor:
    """The inverse of `halves`."""
    raw, shift = v.chunk(2)
    pair = (raw, shift) if form.leading == "scale" else (shift, raw)
    return torch.stack(pair, dim=1).flatten(0, 1) if form.interleaved else torch.cat(pair)


def _margins(plan: Plan) -> tuple[int, int, int, int]:
    """What widens a kernel to the (2h - 1, 2w - 1) offsets between two pixels."""
    half = plan.size // 2
    return (plan.width - 1 - half,) * 2 + (plan.height - 1 - half,) * 2


def _dense(w: Tensor, plan: Plan) -> Tensor:
    """A convolution's (outputs, inputs, K, K) as (outputs, inputs, pixels out, pixels in)."""
    windows = F.pad(w, _margins(plan)).unfold(2, plan.height, 1).unfold(3, plan.width, 1)
    return windows.flip(2, 3).flatten(4).flatten(2, 3)


def _undense(grad: Tensor, plan: Plan) -> Tensor:
    """The adjoint of `_dense`."""
    h, w = plan.height, plan.width
    windows = grad.unflatten(3, (h, w)).unflatten(2, (h, w)).flip(2, 3)
    shape = (*grad.shape[:2], 2 * h - 1, 2 * w - 1)
    rows = torch.ops.aten.unfold_backward(windows, (*shape[:2], h, 2 * w - 1, h), 3, w, 1)
    padded = torch.ops.aten.unfold_backward(rows, shape, 2, h, 1)
    return F.pad(padded, [-m for m in _margins(plan)])


def laid_out(
    weight1: Tensor, bias1: Tensor, weight2: Tensor, form: CouplingForm, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """(patch of the input, hidden), (hidden,) and (hidden, patch of the output), without padding."""
    weight2 = halves(weight2, form)
    if plan.dense:
        w1 = _dense(weight1, plan).permute(3, 1, 2, 0)  # pixel in, input, pixel, hidden
        w2 = _dense(weight2, plan).permute(3, 1, 2, 0)  # pixel, hidden, pixel out, output
        b1 = bias1.repeat(plan.pixels)
        return w1.flatten(0, 1).flatten(1), b1, w2.flatten(0, 1).flatten(1)
    w1 = weight1.permute(2, 3, 1, 0).flatten(0, 2)
    return w1, bias1, weight2.permute(1, 2, 3, 0).flatten(1)


def of_weight1(grad: Tensor, weight1: Tensor, plan: Plan) -> Tensor:
    """From (hidden, patch of the input)."""
    hidden, inputs, size, _ = weight1.shape
    if plan.dense:
        n = plan.pixels
        grad = grad[: n * hidden].unflatten(1, (n, inputs)).unflatten(0, (n, hidden))
        return _undense(grad.permute(1, 3, 0, 2), plan).to(weight1.dtype).contiguous()
    grad = grad[:hidden].view(hidden, size, size, inputs)
    return grad.permute(0, 3, 1, 2).to(weight1.dtype).contiguous()


def of_weight2(grad: Tensor, weight2: Tensor, form: CouplingForm, plan: Plan) -> Tensor:
    """From (hidden, patch of the output)."""
    outputs, hidden, size, _ = weight2.shape
    if plan.dense:
        n = plan.pixels
        grad = grad[: n * hidden].unflatten(1, (n, outputs)).unflatten(0, (n, hidden))
        grad = _undense(grad.permute(3, 1, 2, 0), plan)
    else:
        grad = grad[:hidden].view(hidden, size, size, outputs).permute(3, 0, 1, 2)
    return unhalved(grad, form).to(weight2.dtype).contiguous()


def padded(w: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return F.pad(w.to(dtype), (0, columns - w.shape[1], 0, rows - w.shape[0])).contiguous()
