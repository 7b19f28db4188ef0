"""Triton kernels and their launchers: arranged tensors in, tensors out, as in reference.py.

Tensors are walked as NHWC. A row of a tile is a pixel, and a program owns whole images, so that a
convolution needs nothing of another program. Both convolutions are products of a tile: the first of
gathered patches with weights (taps · inputs, hidden), the second of the hidden units, which stay in
registers, with weights (hidden, taps · outputs). The latter gives each pixel what it adds to its
neighbours. That goes to scratch memory, and after a barrier each pixel sums what is meant for it. The
gradient takes the same way, with the transposed weights in the other order.

Where an image has at most four pixels every output sees every input or nearly so: there a row is an
image, and a convolution is one product with dense weights (`DENSE`).

Nothing is accumulated atomically: a program writes partial sums, which are then added in a fixed order.
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
from ..actnorm_coupling.triton_impl import _affine, _affine_backward, _spread, _squash, identity
from .layout import (
    Plan,
    Product,
    blocks,
    halves,
    laid_out,
    make_plan,
    of_weight1,
    of_weight2,
    padded,
    unhalved,
)

__all__ = ["gradients", "map"]

_SCRATCH = 2**28  # bytes at a time; a larger batch is mapped in slices
# Whether a barrier makes what a program has stored visible to all its threads: so it is on NVIDIA's chips.
# For AMD's the compiler does not wait for stores, so that products and coupling are always two launches.
_BARRIER_ORDERS_STORES = torch.version.hip is None
_PROGRAMS = 512  # of the weights' gradients: a few for every multiprocessor of the largest chips

# Not compiled in: so that few kernels serve all batches and hidden layers, and that loops over blocks
# stay loops, which unrolled take more registers than there are.
_SIZES = (
    "samples",
    "rows",
    "iterations",
    "chunks",
    "splits",
    "input_blocks",
    "output_blocks",
    "pitch",
    "begin",
)


# --- tiles of rows -------------------------------------------------------------------------------


@triton.jit
def _rows(group, block, samples, PIXELS: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """The group's first sample; then sample, counted from it, and pixel of each row of a tile, and
    whether there is one. A sample has SLOTS rows, a power of two of at least PIXELS; a group is
    TILE / SLOTS samples, or a sample of several tiles."""
    PER_GROUP: tl.constexpr = TILE // SLOTS if SLOTS < TILE else 1
    first = group.to(tl.int64) * PER_GROUP
    row = block * TILE + tl.arange(0, TILE)
    sample, pixel = row // SLOTS, row % SLOTS
    return first, sample, pixel, (sample < samples - first) & (pixel < PIXELS)


@triton.jit
def _inside(pixel, dy, dx, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    y = pixel // WIDTH + dy
    x = pixel % WIDTH + dx
    return (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)


@triton.jit
def _patches(
    x, pitch, begin, log_scale, bias, first, sample, pixel, valid, block, PART: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr,
    DENSE: tl.constexpr, SIGN: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns block * BLOCK, ... of each row's patch: for every tap, PART channels of the pixel that
    the tap reaches (SIGN 1), or by which the row is reached (SIGN -1), as operands of type TYPE. A pixel
    has pitch * VECTOR channels, and the first that counts is begin * VECTOR."""
    channels, before = pitch * VECTOR, begin * VECTOR
    TAPS: tl.constexpr = HEIGHT * WIDTH if DENSE else KERNEL * KERNEL
    k = block * BLOCK + tl.arange(0, BLOCK)
    live = k < TAPS * PART
    tap, channel = tl.max_constancy(k // PART, VECTOR), k % PART
    if DENSE:
        row = sample * (HEIGHT * WIDTH * channels)
        column = tap * channels
        mask = valid[:, None] & live[None, :]
    else:
        row = (sample * (HEIGHT * WIDTH) + pixel) * channels
        dy, dx = (tap // KERNEL - KERNEL // 2) * SIGN, (tap % KERNEL - KERNEL // 2) * SIGN
        column = (dy * WIDTH + dx) * channels
        # A bit for each tap: one test for each element instead of six. There are no bits for the
        # columns of padding, whose taps are 9 and above, but below 32.
        across, inside = tl.zeros_like(pixel), tl.zeros_like(pixel)
        for i in tl.static_range(KERNEL):
            reached = pixel % WIDTH + (i - KERNEL // 2) * SIGN
            across |= tl.where((reached >= 0) & (reached < WIDTH), 1 << i, 0)
        for i in tl.static_range(KERNEL):
            reached = pixel // WIDTH + (i - KERNEL // 2) * SIGN
            there = valid & (reached >= 0) & (reached < HEIGHT)
            inside |= tl.where(there, across << (i * KERNEL), 0)
        mask = ((inside[:, None] >> tap[None, :]) & 1) != 0
    column = tl.max_contiguous(tl.multiple_of(column + channel + before, VECTOR), VECTOR)
    base = x + first * (HEIGHT * WIDTH * channels)
    v = tl.load(base + (row[:, None] + column[None, :]), mask=mask, other=0)
    if log_scale is not None:
        lam = _spread(log_scale, before + channel, live, ACC)
        b = _spread(bias, before + channel, live, ACC)
        u = _affine(v.to(ACC), lam, b, False, NORM_SHIFT_FIRST)
        v = tl.where(mask, u, 0.0)
    return v.to(TYPE)


@triton.jit
def _gather(
    scratch, first, sample, pixel, mask, column, rows, splits, PART: tl.constexpr, PAIR: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, DENSE: tl.constexpr,
    SIGN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum over the taps of what the pixel that the tap reaches (SIGN 1), or by which this one is
    reached (SIGN -1), has in scratch for it: of a column, and with PAIR of the one PART / 2 later."""
    TAPS: tl.constexpr = HEIGHT * WIDTH if DENSE else KERNEL * KERNEL
    one, other = tl.zeros((TILE, BLOCK), ACC), tl.zeros((TILE, BLOCK), ACC)
    base = scratch + first * (HEIGHT * WIDTH * PART * (1 if DENSE else TAPS))
    for _ in range(splits):
        if DENSE:
            row = (sample * (HEIGHT * WIDTH) + pixel) * PART
            at = row[:, None] + column[None, :]
            one += tl.load(base + at, mask=mask, other=0)
            if PAIR:
                other += tl.load(base + at + PART // 2, mask=mask, other=0)
        else:
            # A loop over the rows of the kernel, whose taps are in flight together: unrolled, the
            # masks of all nine take more scalar registers than AMD's chips have.
            for down in range(KERNEL):
                for right in tl.static_range(KERNEL):
                    dy, dx = (down - KERNEL // 2) * SIGN, (right - KERNEL // 2) * SIGN
                    there = sample * (HEIGHT * WIDTH) + pixel + (dy * WIDTH + dx)
                    row = there * (TAPS * PART) + (down * KERNEL + right) * PART
                    reached = mask & _inside(pixel, dy, dx, HEIGHT, WIDTH)[:, None]
                    at = row[:, None] + column[None, :]
                    one += tl.load(base + at, mask=reached, other=0)
                    if PAIR:
                        other += tl.load(base + at + PART // 2, mask=reached, other=0)
        base += rows.to(tl.int64) * (TAPS * PART)
    return one, other


# --- the two products ----------------------------------------------------------------------------


@triton.jit
def _weights(w, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a padded matrix of WIDTH columns."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return tl.load(w + (r[:, None] * WIDTH + c[None, :]))


@triton.jit
def _chunk(
    a, x, pitch, begin, log_scale, bias, w1, b1, g, grad, w2t, first, sample, pixel, valid, j,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, DENSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, hidden, UNITS: tl.constexpr,
    INPUTS: tl.constexpr, input_blocks, OUTPUTS: tl.constexpr,
    output_blocks, TILE: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """UNITS hidden units from j on, or with `grad` the gradients before their ReLU. `a` and `g` are
    the patches, where they are one block."""
    PATCH: tl.constexpr = HEIGHT * WIDTH if DENSE else KERNEL * KERNEL
    TYPE: tl.constexpr = w1.dtype.element_ty
    pre = tl.zeros((TILE, UNITS), ACC)
    if INPUTS >= PATCH * (CHANNELS - MOVED):
        w = _weights(w1, 0, j, hidden, INPUTS, UNITS)
        pre = tl.dot(a, w, pre, input_precision=PRECISION, out_dtype=ACC)
    else:
        for block in range(input_blocks):
            more = _patches(
                x, pitch, begin, log_scale, bias, first, sample, pixel, valid, block, CHANNELS - MOVED,
                HEIGHT, WIDTH, KERNEL, DENSE, 1, NORM_SHIFT_FIRST, INPUTS, VECTOR, TYPE, ACC,
            )  # fmt: skip
            w = _weights(w1, block * INPUTS, j, hidden, INPUTS, UNITS)
            pre = tl.dot(more, w, pre, input_precision=PRECISION, out_dtype=ACC)
    pre += tl.load(b1 + j + tl.arange(0, UNITS))[None, :]
    if grad is None:
        value = tl.maximum(pre, 0.0)
    else:
        up = tl.zeros((TILE, UNITS), ACC)
        if OUTPUTS >= PATCH * 2 * MOVED:
            v = _weights(w2t, 0, j, hidden, OUTPUTS, UNITS)
            up = tl.dot(g, v, up, input_precision=PRECISION, out_dtype=ACC)
        else:
            for block in range(output_blocks):
                grads = _patches(
                    grad, 2 * MOVED // GRAD_VECTOR, 0, None, None, first, sample, pixel, valid, block,
                    2 * MOVED, HEIGHT, WIDTH, KERNEL, DENSE, -1, False, OUTPUTS, GRAD_VECTOR, TYPE, ACC,
                )  # fmt: skip
                v = _weights(w2t, block * OUTPUTS, j, hidden, OUTPUTS, UNITS)
                up = tl.dot(grads, v, up, input_precision=PRECISION, out_dtype=ACC)
        value = tl.where(pre > 0, up, 0.0)
    return value.to(TYPE)


@triton.jit
def _products(
    x, pitch, begin, log_scale, bias, w1, b1, grad, w2t, second, scratch, group, split, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, DENSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, hidden, UNITS: tl.constexpr,
    chunks, INPUTS: tl.constexpr, input_blocks,
    OUTPUTS: tl.constexpr, output_blocks, COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, SECOND_WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a group's pixels add to their neighbours, through this split of the hidden units: of the
    conditioner's output (`second` is its second weights), or with `grad` of the gradient of its input
    (`second` is its first weights, transposed). Either all columns are summed in registers over the
    chunks, or there is one chunk, and blocks of columns are made one after another."""
    PIXELS: tl.constexpr = 1 if DENSE else HEIGHT * WIDTH
    PATCH: tl.constexpr = HEIGHT * WIDTH if DENSE else KERNEL * KERNEL
    LENGTH: tl.constexpr = PATCH * (2 * MOVED if grad is None else CHANNELS - MOVED)
    TYPE: tl.constexpr = w1.dtype.element_ty
    for tile in range((PIXELS + TILE - 1) // TILE):
        first, sample, pixel, valid = _rows(group, tile, samples, PIXELS, SLOTS, TILE)
        a, g = None, None
        if INPUTS >= PATCH * (CHANNELS - MOVED):
            a = _patches(
                x, pitch, begin, log_scale, bias, first, sample, pixel, valid, 0, CHANNELS - MOVED,
                HEIGHT, WIDTH, KERNEL, DENSE, 1, NORM_SHIFT_FIRST, INPUTS, VECTOR, TYPE, ACC,
            )  # fmt: skip
        if grad is not None:
            if OUTPUTS >= PATCH * 2 * MOVED:
                g = _patches(
                    grad, 2 * MOVED // GRAD_VECTOR, 0, None, None, first, sample, pixel, valid, 0, 2 * MOVED,
                    HEIGHT, WIDTH, KERNEL, DENSE, -1, False, OUTPUTS, GRAD_VECTOR, TYPE, ACC,
                )  # fmt: skip
        to = scratch + (split.to(tl.int64) * rows + first * PIXELS) * LENGTH
        to += ((sample * PIXELS + pixel) * LENGTH)[:, None]
        column = tl.arange(0, COLUMNS)
        if COLUMN_BLOCKS == 1:
            total = tl.zeros((TILE, COLUMNS), ACC)
            for chunk in range(chunks):
                j = (split * chunks + chunk) * UNITS
                h = _chunk(
                    a, x, pitch, begin, log_scale, bias, w1, b1, g, grad, w2t, first, sample, pixel, valid, j,
                    CHANNELS, MOVED, HEIGHT, WIDTH, KERNEL, DENSE, NORM_SHIFT_FIRST,
                    hidden, UNITS, INPUTS, input_blocks, OUTPUTS, output_blocks, TILE,
                    VECTOR, GRAD_VECTOR, PRECISION, ACC,
                )  # fmt: skip
                w = _weights(second, j, 0, SECOND_WIDTH, UNITS, COLUMNS)
                total = tl.dot(h, w, total, input_precision=PRECISION, out_dtype=ACC)
            tl.store(to + column[None, :], total, mask=valid[:, None] & (column < LENGTH)[None, :])
        else:
            j = split * UNITS
            h = _chunk(
                a, x, pitch, begin, log_scale, bias, w1, b1, g, grad, w2t, first, sample, pixel, valid, j,
                CHANNELS, MOVED, HEIGHT, WIDTH, KERNEL, DENSE, NORM_SHIFT_FIRST,
                hidden, UNITS, INPUTS, input_blocks, OUTPUTS, output_blocks, TILE, VECTOR,
                GRAD_VECTOR, PRECISION, ACC,
            )  # fmt: skip
            for block in range(COLUMN_BLOCKS):
                at = block * COLUMNS + column
                w = _weights(second, j, block * COLUMNS, SECOND_WIDTH, UNITS, COLUMNS)
                none = tl.zeros((TILE, COLUMNS), ACC)
                part = tl.dot(h, w, none, input_precision=PRECISION, out_dtype=ACC)
                tl.store(to + at[None, :], part, mask=valid[:, None] & (at < LENGTH)[None, :])


# --- coupling ------------------------------------------------------------------------------------


@triton.jit
def _raw_and_shift(
    scratch, b2, first, sample, pixel, mask, channel, live, rows, splits,
    MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr,
    DENSE: tl.constexpr, FACTOR: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    raw, shift = _gather(
        scratch, first, sample, pixel, mask, channel, rows, splits, 2 * MOVED, True, HEIGHT, WIDTH,
        KERNEL, DENSE, 1, TILE, BLOCK, ACC,
    )  # fmt: skip
    raw += _spread(b2, channel, live, ACC)
    shift += _spread(b2, MOVED + channel, live, ACC)
    # Rows without a pixel are given zeros, whose exponentials cannot overflow.
    return tl.where(mask, raw * FACTOR, 0.0), tl.where(mask, shift * FACTOR, 0.0)


@triton.jit
def _couple(
    x, log_scale, bias, b2, gain, log_det, scratch, out, total, group, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr, splits,
    SLOTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes a group's images and their log-dets."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    KEPT: tl.constexpr = CHANNELS - MOVED
    SEGMENT: tl.constexpr = SLOTS if SLOTS < TILE else TILE
    own = tl.zeros((TILE // SEGMENT,), ACC)
    for tile in range((PIXELS + TILE - 1) // TILE):
        first, sample, pixel, valid = _rows(group, tile, samples, PIXELS, SLOTS, TILE)
        row = ((sample * PIXELS + pixel) * CHANNELS)[:, None]
        base, to = x + first * (PIXELS * CHANNELS), out + first * (PIXELS * CHANNELS)
        for start in range(0, KEPT, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            live = channel < KEPT
            mask = valid[:, None] & live[None, :]
            channel += MOVED if FLIP else 0
            v = tl.load(base + (row + channel[None, :]), mask=mask, other=0).to(ACC)
            if log_scale is not None:
                lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
                v = _affine(v, lam, b, INVERSE, NORM_SHIFT_FIRST)
            tl.store(to + (row + channel[None, :]), v, mask=mask)
        for start in range(0, MOVED, BLOCK):
            k = start + tl.arange(0, BLOCK)
            live = k < MOVED
            mask = valid[:, None] & live[None, :]
            raw, t = _raw_and_shift(
                scratch, b2, first, sample, pixel, mask, k, live, rows, splits, MOVED, HEIGHT, WIDTH,
                KERNEL, DENSE, FACTOR, TILE, BLOCK, ACC,
            )  # fmt: skip
            s, _ = _squash(raw, SCALE, CLAMP, EPS, ACC)
            if gain is not None:
                s *= _spread(gain, k, live, ACC)
            channel = k + (0 if FLIP else KEPT)
            v = tl.load(base + (row + channel[None, :]), mask=mask, other=0).to(ACC)
            if log_scale is not None:
                lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
                if not INVERSE:
                    v = _affine(v, lam, b, False, NORM_SHIFT_FIRST)
            v = _affine(v, s, t, INVERSE, SHIFT_FIRST)
            if log_scale is not None:
                if INVERSE:
                    v = _affine(v, lam, b, True, NORM_SHIFT_FIRST)
            tl.store(to + (row + channel[None, :]), v, mask=mask)
            sums = tl.sum(tl.where(mask, s, 0.0), axis=1)
            own += tl.sum(tl.reshape(sums, (TILE // SEGMENT, SEGMENT)), axis=1)
    if log_scale is not None:
        sum_lam = tl.zeros((128,), ACC)
        for start in range(0, CHANNELS, 128):
            channel = start + tl.arange(0, 128)
            sum_lam += tl.load(log_scale + channel, mask=channel < CHANNELS, other=0).to(ACC)
        own += tl.sum(sum_lam, axis=0) * PIXELS
    if INVERSE:
        own = -own
    sample = group.to(tl.int64) * (TILE // SEGMENT) + tl.arange(0, TILE // SEGMENT)
    if log_det is not None:
        own += tl.load(log_det + sample, mask=sample < samples, other=0).to(ACC)
    tl.store(total + sample, own, mask=sample < samples)


@triton.jit
def _store_sum(partials, tile, slot, channel, live, SLOTS: tl.constexpr, LENGTH: tl.constexpr):
    """The sum of a tile over its rows; `partials` is this tile's (SLOTS, LENGTH)."""
    tl.store(partials + (slot * LENGTH + channel), tl.sum(tile, axis=0), mask=live)


@triton.jit
def _couple_backward(
    grad_out, grad_log_det, out, log_scale, bias, b2, gain, scratch, grad_in, grad_params,
    partials, group, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr, splits,
    SLOTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The transformed part of the input's gradient, that of the conditioner's output, and sums for
    log_scale, bias, gain and both halves of the second convolution's bias."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = (PIXELS + TILE - 1) // TILE
    for tile in range(TILES):
        first, sample, pixel, valid = _rows(group, tile, samples, PIXELS, SLOTS, TILE)
        place = sample * PIXELS + pixel
        sums = partials + (group.to(tl.int64) * TILES + tile) * (5 * MOVED)
        begin = first * (PIXELS * CHANNELS)
        g_log_det = tl.load(grad_log_det + first + sample, mask=valid, other=0).to(ACC)[:, None]
        for start in range(0, MOVED, BLOCK):
            k = start + tl.arange(0, BLOCK)
            live = k < MOVED
            mask = valid[:, None] & live[None, :]
            raw, t = _raw_and_shift(
                scratch, b2, first, sample, pixel, mask, k, live, rows, splits, MOVED, HEIGHT, WIDTH,
                KERNEL, DENSE, FACTOR, TILE, BLOCK, ACC,
            )  # fmt: skip
            f, slope = _squash(raw, SCALE, CLAMP, EPS, ACC)
            s = f
            if gain is not None:
                bound = _spread(gain, k, live, ACC)
                s = bound * f
            channel = k + (0 if FLIP else CHANNELS - MOVED)
            at = (place * CHANNELS)[:, None] + channel[None, :]
            v = tl.load(out + begin + at, mask=mask, other=0).to(ACC)
            g = tl.load(grad_out + begin + at, mask=mask, other=0).to(ACC)
            if log_scale is not None:
                lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
                if INVERSE:
                    v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, True, NORM_SHIFT_FIRST)
            v, g, grad_s, grad_t = _affine_backward(v, g, s, t, INVERSE, SHIFT_FIRST)
            grad_s += -g_log_det if INVERSE else g_log_det
            if gain is not None:
                _store_sum(sums, grad_s * f, 2, k, live, 5, MOVED)
                grad_s *= bound
            grad_raw, grad_t = grad_s * slope * FACTOR, grad_t * FACTOR
            _store_sum(sums, tl.where(mask, grad_raw, 0.0), 3, k, live, 5, MOVED)
            _store_sum(sums, grad_t, 4, k, live, 5, MOVED)
            to = grad_params + first * (PIXELS * 2 * MOVED)
            to += (place * (2 * MOVED))[:, None] + k[None, :]
            tl.store(to, grad_raw, mask=mask)
            tl.store(to + MOVED, grad_t, mask=mask)
            if log_scale is not None:
                if not INVERSE:
                    v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, False, NORM_SHIFT_FIRST)
                _store_sum(sums, grad_lam, 0, k, live, 5, MOVED)
                _store_sum(sums, grad_b, 1, k, live, 5, MOVED)
            tl.store(grad_in + begin + at, g, mask=mask)


@triton.jit
def _identity_backward(
    grad_out, out, log_scale, bias, scratch, grad_in, partials, group, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, splits, SLOTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The identity part of the input's gradient, and sums for log_scale and bias. The conditioner's
    input is actnorm's output in the forward, and the given y in the inverse."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    KEPT: tl.constexpr = CHANNELS - MOVED
    TILES: tl.constexpr = (PIXELS + TILE - 1) // TILE
    for tile in range(TILES):
        first, sample, pixel, valid = _rows(group, tile, samples, PIXELS, SLOTS, TILE)
        sums = partials + (group.to(tl.int64) * TILES + tile) * (2 * KEPT)
        row = ((sample * PIXELS + pixel) * CHANNELS)[:, None]
        begin = first * (PIXELS * CHANNELS)
        for start in range(0, KEPT, BLOCK):
            k = start + tl.arange(0, BLOCK)
            live = k < KEPT
            mask = valid[:, None] & live[None, :]
            channel = k + (MOVED if FLIP else 0)
            at = row + channel[None, :]
            g = tl.load(grad_out + begin + at, mask=mask, other=0).to(ACC)
            grad_a, _ = _gather(
                scratch, first, sample, pixel, mask, k, rows, splits, KEPT, False, HEIGHT, WIDTH, KERNEL,
                DENSE, -1, TILE, BLOCK, ACC,
            )  # fmt: skip
            if not INVERSE:
                g += grad_a
            if log_scale is not None:
                v = tl.load(out + begin + at, mask=mask, other=0).to(ACC)
                lam, b = _spread(log_scale, channel, live, ACC), _spread(bias, channel, live, ACC)
                v, g, grad_lam, grad_b = _affine_backward(v, g, lam, b, INVERSE, NORM_SHIFT_FIRST)
                _store_sum(sums, grad_lam, 0, k, live, 2, KEPT)
                _store_sum(sums, grad_b, 1, k, live, 2, KEPT)
            if INVERSE:
                g += grad_a
            tl.store(grad_in + begin + at, g, mask=mask)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def _products_kernel(
    x, pitch, begin, log_scale, bias, w1, b1, grad, w2t, second, scratch, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, DENSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, hidden, UNITS: tl.constexpr, chunks, splits,
    INPUTS: tl.constexpr, input_blocks, OUTPUTS: tl.constexpr,
    output_blocks, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    SECOND_WIDTH: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The products alone, where the hidden units of an image are split among programs."""
    _products(
        x, pitch, begin, log_scale, bias, w1, b1, grad, w2t, second, scratch, tl.program_id(0) // splits,
        tl.program_id(0) % splits, samples, rows, CHANNELS, MOVED, HEIGHT, WIDTH, KERNEL,
        DENSE, NORM_SHIFT_FIRST, hidden, UNITS, chunks, INPUTS, input_blocks, OUTPUTS,
        output_blocks, COLUMNS, COLUMN_BLOCKS, SECOND_WIDTH, SLOTS, TILE, VECTOR, GRAD_VECTOR,
        PRECISION, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _map_kernel(
    x, log_scale, bias, w1, b1, w2, b2, gain, log_det, scratch, out, total, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr, hidden,
    UNITS: tl.constexpr, chunks, splits, INPUTS: tl.constexpr,
    input_blocks, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    SECOND_WIDTH: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Products (FUSED, else they have been made) and coupling."""
    group = tl.program_id(0)
    if FUSED:
        _products(
            x, CHANNELS // VECTOR, (MOVED if FLIP else 0) // VECTOR,
            None if INVERSE else log_scale, None if INVERSE else bias, w1, b1, None, None, w2, scratch,
            group, tl.program_id(0) % splits, samples, rows, CHANNELS, MOVED,
            HEIGHT, WIDTH, KERNEL, DENSE, NORM_SHIFT_FIRST, hidden, UNITS, chunks, INPUTS,
            input_blocks, 16, 1, COLUMNS, COLUMN_BLOCKS, SECOND_WIDTH, SLOTS, TILE, VECTOR,
            1, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()  # scratch is now visible to all threads of the program
    _couple(
        x, log_scale, bias, b2, gain, log_det, scratch, out, total, group, samples,
        rows, CHANNELS, MOVED, HEIGHT, WIDTH, KERNEL, FLIP, DENSE, INVERSE, SCALE, CLAMP,
        EPS, FACTOR, SHIFT_FIRST, NORM_SHIFT_FIRST, splits, SLOTS, TILE, BLOCK, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _couple_backward_kernel(
    grad_out, grad_log_det, out, log_scale, bias, a, pitch, begin, w1, b1, w2, b2, gain, scratch,
    grad_in, grad_params, partials, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, NORM_SHIFT_FIRST: tl.constexpr, hidden,
    UNITS: tl.constexpr, chunks, splits, INPUTS: tl.constexpr,
    input_blocks, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    SECOND_WIDTH: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The conditioner again (FUSED), from its input a, then the coupling backwards."""
    group = tl.program_id(0)
    if FUSED:
        _products(
            a, pitch, begin, None, None, w1, b1, None, None, w2, scratch,
            group, tl.program_id(0) % splits, samples, rows, CHANNELS, MOVED,
            HEIGHT, WIDTH, KERNEL, DENSE, NORM_SHIFT_FIRST, hidden, UNITS, chunks, INPUTS,
            input_blocks, 16, 1, COLUMNS, COLUMN_BLOCKS, SECOND_WIDTH, SLOTS, TILE, VECTOR,
            1, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()  # scratch is now visible to all threads of the program
    _couple_backward(
        grad_out, grad_log_det, out, log_scale, bias, b2, gain, scratch, grad_in,
        grad_params, partials, group, samples, rows, CHANNELS, MOVED, HEIGHT,
        WIDTH, KERNEL, FLIP, DENSE, INVERSE, SCALE, CLAMP, EPS, FACTOR, SHIFT_FIRST,
        NORM_SHIFT_FIRST, splits, SLOTS, TILE, BLOCK, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _identity_backward_kernel(
    grad_out, out, log_scale, bias, a, pitch, begin, w1, b1, grad_params, w2t, w1t, scratch, grad_in,
    partials, samples, rows,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, FLIP: tl.constexpr, DENSE: tl.constexpr, INVERSE: tl.constexpr,
    NORM_SHIFT_FIRST: tl.constexpr, hidden, UNITS: tl.constexpr,
    chunks, splits, INPUTS: tl.constexpr,
    input_blocks, OUTPUTS: tl.constexpr, output_blocks,
    COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, SECOND_WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The gradient through the conditioner (FUSED), and that of the identity part."""
    group = tl.program_id(0)
    if FUSED:
        _products(
            a, pitch, begin, None, None, w1, b1, grad_params, w2t, w1t, scratch,
            group, tl.program_id(0) % splits, samples, rows, CHANNELS, MOVED,
            HEIGHT, WIDTH, KERNEL, DENSE, NORM_SHIFT_FIRST, hidden, UNITS, chunks, INPUTS,
            input_blocks, OUTPUTS, output_blocks, COLUMNS, COLUMN_BLOCKS, SECOND_WIDTH, SLOTS, TILE, VECTOR,
            GRAD_VECTOR, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()  # scratch is now visible to all threads of the program
    _identity_backward(
        grad_out, out, log_scale, bias, scratch, grad_in, partials, group, samples,
        rows, CHANNELS, MOVED, HEIGHT, WIDTH, KERNEL, FLIP, DENSE, INVERSE,
        NORM_SHIFT_FIRST, splits, SLOTS, TILE, BLOCK, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _weights_kernel(
    x, pitch, begin, w1t, b1, grad, w2, partials, sums, samples, iterations,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, DENSE: tl.constexpr,
    hidden, UNITS: tl.constexpr,
    INPUTS: tl.constexpr, input_blocks, OUTPUTS: tl.constexpr,
    output_blocks, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    FIRST_WIDTH: tl.constexpr, SECOND_WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Gradients of UNITS rows and COLUMNS columns of w1t (with `sums`, of the first bias) or, SECOND, of
    w2, from `iterations` tiles of pixels; with the hidden units as rows, as the products want it."""
    PIXELS: tl.constexpr = 1 if DENSE else HEIGHT * WIDTH
    TILES: tl.constexpr = (PIXELS + TILE - 1) // TILE
    PATCH: tl.constexpr = HEIGHT * WIDTH if DENSE else KERNEL * KERNEL
    LENGTH: tl.constexpr = PATCH * (2 * MOVED if SECOND else CHANNELS - MOVED)
    TYPE: tl.constexpr = w1t.dtype.element_ty
    blocks = hidden // UNITS * COLUMN_BLOCKS
    part = tl.program_id(0) // blocks
    column_block = tl.program_id(0) % COLUMN_BLOCKS
    j = tl.program_id(0) % blocks // COLUMN_BLOCKS * UNITS
    unit = j + tl.arange(0, UNITS)
    b = tl.load(b1 + unit)[:, None]
    total = tl.zeros((UNITS, COLUMNS), ACC)
    total_b = tl.zeros((UNITS,), ACC)
    for i in range(iterations):
        tile = part * iterations + i
        first, sample, pixel, valid = _rows(
            tile // TILES, tile % TILES, samples, PIXELS, SLOTS, TILE
        )
        pre = tl.zeros((UNITS, TILE), ACC)
        for block in range(input_blocks):
            a = _patches(
                x, pitch, begin, None, None, first, sample, pixel, valid, block, CHANNELS - MOVED,
                HEIGHT, WIDTH, KERNEL, DENSE, 1, False, INPUTS, VECTOR, TYPE, ACC,
            )  # fmt: skip
            w = _weights(w1t, j, block * INPUTS, FIRST_WIDTH, UNITS, INPUTS)
            pre = tl.dot(w, tl.trans(a), pre, input_precision=PRECISION, out_dtype=ACC)
        pre += b
        if SECOND:
            value = tl.maximum(pre, 0.0)
            other = _patches(
                grad, 2 * MOVED // GRAD_VECTOR, 0, None, None, first, sample, pixel, valid, column_block,
                2 * MOVED, HEIGHT, WIDTH, KERNEL, DENSE, -1, False, COLUMNS, GRAD_VECTOR, TYPE, ACC,
            )  # fmt: skip
        else:
            up = tl.zeros((UNITS, TILE), ACC)
            for block in range(output_blocks):
                g = _patches(
                    grad, 2 * MOVED // GRAD_VECTOR, 0, None, None, first, sample, pixel, valid, block,
                    2 * MOVED, HEIGHT, WIDTH, KERNEL, DENSE, -1, False, OUTPUTS, GRAD_VECTOR, TYPE, ACC,
                )  # fmt: skip
                v = _weights(w2, j, block * OUTPUTS, SECOND_WIDTH, UNITS, OUTPUTS)
                up = tl.dot(v, tl.trans(g), up, input_precision=PRECISION, out_dtype=ACC)
            value = tl.where(pre > 0, up, 0.0)
            total_b += tl.sum(value, axis=1)
            other = _patches(
                x, pitch, begin, None, None, first, sample, pixel, valid, column_block, CHANNELS - MOVED,
                HEIGHT, WIDTH, KERNEL, DENSE, 1, False, COLUMNS, VECTOR, TYPE, ACC,
            )  # fmt: skip
        total = tl.dot(value.to(TYPE), other, total, input_precision=PRECISION, out_dtype=ACC)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    row = part.to(tl.int64) * hidden + unit
    at = (row * LENGTH)[:, None] + column[None, :]
    tl.store(partials + at, total, mask=(column < LENGTH)[None, :])
    if not SECOND:
        if column_block == 0:
            tl.store(sums + row, total_b)


# --- constants ---


def _vector(dtype: torch.dtype, *sizes: int) -> int:
    """Elements that divide all sizes, 16 bytes at most."""
    widest = 16 // dtype.itemsize
    n = functools.reduce(lambda a, b: a | b, sizes)
    return min(n & -n, widest)


def _constants(x: Tensor, plan: Plan, flip: bool) -> dict[str, Any]:
    moved, kept = plan.moved, plan.kept
    first = moved if flip else 0
    return {
        "CHANNELS": plan.channels,
        "MOVED": moved,
        "HEIGHT": plan.height,
        "WIDTH": plan.width,
        "KERNEL": plan.size,
        "FLIP": flip,
        "DENSE": plan.dense,
        "hidden": plan.hidden,
        "INPUTS": plan.inputs,
        "input_blocks": plan.input_blocks,
        "TILE": plan.tile,
        "VECTOR": min(_vector(x.dtype, kept, plan.channels, first), plan.inputs),
        # Of float32 operands; close to float32, at a third of the speed of TF32. README.md: Precision.
        "PRECISION": "tf32x3",
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": 8,
        "num_stages": 2,
        # Without a limit ptxas now and then spills a few registers to come down to a round number.
        "maxnreg": 255,
        # Float32 products as they are, which matrix cores there can do; and no patches fetched ahead,
        # the masks of which take more scalar registers than there are.
        "amd": {"PRECISION": "ieee", "num_stages": 1},
    }


def _product_constants(product: Product) -> dict[str, Any]:
    return {
        "UNITS": product.units,
        "chunks": product.chunks,
        "splits": product.splits,
        "COLUMNS": product.columns,
        "COLUMN_BLOCKS": product.column_blocks,
    }


def _form_constants(form: CouplingForm) -> dict[str, Any]:
    """What is left of a form once `_laid_out` has put raw before shift."""
    return {
        "SCALE": form.scale,
        "CLAMP": form.clamp,
        "EPS": form.eps,
        "FACTOR": form.factor,
        "SHIFT_FIRST": form.shift_first,
    }


# --- launchers -----------------------------------------------------------------------------------


_Pair = tuple[Tensor | None, Tensor | None]


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _like(nhwc: Tensor, x: Tensor) -> Tensor:
    """As NCHW, in the memory format of x."""
    out = nhwc.permute(0, 3, 1, 2)
    return out.contiguous() if x.is_contiguous() else out


class _Operands(NamedTuple):
    """What all launches of one call share."""

    plan: Plan
    constants: dict[str, Any]
    w1: Tensor  # (patch of the input, hidden), in the products' type like w2
    b1: Tensor
    w2: Tensor  # (hidden, patch of the output)
    b2: Tensor

    def place(self, channels: int, flip: bool) -> tuple[int, int]:
        """Where a pixel of so many channels has the identity part: `_patches`' pitch and begin."""
        vector = self.constants["VECTOR"]
        return channels // vector, (self.plan.moved if flip else 0) // vector


class _Input(NamedTuple):
    """The conditioner's input."""

    pixels: Tensor  # (B, h, w, channels)
    place: tuple[int, int]


def _operands(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    form: CouplingForm,
    flip: bool,
    products: torch.dtype,
) -> _Operands:
    _, channels, height, width = x.shape
    outputs, hidden, size, _ = weight2.shape
    plan = make_plan(channels, outputs // 2, height, width, size, hidden, products)
    acc = accumulate_dtype(x)
    w1, b1, w2 = laid_out(weight1, bias1, weight2, form, plan)
    return _Operands(
        plan,
        _constants(x, plan, flip) | {"NORM_SHIFT_FIRST": form.norm_shift_first},
        padded(w1, plan.first_width, plan.hidden, products),
        F.pad(b1.to(acc), (0, plan.hidden - b1.shape[0])),
        padded(w2, plan.hidden, plan.second_width, products),
        halves(bias2.to(acc), form),
    )


def _coupling_constants(plan: Plan, part: int, inverse: bool) -> dict[str, Any]:
    block = min(triton.next_power_of_2(part), 32)
    return {"SLOTS": plan.slots, "BLOCK": block, "INVERSE": inverse}


_NO_GRADIENT = {"OUTPUTS": 16, "output_blocks": 1, "GRAD_VECTOR": 1}


def _launch(kernel: Any, grid: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch with those of the options that the kernel knows."""
    known = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg", "amd"}
    launch(kernel, (grid,), *arguments, **{k: v for k, v in options.items() if k in known})


def _launch_both(
    kernel: Any,
    operands: _Operands,
    product: Product,
    samples: int,
    products: tuple[Any, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Products and coupling: in one launch where a program has all hidden units and all columns of its
    images in registers. Elsewhere images are so small that there are too few programs for that."""
    plan = operands.plan
    sizes = samples, samples * (1 if plan.dense else plan.pixels)
    options = operands.constants | _product_constants(product) | constants
    fused = product.splits == product.column_blocks == 1 and not plan.dense
    fused = fused and _BARRIER_ORDERS_STORES
    if not fused:
        grid = plan.groups(samples, plan.row_slots, plan.tile) * product.splits
        _launch(_products_kernel, grid, (*products, *sizes), options | {"SLOTS": plan.row_slots})
        # The coupling alone: as many threads as have 16 bytes of a tile each.
        tile = plan.tile * constants["BLOCK"] * products[0].element_size()
        options["num_warps"] = min(options["num_warps"], max(1, tile // (32 * 16)))
    grid = plan.groups(samples, plan.slots, plan.tile)
    _launch(kernel, grid, (*arguments, *sizes), options | {"FUSED": fused})


def _slices(
    x: Tensor, plan: Plan, product: Product, part: int
) -> tuple[list[tuple[slice, slice]], Tensor]:
    """Slices of the batch and of their groups' partial sums, and scratch memory for one at a time."""
    acc = accumulate_dtype(x)
    found = plan.slices(x.shape[0], product, part, _SCRATCH // acc.itemsize)
    longest = found[0].stop if found else 0

    def groups(samples: int) -> int:
        return plan.groups(samples, plan.slots, plan.tile) * plan.tiles

    pairs = [(s, slice(groups(s.start), groups(s.stop))) for s in found]
    return pairs, x.new_empty(plan.scratch(longest, product, part), dtype=acc)


def map(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    log_det: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    operands = _operands(x, weight1, bias1, weight2, bias2, form, flip, products)
    plan, nhwc = operands.plan, _nhwc(x)
    out, total = torch.empty_like(nhwc), x.new_empty(x.shape[0], dtype=accumulate_dtype(x))
    weights, place = (operands.w1, operands.b1), operands.place(plan.channels, flip)
    norm, on_load = (log_scale, bias), (None, None) if inverse else (log_scale, bias)
    constants = {
        **_coupling_constants(plan, max(plan.moved, plan.kept), inverse),
        **_form_constants(form),
        **_NO_GRADIENT,
        "SECOND_WIDTH": plan.second_width,
    }
    slices, scratch = _slices(x, plan, plan.forward, 2 * plan.moved)
    for here, _ in slices:
        given, before = nhwc[here], None if log_det is None else log_det[here]
        _launch_both(
            *(_map_kernel, operands, plan.forward, given.shape[0]),
            (given, *place, *on_load, *weights, None, None, operands.w2, scratch),
            (
                *(given, *norm, *weights, operands.w2, operands.b2, gain, before, scratch),
                *(out[here], total[here]),
            ),
            constants,
        )
    return _like(out, x), total


def gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    out: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    operands = _operands(out, weight1, bias1, weight2, bias2, form, flip, products)
    plan, y, grad = operands.plan, _nhwc(out), _nhwc(grad_out)
    norm = log_scale, bias
    a = _conditioner_input(operands, out, y, norm, form, flip, inverse)
    grad_in, grad_params, moved = _through_coupling(
        operands, y, grad, grad_log_det, norm, a, gain, form, inverse
    )
    w1t, w2t = operands.w1.t().contiguous(), operands.w2.t().contiguous()
    outputs = {
        "OUTPUTS": plan.outputs,
        "output_blocks": plan.output_blocks,
        "GRAD_VECTOR": min(_vector(products, 2 * plan.moved), plan.outputs),
    }
    kept = _through_conditioner(
        operands, y, grad, grad_params, norm, a, (w1t, w2t), grad_in, outputs, inverse
    )
    given = operands, a, grad_params, w1t, outputs
    first, sums = _weight_gradient(*given, second=False)
    second, _ = _weight_gradient(*given, second=True)
    assert sums is not None
    if plan.dense:
        sums = sums[: plan.pixels * bias1.shape[0]].view(plan.pixels, -1).sum(0)
    grad_log_scale = grad_bias = None
    if log_scale is not None and bias is not None:
        through_log_det = grad_log_det.to(sums.dtype).sum()
        through_log_det *= -plan.pixels if inverse else plan.pixels
        pair = [(moved[i], kept[i]) if flip else (kept[i], moved[i]) for i in range(2)]
        grad_log_scale = (torch.cat(pair[0]) + through_log_det).to(log_scale.dtype)
        grad_bias = torch.cat(pair[1]).to(bias.dtype)
    return (
        _like(grad_in, out),
        of_weight1(first, weight1, plan),
        sums[: bias1.shape[0]].to(bias1.dtype),
        of_weight2(second, weight2, form, plan),
        unhalved(moved[3:].flatten(), form).to(bias2.dtype),
        grad_log_scale,
        grad_bias,
        None if gain is None else moved[2].to(gain.dtype),
    )


def _conditioner_input(
    operands: _Operands,
    out: Tensor,
    y: Tensor,
    norm: _Pair,
    form: CouplingForm,
    flip: bool,
    inverse: bool,
) -> _Input:
    """From the output: its identity part as it is in the forward, after actnorm in the inverse."""
    plan, (log_scale, bias) = operands.plan, norm
    if not inverse or log_scale is None or bias is None:
        return _Input(y, operands.place(plan.channels, flip))
    a = identity(out, log_scale, bias, None, plan.moved, form, flip)
    return _Input(_nhwc(a), operands.place(plan.kept, False))


def _through_coupling(
    operands: _Operands,
    y: Tensor,
    grad: Tensor,
    grad_log_det: Tensor,
    norm: _Pair,
    a: _Input,
    gain: Tensor | None,
    form: CouplingForm,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The conditioner again, then the coupling backwards: the gradient of the input, of which the
    identity part is still to be written; that of the conditioner's output, raw before shift; and
    for each transformed channel the sums for log_scale, bias, gain and both halves of bias2."""
    plan, samples = operands.plan, y.shape[0]
    grad_in = torch.empty_like(y)
    grad_params = y.new_empty(*y.shape[:3], 2 * plan.moved, dtype=operands.w2.dtype)
    slices, scratch = _slices(y, plan, plan.forward, 2 * plan.moved)
    groups = plan.groups(samples, plan.slots, plan.tile) * plan.tiles
    sums = y.new_empty(groups, 5, plan.moved, dtype=scratch.dtype)
    constants = {
        **_coupling_constants(plan, plan.moved, inverse),
        **_form_constants(form),
        **_NO_GRADIENT,
        "SECOND_WIDTH": plan.second_width,
    }
    weights = operands.w1, operands.b1
    for here, its_groups in slices:
        given, its_input = y[here], (a.pixels[here], *a.place)
        _launch_both(
            *(_couple_backward_kernel, operands, plan.forward, given.shape[0]),
            (*its_input, None, None, *weights, None, None, operands.w2, scratch),
            (
                *(grad[here], grad_log_det[here], given, *norm, *its_input, *weights),
                *(operands.w2, operands.b2, gain, scratch),
                *(grad_in[here], grad_params[here], sums[its_groups]),
            ),
            constants,
        )
    return grad_in, grad_params, sums.sum(0)


def _through_conditioner(
    operands: _Operands,
    y: Tensor,
    grad: Tensor,
    grad_params: Tensor,
    norm: _Pair,
    a: _Input,
    transposed: tuple[Tensor, Tensor],
    grad_in: Tensor,
    outputs: dict[str, Any],
    inverse: bool,
) -> Tensor:
    """Writes the identity part of grad_in; of its channels the sums for log_scale and bias."""
    plan, samples = operands.plan, y.shape[0]
    slices, scratch = _slices(y, plan, plan.backward, plan.kept)
    groups = plan.groups(samples, plan.slots, plan.tile) * plan.tiles
    sums = y.new_empty(groups, 2, plan.kept, dtype=scratch.dtype)
    w1t, w2t = transposed
    constants = {
        **_coupling_constants(plan, plan.kept, inverse),
        **outputs,
        "SECOND_WIDTH": plan.first_width,
    }
    weights = operands.w1, operands.b1
    for here, its_groups in slices:
        given, its_input, of_params = y[here], (a.pixels[here], *a.place), grad_params[here]
        _launch_both(
            *(_identity_backward_kernel, operands, plan.backward, given.shape[0]),
            (*its_input, None, None, *weights, of_params, w2t, w1t, scratch),
            (
                *(grad[here], given, *norm, *its_input, *weights, of_params, w2t, w1t, scratch),
                *(grad_in[here], sums[its_groups]),
            ),
            constants,
        )
    return sums.sum(0)


def _weight_gradient(
    operands: _Operands,
    a: _Input,
    grad_params: Tensor,
    w1t: Tensor,
    outputs: dict[str, Any],
    second: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of w2 (`second`), or of w1t and of the first bias; rows of hidden units."""
    plan, y = operands.plan, a.pixels
    samples = y.shape[0]
    length = plan.taps * (2 * plan.moved if second else plan.kept)
    columns, column_blocks = blocks(length, plan.widest, plan.widest)
    units, tile = min(64, plan.hidden), 64 if w1t.element_size() == 2 else 32
    programs = plan.hidden // units * column_blocks
    tiles = plan.groups(samples, plan.row_slots, tile)
    tiles *= 1 if plan.dense else triton.cdiv(plan.pixels, tile)
    iterations = max(1, triton.cdiv(tiles * programs, _PROGRAMS))
    parts = triton.cdiv(tiles, iterations)
    acc = accumulate_dtype(y)
    partials = y.new_empty(parts, plan.hidden, length, dtype=acc)
    sums = None if second else y.new_empty(parts, plan.hidden, dtype=acc)
    options = {
        **operands.constants,
        **outputs,
        "TILE": tile,
        "UNITS": units,
        "COLUMNS": columns,
        "COLUMN_BLOCKS": column_blocks,
        "FIRST_WIDTH": plan.first_width,
        "SECOND_WIDTH": plan.second_width,
        "SLOTS": plan.row_slots,
        "SECOND": second,
    }
    arguments = y, *a.place, w1t, operands.b1, grad_params, operands.w2, partials, sums
    _launch(_weights_kernel, parts * programs, (*arguments, samples, iterations), options)
    return partials.sum(0), None if sums is None else sums.sum(0)
