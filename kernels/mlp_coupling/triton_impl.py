"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

A program owns blocks of ROWS samples, from x to y. The first hidden layer of a block is one tile in
registers; of the second, UNITS units are made at a time and go straight into raw and shift. The
backward makes the same tiles again and multiplies them into the gradients of the weights. Those of a
program are added up in its own row of `partials`, in the order of its blocks, and the rows are then
added in a fixed order: nothing is accumulated atomically.

Every product is a tl.dot whose sizes are padded to at least 16. Weights are read as they lie.
"""

import functools
from typing import Any, NamedTuple

import torch
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
    _spread,
    _squash,
)
from .reference import Gradients

__all__ = ["gradients", "map"]


# --- tiles ---------------------------------------------------------------------------------------


@triton.jit
def _matrix(w, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, x):
    """A tile of a matrix (ROWS, COLUMNS), zero beyond it, in the type of x's elements."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    return tl.load(w + at, mask=mask, other=0).to(x.dtype.element_ty)


@triton.jit
def _params_rows(
    w, j, unit, FIRST: tl.constexpr, MOVED: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr, x
):  # fmt: skip
    """Rows FIRST + STEP · j of the last layer's weights: those of raw, or of shift."""
    mask = (j < MOVED)[:, None] & (unit < UNITS)[None, :]
    at = (FIRST + STEP * j)[:, None] * UNITS + unit[None, :]
    return tl.load(w + at, mask=mask, other=0).to(x.dtype.element_ty)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _layer(a, w, b, x, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """relu(a wᵀ + b), in the type of x's elements."""
    pre = tl.zeros((a.shape[0], w.shape[0]), ACC)
    pre = _product(a, tl.trans(w), pre, PRECISION, ACC) + b
    return tl.maximum(pre, 0.0).to(x.dtype.element_ty)


@triton.jit
def _kept_part(
    x, log_scale, bias, row, k, samples, CHANNELS: tl.constexpr, MOVED: tl.constexpr,
    FLIP: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The conditioner's input, (ROWS, len(k)): the identity part of x, after actnorm if it is given."""
    live = k < CHANNELS - MOVED
    mask = (row < samples)[:, None] & live[None, :]
    column = k + (MOVED if FLIP else 0)
    v = tl.load(x + row[:, None] * CHANNELS + column[None, :], mask=mask, other=0)
    if log_scale is not None:
        lam, b = _spread(log_scale, column, live, ACC), _spread(bias, column, live, ACC)
        u = _affine(v.to(ACC), lam, b, False, NORM_SHIFT_FIRST)
        v = tl.where(mask, u, 0.0).to(x.dtype.element_ty)
    return v


@triton.jit
def _raw_and_shift(
    h1, w2, b2, w3, b3, j, x,
    MOVED: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H1_BLOCK: tl.constexpr,
    UNITS: tl.constexpr, CHUNKS: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr,
    STEP: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """raw and shift of every row and entry j, from the first hidden layer."""
    raw = tl.zeros((h1.shape[0], j.shape[0]), ACC)
    shift = tl.zeros((h1.shape[0], j.shape[0]), ACC)
    for chunk in range(CHUNKS):
        unit = chunk * UNITS + tl.arange(0, UNITS)
        w = _matrix(w2, unit, tl.arange(0, H1_BLOCK), H2, H1, x)
        h2 = _layer(h1, w, _spread(b2, unit, unit < H2, ACC), x, PRECISION, ACC)
        w_raw = _params_rows(w3, j, unit, RAW, MOVED, STEP, H2, x)
        raw = _product(h2, tl.trans(w_raw), raw, PRECISION, ACC)
        w_shift = _params_rows(w3, j, unit, SHIFT, MOVED, STEP, H2, x)
        shift = _product(h2, tl.trans(w_shift), shift, PRECISION, ACC)
    live = j < MOVED
    raw += _spread(b3, RAW + STEP * j, live, ACC)
    shift += _spread(b3, SHIFT + STEP * j, live, ACC)
    return raw * FACTOR, shift * FACTOR


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("samples",))
def _map_kernel(
    x, w1, b1, w2, b2, w3, b3, log_scale, bias, gain, log_det, out, total, samples,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, FLIP: tl.constexpr, INVERSE: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr, MOVED_BLOCK: tl.constexpr,
    H1_BLOCK: tl.constexpr, UNITS: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program maps ROWS samples."""
    KEPT: tl.constexpr = CHANNELS - MOVED
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < samples)[:, None]
    at_row = row[:, None] * CHANNELS
    k, j, unit = tl.arange(0, KEPT_BLOCK), tl.arange(0, MOVED_BLOCK), tl.arange(0, H1_BLOCK)
    if INVERSE:
        a = _kept_part(x, None, None, row, k, samples, CHANNELS, MOVED, FLIP, False, ACC)
    else:
        a = _kept_part(
            x, log_scale, bias, row, k, samples, CHANNELS, MOVED, FLIP, NORM_SHIFT_FIRST, ACC
        )
    w = _matrix(w1, unit, k, H1, KEPT, x)
    h1 = _layer(a, w, _spread(b1, unit, unit < H1, ACC), x, PRECISION, ACC)

    live = k < KEPT
    column = k + (MOVED if FLIP else 0)
    v = tl.load(x + at_row + column[None, :], mask=inside & live[None, :], other=0).to(ACC)
    if log_scale is not None:
        lam, b = _spread(log_scale, column, live, ACC), _spread(bias, column, live, ACC)
        v = _affine(v, lam, b, INVERSE, NORM_SHIFT_FIRST)
    tl.store(out + at_row + column[None, :], v, mask=inside & live[None, :])

    live = j < MOVED
    mask = inside & live[None, :]
    raw, t = _raw_and_shift(
        h1, w2, b2, w3, b3, j, x, MOVED, H1, H2, H1_BLOCK, UNITS, CHUNKS, RAW, SHIFT, STEP, FACTOR,
        PRECISION, ACC,
    )  # fmt: skip
    s, _ = _squash(raw, SCALE, CLAMP, EPS, ACC)
    if gain is not None:
        s *= _spread(gain, j, live, ACC)
    column = j + (0 if FLIP else KEPT)
    v = tl.load(x + at_row + column[None, :], mask=mask, other=0).to(ACC)
    if log_scale is not None:
        lam, b = _spread(log_scale, column, live, ACC), _spread(bias, column, live, ACC)
        if not INVERSE:
            v = _affine(v, lam, b, False, NORM_SHIFT_FIRST)
    v = _affine(v, s, t, INVERSE, SHIFT_FIRST)
    if log_scale is not None:
        if INVERSE:
            v = _affine(v, lam, b, True, NORM_SHIFT_FIRST)
    tl.store(out + at_row + column[None, :], v, mask=mask)

    own = tl.sum(tl.where(mask, s, 0.0), axis=1)
    if log_scale is not None:
        channel = tl.arange(0, 2 * (KEPT_BLOCK if KEPT > MOVED else MOVED_BLOCK))
        own += tl.sum(tl.load(log_scale + channel, mask=channel < CHANNELS, other=0).to(ACC), axis=0)
    if INVERSE:
        own = -own
    if log_det is not None:
        own += tl.load(log_det + row, mask=row < samples, other=0).to(ACC)
    tl.store(total + row, own, mask=row < samples)


@triton.jit
def _add(to, value, mask, again):
    """Add to what this program wrote there, if it is there `again`."""
    tl.store(to, tl.load(to, mask=mask & again, other=0) + value, mask=mask)


@triton.jit
def _add_rows(to, tile, mask, again):
    """The same with the sum of a tile over its rows."""
    _add(to, tl.sum(tile, axis=0), mask, again)


@triton.jit
def _add_matrix(
    to, a, b, row, column, inside, live, again, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The same with aᵀ b, at the rows and columns of a matrix."""
    total = tl.zeros((a.shape[1], b.shape[1]), ACC)
    total = _product(tl.trans(a), b, total, PRECISION, ACC)
    at = row[:, None] * COLUMNS + column[None, :]
    _add(to + at, total, inside[:, None] & live[None, :], again)


@triton.jit(do_not_specialize=("samples", "iterations"))
def _gradients_kernel(
    grad_out, grad_log_det, out, w1, b1, w2, b2, w3, b3, log_scale, bias, gain, grad_in, partials,
    samples, iterations,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, FLIP: tl.constexpr, INVERSE: tl.constexpr,
    H1: tl.constexpr, H2: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, KEPT_BLOCK: tl.constexpr, MOVED_BLOCK: tl.constexpr,
    H1_BLOCK: tl.constexpr, UNITS: tl.constexpr, CHUNKS: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program takes `iterations` blocks of ROWS samples. Its row of partials has the gradients of the
    parameters one after another, in the order of the operands."""
    KEPT: tl.constexpr = CHANNELS - MOVED
    program = tl.program_id(0).to(tl.int64)
    to_w1 = partials + program * PARTIAL
    to_b1 = to_w1 + H1 * KEPT
    to_w2 = to_b1 + H1
    to_b2 = to_w2 + H2 * H1
    to_w3 = to_b2 + H2
    to_b3 = to_w3 + 2 * MOVED * H2
    to_log_scale = to_b3 + 2 * MOVED
    to_bias = to_log_scale + CHANNELS
    to_gain = to_log_scale if log_scale is None else to_bias + CHANNELS
    k, j, unit = tl.arange(0, KEPT_BLOCK), tl.arange(0, MOVED_BLOCK), tl.arange(0, H1_BLOCK)
    kept, moved = k + (MOVED if FLIP else 0), j + (0 if FLIP else KEPT)
    live_kept, live_moved = k < KEPT, j < MOVED
    for i in range(iterations):
        again = i > 0
        row = (program * iterations + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < samples)[:, None]
        at_row = row[:, None] * CHANNELS

        # The conditioner again. Its input is actnorm's output in the forward, the given y in the inverse.
        if INVERSE:
            a = _kept_part(
                out, log_scale, bias, row, k, samples, CHANNELS, MOVED, FLIP, NORM_SHIFT_FIRST, ACC
            )
        else:
            a = _kept_part(out, None, None, row, k, samples, CHANNELS, MOVED, FLIP, False, ACC)
        first = _matrix(w1, unit, k, H1, KEPT, out)
        h1 = _layer(a, first, _spread(b1, unit, unit < H1, ACC), out, PRECISION, ACC)
        raw, t = _raw_and_shift(
            h1, w2, b2, w3, b3, j, out, MOVED, H1, H2, H1_BLOCK, UNITS, CHUNKS, RAW, SHIFT, STEP,
            FACTOR, PRECISION, ACC,
        )  # fmt: skip

        # The coupling. Rows without a sample are given zeros, whose exponentials cannot overflow.
        mask = inside & live_moved[None, :]
        raw, t = tl.where(mask, raw, 0.0), tl.where(mask, t, 0.0)
        g_log_det = tl.load(grad_log_det + row, mask=row < samples, other=0).to(ACC)
        if INVERSE:
            g_log_det = -g_log_det
        f, slope = _squash(raw, SCALE, CLAMP, EPS, ACC)
        s = f
        if gain is not None:
            bound = _spread(gain, j, live_moved, ACC)
            s = bound * f
        at = at_row + moved[None, :]
        v = tl.load(out + at, mask=mask, other=0).to(ACC)
        g = tl.load(grad_out + at, mask=mask, other=0).to(ACC)
        if log_scale is not None:
            lam, b = _spread(log_scale, moved, live_moved, ACC), _spread(bias, moved, live_moved, ACC)
            if INVERSE:
                v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, True, NORM_SHIFT_FIRST)
        v, g, grad_s, grad_t = _affine_backward(v, g, s, t, INVERSE, SHIFT_FIRST)
        grad_s += g_log_det[:, None]
        if gain is not None:
            _add_rows(to_gain + j, tl.where(mask, grad_s * f, 0.0), live_moved, again)
            grad_s *= bound
        if log_scale is not None:
            if not INVERSE:
                v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, False, NORM_SHIFT_FIRST)
            _add_rows(to_log_scale + moved, grad_lam + g_log_det[:, None], live_moved, again)
            _add_rows(to_bias + moved, grad_b, live_moved, again)
        tl.store(grad_in + at, g, mask=mask)
        grad_raw = tl.where(mask, grad_s * slope * FACTOR, 0.0)
        grad_t = tl.where(mask, grad_t * FACTOR, 0.0)
        _add_rows(to_b3 + RAW + STEP * j, grad_raw, live_moved, again)
        _add_rows(to_b3 + SHIFT + STEP * j, grad_t, live_moved, again)
        g_raw, g_shift = grad_raw.to(out.dtype.element_ty), grad_t.to(out.dtype.element_ty)

        # Through the last two layers, so many units of the second hidden layer at a time.
        grad_h1 = tl.zeros((ROWS, H1_BLOCK), ACC)
        for chunk in range(CHUNKS):
            unit2 = chunk * UNITS + tl.arange(0, UNITS)
            live2 = unit2 < H2
            w = _matrix(w2, unit2, unit, H2, H1, out)
            h2 = _layer(h1, w, _spread(b2, unit2, live2, ACC), out, PRECISION, ACC)
            _add_matrix(
                to_w3 + RAW * H2, g_raw, h2, STEP * j, unit2, live_moved, live2, again, H2,
                PRECISION, ACC,
            )  # fmt: skip
            _add_matrix(
                to_w3 + SHIFT * H2, g_shift, h2, STEP * j, unit2, live_moved, live2, again, H2,
                PRECISION, ACC,
            )  # fmt: skip
            grad_h2 = tl.zeros((ROWS, UNITS), ACC)
            w_raw = _params_rows(w3, j, unit2, RAW, MOVED, STEP, H2, out)
            grad_h2 = _product(g_raw, w_raw, grad_h2, PRECISION, ACC)
            w_shift = _params_rows(w3, j, unit2, SHIFT, MOVED, STEP, H2, out)
            grad_h2 = _product(g_shift, w_shift, grad_h2, PRECISION, ACC)
            grad_h2 = tl.where(h2 > 0, grad_h2, 0.0)
            _add_rows(to_b2 + unit2, grad_h2, live2, again)
            g2 = grad_h2.to(out.dtype.element_ty)
            _add_matrix(
                to_w2, g2, h1, unit2, unit, live2, unit < H1, again, H1, PRECISION, ACC
            )
            grad_h1 = _product(g2, w, grad_h1, PRECISION, ACC)

        # Through the first, and actnorm of the identity part.
        grad_h1 = tl.where(h1 > 0, grad_h1, 0.0)
        _add_rows(to_b1 + unit, grad_h1, unit < H1, again)
        g1 = grad_h1.to(out.dtype.element_ty)
        _add_matrix(to_w1, g1, a, unit, k, unit < H1, live_kept, again, KEPT, PRECISION, ACC)
        first = _matrix(w1, unit, k, H1, KEPT, out)
        grad_a = tl.zeros((ROWS, KEPT_BLOCK), ACC)
        grad_a = _product(g1, first, grad_a, PRECISION, ACC)
        mask = inside & live_kept[None, :]
        at = at_row + kept[None, :]
        g = tl.load(grad_out + at, mask=mask, other=0).to(ACC)
        if not INVERSE:
            g += grad_a
        if log_scale is not None:
            v = tl.load(out + at, mask=mask, other=0).to(ACC)
            lam, b = _spread(log_scale, kept, live_kept, ACC), _spread(bias, kept, live_kept, ACC)
            v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, INVERSE, NORM_SHIFT_FIRST)
            _add_rows(to_log_scale + kept, grad_lam + g_log_det[:, None], live_kept, again)
            _add_rows(to_bias + kept, grad_b, live_kept, again)
        if INVERSE:
            g += grad_a
        tl.store(grad_in + at, g, mask=mask)
        tl.debug_barrier()  # what is in partials is now seen by all threads of the program


# --- plans: by shape and type alone, so that sums are the same on every machine --------------------

_PROGRAMS = 256  # of a backward, at most: two for each multiprocessor of the largest chips


class _Plan(NamedTuple):
    channels: int
    moved: int
    hidden1: int
    hidden2: int
    double: bool

    @property
    def rows(self) -> int:
        return 16 if self.double else 32

    def constants(self) -> dict[str, Any]:
        units = min(_block(self.hidden2), 16 if self.double else 32)
        return {
            "CHANNELS": self.channels,
            "MOVED": self.moved,
            "H1": self.hidden1,
            "H2": self.hidden2,
            "ROWS": self.rows,
            "KEPT_BLOCK": _block(self.channels - self.moved),
            "MOVED_BLOCK": _block(self.moved),
            "H1_BLOCK": _block(self.hidden1),
            "UNITS": units,
            "CHUNKS": triton.cdiv(self.hidden2, units),
            # Three products of TF32, and float32's accuracy; `launch` changes it for other chips.
            "PRECISION": "ieee" if self.double else "tf32x3",
            "ACC": tl.float64 if self.double else tl.float32,
            "num_warps": 8 if max(self.hidden1, self.hidden2) > 64 else 4,
            "num_stages": 1,
            "maxnreg": 255,
        }


def _block(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


@functools.cache
def _plan(
    x_shape: torch.Size, weight2_shape: torch.Size, outputs: int, dtype: torch.dtype
) -> _Plan:
    hidden2, hidden1 = weight2_shape
    return _Plan(x_shape[1], outputs // 2, hidden1, hidden2, dtype == torch.float64)


def _choices(form: CouplingForm, moved: int, flip: bool, inverse: bool) -> dict[str, Any]:
    """Constants of the form; raw and shift of entry j are outputs RAW + STEP · j and SHIFT + STEP · j."""
    constants = _form_constants(form)
    interleaved, scale_leads = constants.pop("INTERLEAVED"), constants.pop("SCALE_LEADS")
    second = 1 if interleaved else moved
    return constants | {
        "RAW": 0 if scale_leads else second,
        "SHIFT": second if scale_leads else 0,
        "STEP": 2 if interleaved else 1,
        "FLIP": flip,
        "INVERSE": inverse,
    }


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
    plan = _plan(x.shape, weight2.shape, weight3.shape[0], x.dtype)
    out, total = torch.empty_like(x), x.new_empty(samples, dtype=accumulate_dtype(x))
    launch(
        *(_map_kernel, (triton.cdiv(samples, plan.rows),)),
        *(x, weight1, bias1, weight2, bias2, weight3, bias3, log_scale, bias, gain, log_det),
        *(out, total, samples),
        **plan.constants(),
        **_choices(form, plan.moved, flip, inverse),
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
    plan = _plan(out.shape, weight2.shape, weight3.shape[0], out.dtype)
    parameters = weight1, bias1, weight2, bias2, weight3, bias3, log_scale, bias, gain
    sizes = [v.numel() for v in parameters if v is not None]
    blocks = triton.cdiv(samples, plan.rows)
    iterations = triton.cdiv(blocks, _PROGRAMS)
    programs = triton.cdiv(blocks, max(1, iterations))
    grad_in = torch.empty_like(out)
    partials = out.new_empty(programs, sum(sizes), dtype=accumulate_dtype(out))
    launch(
        *(_gradients_kernel, (programs,)),
        *(grad_out, grad_log_det, out, *parameters, grad_in, partials, samples, iterations),
        **plan.constants(),
        **_choices(form, plan.moved, flip, inverse),
        PARTIAL=sum(sizes),
    )
    sums = iter(torch.split_with_sizes_copy(partials.sum(0), sizes))
    grads = (None if v is None else next(sums).view(v.shape).to(v.dtype) for v in parameters)
    return grad_in, *grads  # type: ignore[return-value]
