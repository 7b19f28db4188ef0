"""Triton kernels and their launchers: arranged tensors in, tensors out, as in reference.py.

A tensor is rows of columns, and a column is (outer, channel, inner): a contiguous sample is a row with
inner = its positions; of a channels-last tensor a pixel is a row (to the map, which needs sums per
sample, a sample is: outer = positions, inner = 1). The identity and the transformed part are each
walked as one run of columns, in tiles of ROWS rows by BLOCK columns, so that long rows and many short
ones both fill a tile and threads read 16 bytes wherever the length of a run allows.

Nothing is accumulated atomically: a program of the map owns its samples' log-dets, and the others
write partial sums, which `_finish_kernel` adds in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .form import CouplingForm
from .reference import accumulate_dtype

__all__ = ["gradients", "identity", "identity_backward", "map"]


# --- arithmetic ----------------------------------------------------------------------------------


@triton.jit
def _affine(v, s, t, INVERSE: tl.constexpr, SHIFT_FIRST: tl.constexpr):
    """v·exp(s) + t or (v + t)·exp(s), or the inverse of either."""
    if INVERSE:
        s, t = -s, -t
    if SHIFT_FIRST != INVERSE:
        out = (v + t) * tl.exp(s)
    else:
        out = v * tl.exp(s) + t
    return out


@triton.jit
def _affine_backward(out, grad, s, t, INVERSE: tl.constexpr, SHIFT_FIRST: tl.constexpr):
    """The input v of `_affine`, and the gradients of v, s and t, from its output."""
    if INVERSE:
        s, t = -s, -t
    grad_v = grad * tl.exp(s)
    if SHIFT_FIRST != INVERSE:
        v = out * tl.exp(-s) - t
        grad_s, grad_t = grad * out, grad_v
    else:
        scaled = out - t
        v = scaled * tl.exp(-s)
        grad_s, grad_t = grad * scaled, grad
    if INVERSE:
        grad_s, grad_t = -grad_s, -grad_t
    return v, grad_v, grad_s, grad_t


@triton.jit
def _sigmoids(x):
    """σ(x) and σ(-x), each without cancellation. The exponential cannot overflow."""
    q = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + q)
    return tl.where(x < 0, q * r, r), tl.where(x < 0, r, q * r)


@triton.jit
def _atan(x, ACC: tl.constexpr):
    """Its series, after adding or not an eighth or a quarter turn has brought the argument within
    tan(π/8) = 0.414: the first term left out is below one rounding."""
    TERMS: tl.constexpr = 20 if ACC == tl.float64 else 9
    a = tl.abs(x)
    quarter, eighth = a > 2.414213562373095, a > 0.41421356237309503
    up = tl.where(quarter, -1.0, tl.where(eighth, a - 1.0, a))
    y = up / tl.where(quarter, a, tl.where(eighth, a + 1.0, 1.0))
    eighths = tl.where(quarter, 2, tl.where(eighth, 1, 0)).to(ACC)
    series = tl.zeros(x.shape, ACC)
    for i in tl.static_range(TERMS):
        series = 1.0 / (2 * (TERMS - i) - 1) - y * y * series
    value = eighths * 0.7853981633974483 + y * series
    return tl.where(x < 0, -value, value)


@triton.jit
def _squash(raw, SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """f of the form, without the gain, and its derivative. Where f is near zero its error is one
    rounding of 1, not of f, and so is what matters: it only feeds exp and sums."""
    if SCALE == "exp":
        f = raw
        slope = tl.full(raw.shape, 1.0, ACC)
    elif SCALE == "tanh":
        up, down = _sigmoids(2.0 * raw)
        f = CLAMP * (up - down)
        slope = 4.0 * CLAMP * up * down
    elif SCALE == "two_sigmoid":
        up, down = _sigmoids(raw)
        f = CLAMP * (up - down)
        slope = 2.0 * CLAMP * up * down
    elif SCALE == "atan":
        f = (CLAMP * 0.636) * _atan(raw, ACC)
        slope = (CLAMP * 0.636) / (1.0 + raw * raw)
    elif SCALE == "soft_clamp":
        shrink = 1.0 / (1.0 + tl.abs(raw) / CLAMP)
        f = raw * shrink
        slope = shrink * shrink
    else:
        up, down = _sigmoids(raw + 2.0)
        if EPS == 0:
            f = tl.minimum(raw + 2.0, 0.0) + tl.log(tl.maximum(up, down))
            slope = down
        else:
            f = tl.log(up + EPS)
            slope = down * up / (up + EPS)
        if SCALE == "inverse_sigmoid":
            f, slope = -f, -slope
    return f, slope


# --- where things are ----------------------------------------------------------------------------


@triton.jit
def _channel(
    k, live, index, IS_MOVED: tl.constexpr, CHANNELS: tl.constexpr, MOVED: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    """The channel that is k-th in its part."""
    if index is not None:
        channel = tl.load(index + (CHANNELS - MOVED) * IS_MOVED + k, mask=live, other=0)
        channel = channel.to(tl.int32)
    elif IS_MOVED:
        channel = k + (0 if FLIP else CHANNELS - MOVED)
    else:
        channel = k + (MOVED if FLIP else 0)
    return channel


@triton.jit
def _place(
    j, live, index, IS_MOVED: tl.constexpr, CHANNELS: tl.constexpr, MOVED: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, FLIP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of element j of a part: which of its channels, which channel of x, and the column of x."""
    PART: tl.constexpr = MOVED if IS_MOVED else CHANNELS - MOVED
    k = j // INNER
    if OUTER > 1:
        k = k % PART
    channel = _channel(k, live, index, IS_MOVED, CHANNELS, MOVED, FLIP)
    column = j + (channel - k) * INNER
    if OUTER > 1:
        column += j // (PART * INNER) * ((CHANNELS - PART) * INNER)
    return k, channel, tl.max_contiguous(tl.multiple_of(column, VECTOR), VECTOR)


@triton.jit
def _param_columns(
    j, MOVED: tl.constexpr, INNER: tl.constexpr, INTERLEAVED: tl.constexpr, VECTOR: tl.constexpr
):
    """Columns of params with the leading and the other parameter of element j."""
    RUN: tl.constexpr = INNER if INTERLEAVED else MOVED * INNER
    ALIGNED: tl.constexpr = VECTOR if RUN % VECTOR == 0 else RUN & -RUN
    column = j + j // RUN * RUN
    column = tl.max_contiguous(tl.multiple_of(column, ALIGNED), ALIGNED)
    return column, column + RUN


@triton.jit
def _load_params(
    params, rows, inside, start, LENGTH: tl.constexpr, MOVED: tl.constexpr, INNER: tl.constexpr,
    INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """raw and shift of elements start, start + 1, ... of the transformed part."""
    row = params + rows * (2 * LENGTH)
    if INTERLEAVED and INNER == 1:  # neighbours: one wide load
        column = (2 * start + tl.arange(0, 2 * BLOCK))[None, :]
        both = tl.load(row + column, mask=inside & (column < 2 * LENGTH), other=0)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        j = start + tl.arange(0, BLOCK)
        mask = inside & (j < LENGTH)[None, :]
        one, other = _param_columns(j, MOVED, INNER, INTERLEAVED, VECTOR)
        first = tl.load(row + one[None, :], mask=mask, other=0)
        second = tl.load(row + other[None, :], mask=mask, other=0)
    first, second = first.to(ACC) * FACTOR, second.to(ACC) * FACTOR
    if SCALE_LEADS:
        raw, shift = first, second
    else:
        raw, shift = second, first
    return raw, shift


@triton.jit
def _store_params(
    params, rows, inside, start, raw, shift, LENGTH: tl.constexpr, MOVED: tl.constexpr,
    INNER: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_params`, for gradients."""
    row = params + rows * (2 * LENGTH)
    if SCALE_LEADS:
        first, second = raw * FACTOR, shift * FACTOR
    else:
        first, second = shift * FACTOR, raw * FACTOR
    if INTERLEAVED and INNER == 1:
        column = (2 * start + tl.arange(0, 2 * BLOCK))[None, :]
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK))
        tl.store(row + column, both, mask=inside & (column < 2 * LENGTH))
    else:
        j = start + tl.arange(0, BLOCK)
        mask = inside & (j < LENGTH)[None, :]
        one, other = _param_columns(j, MOVED, INNER, INTERLEAVED, VECTOR)
        tl.store(row + one[None, :], first, mask=mask)
        tl.store(row + other[None, :], second, mask=mask)


@triton.jit
def _spread(pointer, at, live, ACC: tl.constexpr):
    """A per-channel parameter, as a row of a tile."""
    return tl.load(pointer + at, mask=live, other=0).to(ACC)[None, :]


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("rows",))
def _identity_kernel(
    x, log_scale, bias, index, a, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, INNER: tl.constexpr, FLIP: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    KEPT: tl.constexpr = (CHANNELS - MOVED) * INNER
    program = tl.program_id(0)
    row = ((program // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    live = j < KEPT
    mask = (row < rows) & live[None, :]
    _, channel, column = _place(j, live, index, False, CHANNELS, MOVED, 1, INNER, FLIP, VECTOR)
    lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
    v = tl.load(x + row * (CHANNELS * INNER) + column[None, :], mask=mask, other=0).to(ACC)
    v = _affine(v, lam, b, False, NORM_SHIFT_FIRST)
    tl.store(a + row * KEPT + j[None, :], v, mask=mask)


@triton.jit
def _map_part(
    x, params, log_scale, bias, gain, index, out, row, samples, IS_MOVED: tl.constexpr,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes one part of the samples `row`, and returns its sums of s."""
    LENGTH: tl.constexpr = (MOVED if IS_MOVED else CHANNELS - MOVED) * OUTER * INNER
    rows = row[:, None]
    inside = rows < samples
    sum_s = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, LENGTH, BLOCK):
        j = start + tl.arange(0, BLOCK)
        live = j < LENGTH
        mask = inside & live[None, :]
        k, channel, column = _place(
            j, live, index, IS_MOVED, CHANNELS, MOVED, OUTER, INNER, FLIP, VECTOR
        )
        at = rows * (CHANNELS * OUTER * INNER) + column[None, :]
        v = tl.load(x + at, mask=mask, other=0).to(ACC)
        if log_scale is not None:
            lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
            if not INVERSE:
                v = _affine(v, lam, b, False, NORM_SHIFT_FIRST)
        if IS_MOVED:
            raw, t = _load_params(
                params, rows, inside, start, LENGTH, MOVED, INNER,
                INTERLEAVED, SCALE_LEADS, FACTOR, ROWS, BLOCK, VECTOR, ACC,
            )  # fmt: skip
            s, _ = _squash(raw, SCALE, CLAMP, EPS, ACC)
            if gain is not None:
                s *= _spread(gain, k, live, ACC)
            v = _affine(v, s, t, INVERSE, SHIFT_FIRST)
            sum_s += tl.where(mask, s, 0.0)
        if log_scale is not None:
            if INVERSE:
                v = _affine(v, lam, b, True, NORM_SHIFT_FIRST)
        tl.store(out + at, v, mask=mask)
    return tl.sum(sum_s, axis=1)


@triton.jit(do_not_specialize=("samples",))
def _map_kernel(
    x, params, log_scale, bias, gain, log_det, index, out, total, samples,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program maps ROWS whole samples."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    own = tl.zeros((ROWS,), ACC)
    if MOVED < CHANNELS:
        _map_part(
            x, params, log_scale, bias, gain, index, out, row, samples, False,
            CHANNELS, MOVED, OUTER, INNER, FLIP, INVERSE, SCALE, CLAMP, EPS, FACTOR,
            SHIFT_FIRST, INTERLEAVED, SCALE_LEADS, NORM_SHIFT_FIRST, ROWS, BLOCK, VECTOR, ACC,
        )  # fmt: skip
    if MOVED > 0:
        own += _map_part(
            x, params, log_scale, bias, gain, index, out, row, samples, True,
            CHANNELS, MOVED, OUTER, INNER, FLIP, INVERSE, SCALE, CLAMP, EPS, FACTOR,
            SHIFT_FIRST, INTERLEAVED, SCALE_LEADS, NORM_SHIFT_FIRST, ROWS, BLOCK, VECTOR, ACC,
        )  # fmt: skip
    if log_scale is not None:
        sum_lam = tl.zeros((128,), ACC)
        for start in range(0, CHANNELS, 128):
            channel = start + tl.arange(0, 128)
            sum_lam += tl.load(log_scale + channel, mask=channel < CHANNELS, other=0).to(ACC)
        own += tl.sum(sum_lam, axis=0) * (OUTER * INNER)
    if INVERSE:
        own = -own
    if log_det is not None:
        own += tl.load(log_det + row, mask=row < samples, other=0).to(ACC)
    tl.store(total + row, own, mask=row < samples)


@triton.jit
def _store_partials(
    partials, tile, group, slot, block, PLACE: tl.constexpr, LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a tile over its rows and over runs of RUN columns. Partials are (groups, 3, COLUMNS),
    with the identity part before the transformed one, which begins at PLACE."""
    value = tl.sum(tl.reshape(tl.sum(tile, axis=0), (BLOCK // RUN, RUN)), axis=1)
    at = block * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    to = partials + (group * 3 + slot) * COLUMNS + PLACE + at
    tl.store(to, value, mask=at < LENGTH // RUN)


@triton.jit
def _gradients_part(
    grad_out, grad_log_det, out, params, log_scale, bias, gain, index,
    grad_in, grad_params, partials, group, block, rows, iterations, IS_MOVED: tl.constexpr,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, INNER: tl.constexpr, PER_SAMPLE: tl.constexpr,
    FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RUN: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = (MOVED if IS_MOVED else CHANNELS - MOVED) * INNER
    PLACE: tl.constexpr = (CHANNELS - MOVED) * INNER // RUN * IS_MOVED
    COLUMNS: tl.constexpr = CHANNELS * INNER // RUN
    start = block * BLOCK
    j = start + tl.arange(0, BLOCK)
    live = j < LENGTH
    k, channel, column = _place(j, live, index, IS_MOVED, CHANNELS, MOVED, 1, INNER, FLIP, VECTOR)
    sum_lam = tl.zeros((ROWS, BLOCK), ACC)
    sum_b = tl.zeros((ROWS, BLOCK), ACC)
    sum_gain = tl.zeros((ROWS, BLOCK), ACC)
    if log_scale is not None:
        lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
    if gain is not None:
        if IS_MOVED:
            bound = _spread(gain, k, live, ACC)
    for i in range(iterations):
        row = (group * iterations + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        mask = inside & live[None, :]
        at = row[:, None] * (CHANNELS * INNER) + column[None, :]
        g = tl.load(grad_out + at, mask=mask, other=0).to(ACC)
        v = tl.load(out + at, mask=mask, other=0).to(ACC)
        if log_scale is not None:
            if INVERSE:
                v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, True, NORM_SHIFT_FIRST)
        if IS_MOVED:
            raw, t = _load_params(
                params, row[:, None], inside, start, LENGTH, MOVED, INNER,
                INTERLEAVED, SCALE_LEADS, FACTOR, ROWS, BLOCK, VECTOR, ACC,
            )  # fmt: skip
            f, slope = _squash(raw, SCALE, CLAMP, EPS, ACC)
            s = f
            if gain is not None:
                s = bound * f
            v, g, grad_s, grad_t = _affine_backward(v, g, s, t, INVERSE, SHIFT_FIRST)
            sample = row // PER_SAMPLE
            g_log_det = tl.load(grad_log_det + sample, mask=row < rows, other=0).to(ACC)[:, None]
            if INVERSE:
                grad_s -= g_log_det
            else:
                grad_s += g_log_det
            if gain is not None:
                sum_gain += grad_s * f
                grad_s *= bound
            _store_params(
                grad_params, row[:, None], inside, start, grad_s * slope, grad_t, LENGTH, MOVED,
                INNER, INTERLEAVED, SCALE_LEADS, FACTOR, ROWS, BLOCK, VECTOR,
            )  # fmt: skip
        if log_scale is not None:
            if not INVERSE:
                v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, False, NORM_SHIFT_FIRST)
            sum_lam += grad_lam
            sum_b += grad_b
        tl.store(grad_in + at, g, mask=mask)
    if log_scale is not None:
        _store_partials(partials, sum_lam, group, 0, block, PLACE, LENGTH, COLUMNS, RUN, BLOCK)
        _store_partials(partials, sum_b, group, 1, block, PLACE, LENGTH, COLUMNS, RUN, BLOCK)
    if gain is not None:
        if IS_MOVED:
            _store_partials(partials, sum_gain, group, 2, block, PLACE, LENGTH, COLUMNS, RUN, BLOCK)


@triton.jit(do_not_specialize=("rows", "iterations"))
def _gradients_kernel(
    grad_out, grad_log_det, out, params, log_scale, bias, gain, index,
    grad_in, grad_params, partials, rows, iterations,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, INNER: tl.constexpr, PER_SAMPLE: tl.constexpr,
    FLIP: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALE_LEADS: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RUN: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    KEPT_BLOCKS: tl.constexpr, MOVED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of one part in a group of ROWS * iterations rows."""
    block = tl.program_id(0) % (KEPT_BLOCKS + MOVED_BLOCKS)
    group = (tl.program_id(0) // (KEPT_BLOCKS + MOVED_BLOCKS)).to(tl.int64)
    if KEPT_BLOCKS > 0:
        if block < KEPT_BLOCKS:
            _gradients_part(
                grad_out, grad_log_det, out, params, log_scale, bias, gain, index,
                grad_in, grad_params, partials, group, block, rows, iterations, False,
                CHANNELS, MOVED, INNER, PER_SAMPLE, FLIP, INVERSE,
                SCALE, CLAMP, EPS, FACTOR, SHIFT_FIRST, INTERLEAVED, SCALE_LEADS,
                NORM_SHIFT_FIRST, ROWS, BLOCK, RUN, VECTOR, ACC,
            )  # fmt: skip
    if MOVED_BLOCKS > 0:
        if block >= KEPT_BLOCKS:
            _gradients_part(
                grad_out, grad_log_det, out, params, log_scale, bias, gain, index, grad_in,
                grad_params, partials, group, block - KEPT_BLOCKS, rows, iterations, True,
                CHANNELS, MOVED, INNER, PER_SAMPLE, FLIP, INVERSE,
                SCALE, CLAMP, EPS, FACTOR, SHIFT_FIRST, INTERLEAVED, SCALE_LEADS,
                NORM_SHIFT_FIRST, ROWS, BLOCK, RUN, VECTOR, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "iterations"))
def _identity_backward_kernel(
    grad, a, log_scale, bias, index, grad_kept, partials, rows, iterations,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, INNER: tl.constexpr, FLIP: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RUN: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """As `_gradients_kernel`, for the identity part alone."""
    COLUMNS: tl.constexpr = CHANNELS * INNER // RUN
    KEPT: tl.constexpr = (CHANNELS - MOVED) * INNER
    block = tl.program_id(0) % BLOCKS
    group = (tl.program_id(0) // BLOCKS).to(tl.int64)
    j = block * BLOCK + tl.arange(0, BLOCK)
    live = j < KEPT
    _, channel, _ = _place(j, live, index, False, CHANNELS, MOVED, 1, INNER, FLIP, VECTOR)
    lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
    sum_lam = tl.zeros((ROWS, BLOCK), ACC)
    sum_b = tl.zeros((ROWS, BLOCK), ACC)
    for i in range(iterations):
        row = ((group * iterations + i) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & live[None, :]
        at = row * KEPT + j[None, :]
        g = tl.load(grad + at, mask=mask, other=0).to(ACC)
        v = tl.load(a + at, mask=mask, other=0).to(ACC)
        v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, False, NORM_SHIFT_FIRST)
        tl.store(grad_kept + at, g, mask=mask)
        sum_lam += grad_lam
        sum_b += grad_b
    _store_partials(partials, sum_lam, group, 0, block, 0, KEPT, COLUMNS, RUN, BLOCK)
    _store_partials(partials, sum_b, group, 1, block, 0, KEPT, COLUMNS, RUN, BLOCK)


@triton.jit
def _sum_partials(
    partials, place, slot, groups, columns,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum over all groups of the WIDTH columns of one channel."""
    total = tl.zeros((GROUPS, BLOCK), ACC)
    for first in range(0, groups, GROUPS):
        group = (first + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
        for start in range(0, WIDTH, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            mask = (group < groups) & (column < WIDTH)
            at = (group * 3 + slot) * columns + place * WIDTH + column
            total += tl.load(partials + at, mask=mask, other=0)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit(do_not_specialize=("groups", "samples", "kept", "moved", "weight"))
def _finish_kernel(
    partials, grad_log_det, index, grad_log_scale, grad_bias, grad_gain,
    groups, samples, kept, moved, weight,
    WIDTH: tl.constexpr, FLIP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Second stage of every sum over samples, a channel each program: weight · the log-det's gradient
    is added to that of log_scale. Without grad_log_det (the identity op) the transformed part has no
    partials, and its gradients are zero."""
    place = tl.program_id(0)
    columns = (kept + moved) * WIDTH
    if grad_log_scale is not None:
        present = groups
        if grad_log_det is None:
            present = tl.where(place < kept, groups, 0)
        sum_lam = _sum_partials(partials, place, 0, present, columns, WIDTH, GROUPS, BLOCK, ACC)
        sum_b = _sum_partials(partials, place, 1, present, columns, WIDTH, GROUPS, BLOCK, ACC)
        if grad_log_det is not None:
            sum_log_det = tl.zeros((256,), ACC)
            for start in range(0, samples, 256):
                row = start + tl.arange(0, 256)
                sum_log_det += tl.load(grad_log_det + row, mask=row < samples, other=0).to(ACC)
            sum_lam += tl.sum(sum_log_det, axis=0) * weight
        if index is not None:
            channel = tl.load(index + place)
        elif FLIP:
            channel = tl.where(place < kept, place + moved, place - kept)
        else:
            channel = place
        tl.store(grad_log_scale + channel, sum_lam)
        tl.store(grad_bias + channel, sum_b)
    if grad_gain is not None:
        present = tl.where(place < kept, 0, groups)
        sum_gain = _sum_partials(partials, place, 2, present, columns, WIDTH, GROUPS, BLOCK, ACC)
        tl.store(grad_gain + place - kept, sum_gain, mask=place >= kept)


# --- plans: by shape alone, so that sums are the same on every machine ---------------------------

_WARPS = 4
_LONGEST_BLOCK = 512
_PROGRAMS = 512  # of a backward: a few for every multiprocessor of the largest chips
_LONGEST_ROW = 2**30  # columns of params are counted in 32 bits


class _Plan(NamedTuple):
    """How rows are cut into tiles, and what of it the kernels are compiled for."""

    rows: int
    channels: int
    moved: int
    outer: int
    inner: int
    vector: int  # elements: divides the begin and the length of every contiguous run
    tile_rows: int
    block: int

    @property
    def kept_blocks(self) -> int:
        return triton.cdiv((self.channels - self.moved) * self.outer * self.inner, self.block)

    @property
    def moved_blocks(self) -> int:
        return triton.cdiv(self.moved * self.outer * self.inner, self.block)

    @property
    def iterations(self) -> int:
        """Tiles one after another in a program of a backward."""
        wanted = triton.cdiv(_PROGRAMS, self.kept_blocks + self.moved_blocks)
        return max(1, triton.cdiv(self.rows, self.tile_rows * wanted))

    @property
    def groups(self) -> int:
        """Programs of a backward along the rows."""
        return triton.cdiv(self.rows, self.tile_rows * self.iterations)

    @property
    def run(self) -> int:
        """Neighbouring columns of one channel that a program of a backward adds up."""
        return min(_power_of_2(self.inner), self.block)

    def constants(self, x: Tensor, flip: bool, index: Tensor | None) -> dict[str, Any]:
        return {
            "CHANNELS": self.channels,
            "MOVED": self.moved,
            "INNER": self.inner,
            "FLIP": flip and index is None,
            "ROWS": self.tile_rows,
            "BLOCK": self.block,
            "VECTOR": self.vector,
            "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "num_warps": _WARPS,
            # Without a limit ptxas now and then spills a few registers to come down to a round number.
            "maxnreg": 255 if x.dtype == torch.float64 else 168,
        }

    def grid_constants(self) -> dict[str, Any]:
        """Those of a backward."""
        blocks = {"KEPT_BLOCKS": self.kept_blocks, "MOVED_BLOCKS": self.moved_blocks}
        return blocks | {"RUN": self.run}


def _power_of_2(n: int) -> int:
    """The largest that divides n."""
    return n & -n


def _plan(
    x: Tensor, rows: int, channels: int, moved: int, outer: int, inner: int, indexed: bool
) -> _Plan:
    if channels * outer * inner >= _LONGEST_ROW:
        raise ValueError(
            f"x: got {channels * outer * inner} elements a sample, want fewer than {_LONGEST_ROW}"
        )
    kept_run, moved_run = (channels - moved) * inner, moved * inner
    divisor = _power_of_2(inner if indexed else kept_run | moved_run)
    widest = 8 if x.element_size() == 2 else 4  # elements: 16 bytes, but for float64
    tile = 32 * _WARPS * min(divisor, widest)  # one vector a thread
    longest = triton.next_power_of_2(max(kept_run, moved_run) * outer)
    block = min(divisor if divisor >= 64 else longest, tile, _LONGEST_BLOCK)
    vector = min(divisor, block, widest)
    return _Plan(rows, channels, moved, outer, inner, vector, tile // block, block)


def _by_sample(x: Tensor, moved: int, index: Tensor | None) -> _Plan:
    """A row is a sample."""
    positions = x.shape[2:].numel()
    outer, inner = (1, positions) if x.is_contiguous() else (positions, 1)
    return _plan(x, x.shape[0], x.shape[1], moved, outer, inner, index is not None)


def _by_row(x: Tensor, channels: int, moved: int, index: Tensor | None) -> _Plan:
    """A row is a sample of a contiguous tensor, or a pixel of a channels-last one."""
    positions = x.shape[2:].numel()
    rows, inner = (x.shape[0], positions) if x.is_contiguous() else (x.shape[0] * positions, 1)
    return _plan(x, rows, channels, moved, 1, inner, index is not None)


def _form_constants(form: CouplingForm) -> dict[str, Any]:
    return {
        "SCALE": form.scale,
        "CLAMP": form.clamp,
        "EPS": form.eps,
        "FACTOR": form.factor,
        "SHIFT_FIRST": form.shift_first,
        "INTERLEAVED": form.interleaved,
        "SCALE_LEADS": form.leading == "scale",
        "NORM_SHIFT_FIRST": form.norm_shift_first,
    }


# --- launchers -----------------------------------------------------------------------------------


def _new(like: Tensor, channels: int) -> Tensor:
    """Memory in the type and format of `like` for so many channels."""
    shape = (like.shape[0], channels, *like.shape[2:])
    if like.is_contiguous():
        return like.new_empty(shape)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def identity(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: CouplingForm,
    flip: bool,
) -> Tensor:
    plan = _by_row(x, x.shape[1], moved, index)
    a = _new(x, x.shape[1] - moved)
    grid = (triton.cdiv(plan.rows, plan.tile_rows) * plan.kept_blocks,)
    launch(
        *(_identity_kernel, grid, x, log_scale, bias, index, a, plan.rows),
        **plan.constants(x, flip, index),
        NORM_SHIFT_FIRST=form.norm_shift_first,
        BLOCKS=plan.kept_blocks,
    )
    return a


def identity_backward(
    grad: Tensor,
    a: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    index: Tensor | None,
    moved: int,
    form: CouplingForm,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _by_row(a, a.shape[1] + moved, moved, index)
    constants = plan.constants(a, flip, index)
    grad_kept, partials = torch.empty_like(a), _partials(a, plan)
    launch(
        *(_identity_backward_kernel, (plan.groups * plan.kept_blocks,)),
        *(grad, a, log_scale, bias, index, grad_kept, partials, plan.rows, plan.iterations),
        **constants,
        NORM_SHIFT_FIRST=form.norm_shift_first,
        RUN=plan.run,
        BLOCKS=plan.kept_blocks,
    )
    grads = torch.empty_like(log_scale), torch.empty_like(bias)
    _finish(partials, None, index, (*grads, None), plan, constants, weight=0)
    return grad_kept, *grads


def map(
    x: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    index: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    samples = x.shape[0]
    plan = _by_sample(x, _moved(params), index)
    out, total = torch.empty_like(x), x.new_empty(samples, dtype=accumulate_dtype(x))
    launch(
        *(_map_kernel, (triton.cdiv(samples, plan.tile_rows),)),
        *(x, params, log_scale, bias, gain, log_det, index, out, total, samples),
        **(plan.constants(x, flip, index) | _form_constants(form)),
        OUTER=plan.outer,
        INVERSE=inverse,
    )
    return out, total


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    params: Tensor | None,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    index: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    plan = _by_row(out, out.shape[1], _moved(params), index)
    positions = out.shape[2:].numel()
    constants = plan.constants(out, flip, index)
    grad_in, grad_params = torch.empty_like(out), _empty_like(params)
    grads = _empty_like(log_scale), _empty_like(bias), _empty_like(gain)
    summed = any(g is not None for g in grads)
    partials = _partials(out, plan) if summed else None
    launch(
        *(_gradients_kernel, (plan.groups * (plan.kept_blocks + plan.moved_blocks),)),
        *(grad_out, grad_log_det, out, params, log_scale, bias, gain, index),
        *(grad_in, grad_params, partials, plan.rows, plan.iterations),
        **(constants | plan.grid_constants() | _form_constants(form)),
        PER_SAMPLE=1 if out.is_contiguous() else positions,
        INVERSE=inverse,
    )
    if partials is not None:
        weight = -positions if inverse else positions
        _finish(partials, grad_log_det, index, grads, plan, constants, weight)
    return grad_in, grad_params, *grads


def _moved(params: Tensor | None) -> int:
    return 0 if params is None else params.shape[1] // 2


def _empty_like(v: Tensor | None) -> Tensor | None:
    return None if v is None else torch.empty_like(v)


def _partials(x: Tensor, plan: _Plan) -> Tensor:
    """Per group of rows and run of columns: sums for log_scale, for bias and (transformed) for gain,
    with the identity part first."""
    columns = plan.channels * plan.inner // plan.run
    return x.new_empty(plan.groups, 3, columns, dtype=accumulate_dtype(x))


def _finish(
    partials: Tensor,
    grad_log_det: Tensor | None,
    index: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    plan: _Plan,
    constants: dict[str, Any],
    weight: int,
) -> None:
    width = plan.inner // plan.run
    block = min(triton.next_power_of_2(width), 256)
    samples = 0 if grad_log_det is None else grad_log_det.shape[0]
    launch(
        *(_finish_kernel, (plan.channels,)),
        *(partials, grad_log_det, index, *grads, plan.groups, samples),
        *(plan.channels - plan.moved, plan.moved, weight),
        **{k: constants[k] for k in ("FLIP", "ACC", "num_warps")},
        WIDTH=width,
        GROUPS=max(1, 1024 // block),
        BLOCK=block,
    )
