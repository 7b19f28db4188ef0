"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

A program owns blocks of ROWS samples, from x to y. Of the first hidden layer, UNITS units are made at a
time and go straight into the second, which the program leaves in scratch memory of its own that its next
block overwrites, and takes from there UNITS units at a time: tiles stay small, and so do the registers
they take. The backward is two kernels, of the coupling and of the conditioner, each of which makes the
hidden layers again. Gradients of parameters are added up in a program's own row of `partials`, in the
order of its blocks, and the rows are then added in a fixed order: nothing is accumulated atomically.

Every product is a tl.dot of sizes padded to powers of two of at least 16. Parameters are padded with
zeros before, in the type of x where they enter a product. So loads need no masks: beyond a part, and
beyond the last sample, they repeat the last element, which meets a zero among the weights or gradients.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from ..actnorm_coupling.form import CouplingForm
from ..actnorm_coupling.reference import accumulate_dtype
from ..actnorm_coupling.triton_impl import (
    _affine,
    _affine_backward,
    _form_constants,
    _squash,
)
from .reference import Gradients

__all__ = ["gradients", "map"]

# Not compiled in: so that one kernel serves all batches, and that loops over units stay loops, which
# unrolled take more registers than there are.
_SIZES = ("samples", "iterations", "end1", "end2")


# --- tiles ---------------------------------------------------------------------------------------


@triton.jit
def _place(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ROWS rows and COLUMNS columns, from `row` and `column` on, of a matrix of WIDTH
    columns."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return matrix + (r[:, None] * WIDTH + c[None, :])


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _hidden(
    a, w1, b1, w2, b2, held1, held2, end1, ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr,
    H1_BLOCK: tl.constexpr, H2_BLOCK: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The second hidden layer, and the first if there is memory for it, from the conditioner's input."""
    pre = tl.zeros((ROWS, H2_BLOCK), ACC)
    for start in range(0, end1, UNITS):
        h1 = tl.zeros((ROWS, UNITS), ACC)
        w = tl.load(_place(w1, 0, start, KEPT_BLOCK, UNITS, H1_BLOCK))
        h1 = _product(a, w, h1, PRECISION, ACC) + tl.load(b1 + start + tl.arange(0, UNITS))[None, :]
        h1 = tl.maximum(h1, 0.0).to(a.dtype)
        if held1 is not None:
            tl.store(_place(held1, 0, start, ROWS, UNITS, H1_BLOCK), h1)
        w = tl.load(_place(w2, start, 0, UNITS, H2_BLOCK, H2_BLOCK))
        pre = _product(h1, w, pre, PRECISION, ACC)
    pre += tl.load(b2 + tl.arange(0, H2_BLOCK))[None, :]
    h2 = tl.maximum(pre, 0.0).to(a.dtype)
    tl.store(_place(held2, 0, 0, ROWS, H2_BLOCK, H2_BLOCK), h2)
    tl.debug_barrier()  # all threads of the program now see what is held


@triton.jit
def _raw_and_shift(
    held, w_raw, w_shift, b_raw, b_shift, end2, FACTOR: tl.constexpr, ROWS: tl.constexpr,
    MOVED_BLOCK: tl.constexpr, H2_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    raw = tl.zeros((ROWS, MOVED_BLOCK), ACC)
    shift = tl.zeros((ROWS, MOVED_BLOCK), ACC)
    for start in range(0, end2, UNITS):
        h = tl.load(_place(held, 0, start, ROWS, UNITS, H2_BLOCK))
        w = tl.load(_place(w_raw, start, 0, UNITS, MOVED_BLOCK, MOVED_BLOCK))
        raw = _product(h, w, raw, PRECISION, ACC)
        w = tl.load(_place(w_shift, start, 0, UNITS, MOVED_BLOCK, MOVED_BLOCK))
        shift = _product(h, w, shift, PRECISION, ACC)
    j = tl.arange(0, MOVED_BLOCK)
    raw += tl.load(b_raw + j)[None, :]
    shift += tl.load(b_shift + j)[None, :]
    return raw * FACTOR, shift * FACTOR


@triton.jit
def _vector(pointer, at, ACC: tl.constexpr):
    return tl.load(pointer + at).to(ACC)[None, :]


@triton.jit
def _conditioner_input(
    x, log_scale, bias, at, column, NORM_SHIFT_FIRST: tl.constexpr, ACC: tl.constexpr
):
    """The identity part of x, after actnorm if that is given, in the type of x."""
    v = tl.load(x + at)
    if log_scale is not None:
        lam, b = _vector(log_scale, column, ACC), _vector(bias, column, ACC)
        v = _affine(v.to(ACC), lam, b, False, NORM_SHIFT_FIRST).to(x.dtype.element_ty)
    return v


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def _map_kernel(
    x, w1, b1, w2, b2, w_raw, w_shift, b_raw, b_shift, log_scale, bias, gain, log_det, out, total,
    scratch, samples, end1, end2,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr, MOVED_BLOCK: tl.constexpr,
    H1_BLOCK: tl.constexpr, H2_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program maps ROWS samples."""
    KEPT: tl.constexpr = CHANNELS - MOVED
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < samples)[:, None]
    last = tl.minimum(row, samples - 1)[:, None] * CHANNELS
    k, j = tl.arange(0, KEPT_BLOCK), tl.arange(0, MOVED_BLOCK)

    live, column = k < KEPT, tl.minimum(k, KEPT - 1) + (MOVED if FLIP else 0)
    mask = inside & live[None, :]
    at = last + column[None, :]
    if INVERSE:
        a = _conditioner_input(x, None, None, at, column, False, ACC)
    else:
        a = _conditioner_input(x, log_scale, bias, at, column, NORM_SHIFT_FIRST, ACC)
    v = a
    if log_scale is not None:
        if INVERSE:
            lam, b = _vector(log_scale, column, ACC), _vector(bias, column, ACC)
            v = _affine(a.to(ACC), lam, b, True, NORM_SHIFT_FIRST).to(a.dtype)
    tl.store(out + at, v, mask=mask)

    held = scratch + tl.program_id(0).to(tl.int64) * (ROWS * H2_BLOCK)
    _hidden(
        a,
        w1,
        b1,
        w2,
        b2,
        None,
        held,
        end1,
        ROWS,
        KEPT_BLOCK,
        H1_BLOCK,
        H2_BLOCK,
        UNITS,
        PRECISION,
        ACC,
    )
    raw, t = _raw_and_shift(
        held, w_raw, w_shift, b_raw, b_shift, end2, FACTOR, ROWS, MOVED_BLOCK, H2_BLOCK, UNITS, PRECISION,
        ACC,
    )  # fmt: skip
    s, _ = _squash(raw, SCALE, CLAMP, EPS, ACC)
    live, column = j < MOVED, tl.minimum(j, MOVED - 1) + (0 if FLIP else KEPT)
    mask = inside & live[None, :]
    at = last + column[None, :]
    if gain is not None:
        s *= _vector(gain, tl.minimum(j, MOVED - 1), ACC)
    v = tl.load(x + at).to(ACC)
    if log_scale is not None:
        lam, b = _vector(log_scale, column, ACC), _vector(bias, column, ACC)
        if not INVERSE:
            v = _affine(v, lam, b, False, NORM_SHIFT_FIRST)
    v = _affine(v, s, t, INVERSE, SHIFT_FIRST)
    if log_scale is not None:
        if INVERSE:
            v = _affine(v, lam, b, True, NORM_SHIFT_FIRST)
    tl.store(out + at, v, mask=mask)

    own = tl.sum(tl.where(mask, s, 0.0), axis=1)
    if log_scale is not None:
        channel = tl.arange(0, 128)
        own += tl.sum(
            tl.load(log_scale + channel, mask=channel < CHANNELS, other=0).to(ACC), axis=0
        )
    if INVERSE:
        own = -own
    if log_det is not None:
        own += tl.load(log_det + row, mask=row < samples, other=0).to(ACC)
    tl.store(total + row, own, mask=row < samples)


@triton.jit
def _add(to, value):
    tl.store(to, tl.load(to) + value)


@triton.jit
def _store_sum(to, tile, BLOCK: tl.constexpr):
    """The sum of a tile over its rows."""
    tl.store(to + tl.arange(0, BLOCK), tl.sum(tile, axis=0))


@triton.jit
def _add_sum(to, tile, BLOCK: tl.constexpr):
    """Add the sum of a tile over its rows."""
    _add(to + tl.arange(0, BLOCK), tl.sum(tile, axis=0))


@triton.jit
def _add_product(
    to, a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """Add aᵀ b."""
    total = tl.zeros((ROWS, COLUMNS), ACC)
    _add(to, _product(tl.trans(a), b, total, PRECISION, ACC))


@triton.jit(do_not_specialize=_SIZES)
def _coupling_backward_kernel(
    grad_out, grad_log_det, out, w1, b1, w2, b2, w_raw, w_shift, b_raw, b_shift,
    log_scale, bias, gain, grad_in, grad_params, scratch, partials, samples, end1, end2,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr, MOVED_BLOCK: tl.constexpr,
    H1_BLOCK: tl.constexpr, H2_BLOCK: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The transformed part of the input's gradient, that of raw and shift, (rows, 2, MOVED_BLOCK), and
    sums for log_scale, bias, gain and both halves of bias3."""
    KEPT: tl.constexpr = CHANNELS - MOVED
    program = tl.program_id(0).to(tl.int64)
    held = scratch + program * (ROWS * H2_BLOCK)
    sums = partials + program * (5 * MOVED_BLOCK)
    k, j = tl.arange(0, KEPT_BLOCK), tl.arange(0, MOVED_BLOCK)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = (row < samples)[:, None]
    last = tl.minimum(row, samples - 1)[:, None] * CHANNELS
    # The conditioner again. Its input is actnorm's output in the forward, the given y in the inverse.
    live, column = k < KEPT, tl.minimum(k, KEPT - 1) + (MOVED if FLIP else 0)
    mask = inside & live[None, :]
    at = last + column[None, :]
    if INVERSE:
        a = _conditioner_input(out, log_scale, bias, at, column, NORM_SHIFT_FIRST, ACC)
    else:
        a = _conditioner_input(out, None, None, at, column, False, ACC)
    _hidden(
        a,
        w1,
        b1,
        w2,
        b2,
        None,
        held,
        end1,
        ROWS,
        KEPT_BLOCK,
        H1_BLOCK,
        H2_BLOCK,
        UNITS,
        PRECISION,
        ACC,
    )
    raw, t = _raw_and_shift(
        held, w_raw, w_shift, b_raw, b_shift, end2, FACTOR, ROWS, MOVED_BLOCK, H2_BLOCK, UNITS,
        PRECISION, ACC,
    )  # fmt: skip

    # The coupling. Rows without a sample repeat the last one, with gradients of zero.
    live, column = j < MOVED, tl.minimum(j, MOVED - 1) + (0 if FLIP else KEPT)
    mask = inside & live[None, :]
    at = last + column[None, :]
    g_log_det = tl.load(grad_log_det + row, mask=row < samples, other=0).to(ACC)[:, None]
    f, slope = _squash(raw, SCALE, CLAMP, EPS, ACC)
    s = f
    if gain is not None:
        bound = _vector(gain, tl.minimum(j, MOVED - 1), ACC)
        s = bound * f
    v = tl.load(out + at).to(ACC)
    g = tl.load(grad_out + at, mask=mask, other=0).to(ACC)
    if log_scale is not None:
        lam, b = _vector(log_scale, column, ACC), _vector(bias, column, ACC)
        if INVERSE:
            v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, True, NORM_SHIFT_FIRST)
    v, g, grad_s, grad_t = _affine_backward(v, g, s, t, INVERSE, SHIFT_FIRST)
    grad_s += -g_log_det if INVERSE else g_log_det
    if gain is not None:
        _store_sum(sums + 2 * MOVED_BLOCK, grad_s * f, MOVED_BLOCK)
        grad_s *= bound
    if log_scale is not None:
        if not INVERSE:
            v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, False, NORM_SHIFT_FIRST)
        _store_sum(sums, grad_lam, MOVED_BLOCK)
        _store_sum(sums + MOVED_BLOCK, grad_b, MOVED_BLOCK)
    tl.store(grad_in + at, g, mask=mask)
    grad_raw, grad_t = grad_s * slope * FACTOR, grad_t * FACTOR
    _store_sum(sums + 3 * MOVED_BLOCK, grad_raw, MOVED_BLOCK)
    _store_sum(sums + 4 * MOVED_BLOCK, grad_t, MOVED_BLOCK)
    to = grad_params + (row[:, None] * (2 * MOVED_BLOCK) + j[None, :])
    tl.store(to, grad_raw)
    tl.store(to + MOVED_BLOCK, grad_t)


@triton.jit(do_not_specialize=_SIZES)
def _conditioner_backward_kernel(
    grad_out, out, grad_params, w1, b1, w2, b2, w1_back, w2_back, w3_back,
    log_scale, bias, grad_in, scratch, partials, samples, iterations, end1, end2,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, FLIP: tl.constexpr, INVERSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr,
    MOVED_BLOCK: tl.constexpr, H1_BLOCK: tl.constexpr, H2_BLOCK: tl.constexpr,
    UNITS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The identity part of the input's gradient, and sums for weights and biases of the layers, and of
    actnorm. A program takes `iterations` blocks; its row of partials: `_Plan.sizes`."""
    KEPT: tl.constexpr = CHANNELS - MOVED
    program = tl.program_id(0).to(tl.int64)
    held1 = scratch + program * (ROWS * (H1_BLOCK + H2_BLOCK))
    held2 = held1 + ROWS * H1_BLOCK
    to_w1 = partials + program * PARTIAL
    to_w2 = to_w1 + H1_BLOCK * KEPT_BLOCK
    to_w3 = to_w2 + H2_BLOCK * H1_BLOCK
    to_b1 = to_w3 + 2 * MOVED_BLOCK * H2_BLOCK
    to_b2 = to_b1 + H1_BLOCK
    to_norm = to_b2 + H2_BLOCK
    k, j = tl.arange(0, KEPT_BLOCK), tl.arange(0, 2 * MOVED_BLOCK)
    live, column = k < KEPT, tl.minimum(k, KEPT - 1) + (MOVED if FLIP else 0)
    for i in range(iterations):
        row = (program * iterations + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < samples)[:, None]
        last = tl.minimum(row, samples - 1)[:, None] * CHANNELS
        at = last + column[None, :]
        if INVERSE:
            a = _conditioner_input(out, log_scale, bias, at, column, NORM_SHIFT_FIRST, ACC)
        else:
            a = _conditioner_input(out, None, None, at, column, False, ACC)
        _hidden(
            a, w1, b1, w2, b2, held1, held2, end1, ROWS, KEPT_BLOCK, H1_BLOCK, H2_BLOCK, UNITS, PRECISION,
            ACC,
        )  # fmt: skip

        # Through the last two layers, so many units of the second hidden layer at a time.
        of_params = grad_params + (row[:, None] * (2 * MOVED_BLOCK) + j[None, :])
        grad_h1 = tl.zeros((ROWS, H1_BLOCK), ACC)
        for start in range(0, end2, UNITS):
            h = tl.load(_place(held2, 0, start, ROWS, UNITS, H2_BLOCK))
            grad_h2 = tl.zeros((ROWS, UNITS), ACC)
            g = tl.load(of_params)
            at_w3 = _place(to_w3, 0, start, 2 * MOVED_BLOCK, UNITS, H2_BLOCK)
            _add_product(at_w3, g, h, 2 * MOVED_BLOCK, UNITS, PRECISION, ACC)
            w = tl.load(_place(w3_back, 0, start, 2 * MOVED_BLOCK, UNITS, H2_BLOCK))
            grad_h2 = _product(g, w, grad_h2, PRECISION, ACC)
            grad_h2 = tl.where(h > 0, grad_h2, 0.0)
            _add_sum(to_b2 + start, grad_h2, UNITS)
            g2 = grad_h2.to(a.dtype)
            for first in range(0, end1, UNITS):
                h1 = tl.load(_place(held1, 0, first, ROWS, UNITS, H1_BLOCK))
                at_w2 = _place(to_w2, start, first, UNITS, UNITS, H1_BLOCK)
                _add_product(at_w2, g2, h1, UNITS, UNITS, PRECISION, ACC)
            w_whole = tl.load(_place(w2_back, start, 0, UNITS, H1_BLOCK, H1_BLOCK))
            grad_h1 = _product(g2, w_whole, grad_h1, PRECISION, ACC)

        # Through the first, whose gradient takes its place in memory.
        place = _place(held1, 0, 0, ROWS, H1_BLOCK, H1_BLOCK)
        grad_h1 = tl.where(tl.load(place) > 0, grad_h1, 0.0)
        _add_sum(to_b1, grad_h1, H1_BLOCK)
        tl.debug_barrier()
        tl.store(place, grad_h1)
        tl.debug_barrier()
        grad_a = tl.zeros((ROWS, KEPT_BLOCK), ACC)
        for start in range(0, end1, UNITS):
            g1 = tl.load(_place(held1, 0, start, ROWS, UNITS, H1_BLOCK))
            at_w1 = _place(to_w1, start, 0, UNITS, KEPT_BLOCK, KEPT_BLOCK)
            _add_product(at_w1, g1, a, UNITS, KEPT_BLOCK, PRECISION, ACC)
            w_first = tl.load(_place(w1_back, start, 0, UNITS, KEPT_BLOCK, KEPT_BLOCK))
            grad_a = _product(g1, w_first, grad_a, PRECISION, ACC)

        # Actnorm of the identity part.
        mask = inside & live[None, :]
        v = tl.load(grad_out + at, mask=mask, other=0).to(ACC)
        if not INVERSE:
            v += grad_a
        if log_scale is not None:
            y = tl.load(out + at).to(ACC)
            lam, b = _vector(log_scale, column, ACC), _vector(bias, column, ACC)
            _, v, grad_lam, grad_b = _affine_backward(y, v, lam, b, INVERSE, NORM_SHIFT_FIRST)
            _add_sum(to_norm, grad_lam, KEPT_BLOCK)
            _add_sum(to_norm + KEPT_BLOCK, grad_b, KEPT_BLOCK)
        if INVERSE:
            v += grad_a
        tl.store(grad_in + at, v, mask=mask)
        tl.debug_barrier()  # sums are seen by all threads; nobody reads any more what is held


# --- plans: by shape and type alone, so that sums are the same on every machine --------------------

_OF_NORM = ("FLIP", "INVERSE", "NORM_SHIFT_FIRST")
_PROGRAMS = 256  # of a backward, at most: two for each multiprocessor of the largest chips


class _Plan(NamedTuple):
    """How a coupling is cut into tiles."""

    channels: int
    moved: int
    hidden1: int
    hidden2: int
    dtype: torch.dtype

    @property
    def double(self) -> bool:
        return self.dtype == torch.float64

    @property
    def rows(self) -> int:
        return 16  # with 32, registers spill

    @property
    def kept_block(self) -> int:
        return _block(self.channels - self.moved)

    @property
    def moved_block(self) -> int:
        return _block(self.moved)

    @property
    def blocks(self) -> tuple[int, int]:
        """Both hidden layers, padded."""
        return _block(self.hidden1), _block(self.hidden2)

    def sizes(self) -> list[int]:
        """A row of partials: gradients of weight1, of weight2, of weight3's rows for raw and for shift, of
        bias1 and bias2, and of the identity part's log_scale and bias."""
        kept, moved, (first, second) = self.kept_block, self.moved_block, self.blocks
        matrices = [first * kept, second * first, 2 * moved * second]
        return [*matrices, first, second, 2 * kept]

    def constants(self) -> dict[str, Any]:
        first, second = self.blocks
        return {
            "CHANNELS": self.channels,
            "MOVED": self.moved,
            "ROWS": self.rows,
            "KEPT_BLOCK": self.kept_block,
            "MOVED_BLOCK": self.moved_block,
            "H1_BLOCK": first,
            "H2_BLOCK": second,
            "UNITS": min(first, second, 32),
            # Three products of TF32, and float32's accuracy; AMD's matrix cores have float32.
            "PRECISION": "ieee" if self.double else "tf32x3",
            "amd": {"PRECISION": "ieee"},
            "ACC": tl.float64 if self.double else tl.float32,
            "num_warps": 8,
            "num_stages": 1,
            "maxnreg": 255,
        }


def _block(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


@functools.cache
def _plan(size: int, outputs: int, hidden: torch.Size, dtype: torch.dtype) -> _Plan:
    second, first = hidden
    return _Plan(size, outputs // 2, first, second, dtype)


def _choices(form: CouplingForm, flip: bool, inverse: bool) -> dict[str, Any]:
    constants = _form_constants(form) | {"FLIP": flip, "INVERSE": inverse}
    del constants["INTERLEAVED"], constants["SCALE_LEADS"]
    return constants


# --- parameters, padded ----------------------------------------------------------------------------


def _halves(v: Tensor, form: CouplingForm) -> tuple[Tensor, Tensor]:
    """The rows of weight3, or the entries of bias3, that make raw, and those that make shift."""
    first, second = (v[0::2], v[1::2]) if form.interleaved else v.chunk(2)
    return (first, second) if form.leading == "scale" else (second, first)


def _join(raw: Tensor, shift: Tensor, form: CouplingForm) -> Tensor:
    """The inverse of `_halves`, for gradients."""
    pair = (raw, shift) if form.leading == "scale" else (shift, raw)
    return torch.stack(pair, dim=1).flatten(0, 1) if form.interleaved else torch.cat(pair)


def _padded(v: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    missing = [n for size, of in zip(shape, v.shape, strict=True) for n in (size - of, 0)]
    return F.pad(v.to(dtype), missing[::-1]).contiguous()


def _layers(
    plan: _Plan,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    form: CouplingForm,
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' operands in the order of the kernels, (inputs, outputs), and (outputs, inputs)."""
    kept, moved, (first, second) = plan.kept_block, plan.moved_block, plan.blocks
    acc = accumulate_dtype(x)
    halves = [_padded(w, x.dtype, moved, second) for w in _halves(weight3, form)]
    back = [
        _padded(weight1, x.dtype, first, kept),
        _padded(weight2, x.dtype, second, first),
        torch.cat(halves),
    ]
    w1, w2, w_raw, w_shift = (w.t().contiguous() for w in (*back[:2], *halves))
    b1, b2 = _padded(bias1, acc, first), _padded(bias2, acc, second)
    b_raw, b_shift = (_padded(b, acc, moved) for b in _halves(bias3, form))
    return [w1, b1, w2, b2, w_raw, w_shift, b_raw, b_shift], back


# --- launchers -----------------------------------------------------------------------------------


def map(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    samples = x.shape[0]
    plan = _plan(x.shape[1], weight3.shape[0], weight2.shape, x.dtype)
    layers, _ = _layers(plan, x, weight1, bias1, weight2, bias2, weight3, bias3, form)
    out, total = torch.empty_like(x), x.new_empty(samples, dtype=accumulate_dtype(x))
    programs = triton.cdiv(samples, plan.rows)
    scratch = x.new_empty(programs, plan.rows * plan.blocks[1])
    launch(
        *(_map_kernel, (programs,)),
        *(x, *layers, log_scale, bias, gain, log_det, out, total, scratch, samples, *plan.blocks),
        **(plan.constants() | _choices(form, flip, inverse)),
    )
    return out, total


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> Gradients:
    samples = out.shape[0]
    plan = _plan(out.shape[1], weight3.shape[0], weight2.shape, out.dtype)
    layers, back = _layers(plan, out, weight1, bias1, weight2, bias2, weight3, bias3, form)
    blocks = triton.cdiv(samples, plan.rows)
    iterations = max(1, triton.cdiv(blocks, _PROGRAMS))
    programs = triton.cdiv(blocks, iterations)
    blocks = programs * iterations  # the last may have no sample
    acc, options = accumulate_dtype(out), _choices(form, flip, inverse)
    grad_in, sizes = torch.empty_like(out), plan.sizes()
    grad_params = out.new_empty(programs * iterations * plan.rows, 2 * plan.moved_block)
    scratch = out.new_empty(max(blocks * plan.blocks[1], programs * sum(plan.blocks)) * plan.rows)
    of_moved = out.new_empty(blocks, 5, plan.moved_block, dtype=acc)
    partials = out.new_zeros(programs, sum(sizes), dtype=acc)
    launch(
        *(_coupling_backward_kernel, (blocks,)),
        *(grad_out, grad_log_det, out, *layers, log_scale, bias, gain, grad_in, grad_params),
        *(scratch, of_moved, samples, *plan.blocks),
        **(plan.constants() | options),
    )
    launch(
        *(_conditioner_backward_kernel, (programs,)),
        *(grad_out, out, grad_params, *layers[:4], *back, log_scale, bias, grad_in, scratch),
        *(partials, samples, iterations, *plan.blocks),
        **(plan.constants() | {name: options[name] for name in _OF_NORM}),
        PARTIAL=sum(sizes),
    )

    sums = partials.sum(0).split(sizes)
    w1, w2, w3 = (v.view(w.shape) for v, w in zip(sums[:3], back, strict=True))
    w_raw, w_shift = (w[: plan.moved, : plan.hidden2] for w in w3.chunk(2))
    moved, kept = of_moved.sum(0)[:, : plan.moved], sums[5].view(2, -1)
    kept = kept[:, : plan.channels - plan.moved]
    pairs = [(moved[i], kept[i]) if flip else (kept[i], moved[i]) for i in range(2)]
    through_log_det = grad_log_det.to(acc).sum() * (-1 if inverse else 1)
    grads = (
        w1[: plan.hidden1, : plan.channels - plan.moved],
        sums[3][: plan.hidden1],
        w2[: plan.hidden2, : plan.hidden1],
        sums[4][: plan.hidden2],
        _join(w_raw, w_shift, form),
        _join(moved[3], moved[4], form),
        torch.cat(pairs[0]) + through_log_det,
        torch.cat(pairs[1]),
        moved[2],
    )
    parameters = weight1, bias1, weight2, bias2, weight3, bias3, log_scale, bias, gain
    return grad_in, *(  # type: ignore[return-value]
        None if v is None else torch.empty_like(v).copy_(g)
        for v, g in zip(parameters, grads, strict=True)
    )
