"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

A sample is a row of channels * positions columns; channel = column // positions. Tiles are ROWS
samples by BLOCK columns of one half, so that long rows and many short rows both fill a tile, and
threads read 16 bytes wherever a half's length allows. Nothing is accumulated atomically: a program
of the forward owns its samples' log-dets, and the backward writes partial sums per group of
samples, which `_finish_kernel` adds in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype

__all__ = [
    "backward",
    "forward",
    "identity",
    "identity_backward",
    "inverse",
    "inverse_backward",
]


@triton.jit
def _tanh(x):
    """tanh and its derivative. q cannot overflow; the error near zero is absolute, one rounding of
    1, and so is what matters: tanh only feeds exp and sums."""
    q = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + q)
    t = (1.0 - q) * r
    return tl.where(x < 0, -t, t), 4.0 * q * r * r


@triton.jit
def _spread(pointer, columns, live, POSITIONS: tl.constexpr, ACC: tl.constexpr):
    """A per-channel parameter at each column, as a row of a tile."""
    return tl.load(pointer + columns // POSITIONS, mask=live, other=0).to(ACC)[None, :]


@triton.jit
def _actnorm_log_det(log_scale, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros((1,), ACC)
    for start in range(0, CHANNELS, 128):
        channels = start + tl.arange(0, 128)
        values = tl.load(log_scale + channels, mask=channels < CHANNELS, other=0).to(ACC)
        total += tl.sum(values, axis=0)
    return total * POSITIONS


@triton.jit
def _identity_kernel(
    x, log_scale, bias, a, samples,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    BEGIN: tl.constexpr = MOVED if FLIP else 0
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < KEPT
    mask = (rows < samples) & live[None, :]
    scale = tl.exp(_spread(log_scale, BEGIN + columns, live, POSITIONS, ACC))
    offset = _spread(bias, BEGIN + columns, live, POSITIONS, ACC)
    value = tl.load(x + rows * N + BEGIN + columns[None, :], mask=mask, other=0).to(ACC)
    tl.store(a + rows * KEPT + columns[None, :], value * scale + offset, mask=mask)


@triton.jit
def _identity_backward_kernel(
    grad_a, a, log_scale, bias, grad_x, partials, samples, iterations,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEPT_BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    KEPT_BEGIN: tl.constexpr = MOVED if FLIP else 0
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else KEPT
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first = group * iterations * ROWS
    if block < KEPT_BLOCKS:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        live = columns < KEPT
        at = KEPT_BEGIN + columns
        scale = tl.exp(_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        sum_log_scale = tl.zeros((ROWS, BLOCK), ACC)
        sum_bias = tl.zeros((ROWS, BLOCK), ACC)
        for i in range(iterations):
            rows = (first + i * ROWS + tl.arange(0, ROWS))[:, None]
            mask = (rows < samples) & live[None, :]
            grad = tl.load(grad_a + rows * KEPT + columns[None, :], mask=mask, other=0).to(ACC)
            out = tl.load(a + rows * KEPT + columns[None, :], mask=mask, other=0).to(ACC)
            tl.store(grad_x + rows * N + at[None, :], grad * scale, mask=mask)
            sum_log_scale += grad * (out - offset)
            sum_bias += grad
        to = partials + group * 3 * N + at
        tl.store(to, tl.sum(sum_log_scale, axis=0), mask=live)
        tl.store(to + N, tl.sum(sum_bias, axis=0), mask=live)
    else:
        columns = (block - KEPT_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        live = columns < MOVED
        zero = tl.zeros((ROWS, BLOCK), ACC)
        for i in range(iterations):
            rows = (first + i * ROWS + tl.arange(0, ROWS))[:, None]
            to = grad_x + rows * N + MOVED_BEGIN + columns[None, :]
            tl.store(to, zero, mask=(rows < samples) & live[None, :])


@triton.jit
def _forward_kernel(
    x, params, log_scale, bias, gain, log_det, y, total, samples,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    KEPT_BEGIN: tl.constexpr = MOVED if FLIP else 0
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else KEPT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    for start in range(0, KEPT, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < KEPT
        mask = (rows < samples) & live[None, :]
        at = KEPT_BEGIN + columns
        scale = tl.exp(_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        value = tl.load(x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
        tl.store(y + rows * N + at[None, :], value * scale + offset, mask=mask)
    sum_s = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, MOVED, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < MOVED
        mask = (rows < samples) & live[None, :]
        at = MOVED_BEGIN + columns
        scale = tl.exp(_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        bound = _spread(gain, columns, live, POSITIONS, ACC)
        raw_at = params + rows * (2 * MOVED) + columns[None, :]
        raw = tl.load(raw_at, mask=mask, other=0).to(ACC)
        shift = tl.load(raw_at + MOVED, mask=mask, other=0).to(ACC)
        value = tl.load(x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
        t, _ = _tanh(raw)
        s = bound * t
        u = value * scale + offset
        tl.store(y + rows * N + at[None, :], u * tl.exp(s) + shift, mask=mask)
        sum_s += s
    own = tl.sum(sum_s, axis=1) + _actnorm_log_det(log_scale, CHANNELS, POSITIONS, ACC)
    if log_det is not None:
        own += tl.load(log_det + row, mask=row < samples, other=0)
    tl.store(total + row, own, mask=row < samples)


@triton.jit
def _inverse_kernel(
    y, params, log_scale, bias, gain, log_det, x, total, samples,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    KEPT_BEGIN: tl.constexpr = MOVED if FLIP else 0
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else KEPT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    for start in range(0, KEPT, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < KEPT
        mask = (rows < samples) & live[None, :]
        at = KEPT_BEGIN + columns
        scale = tl.exp(-_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        value = tl.load(y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
        tl.store(x + rows * N + at[None, :], (value - offset) * scale, mask=mask)
    sum_s = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, MOVED, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < MOVED
        mask = (rows < samples) & live[None, :]
        at = MOVED_BEGIN + columns
        scale = tl.exp(-_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        bound = _spread(gain, columns, live, POSITIONS, ACC)
        raw_at = params + rows * (2 * MOVED) + columns[None, :]
        raw = tl.load(raw_at, mask=mask, other=0).to(ACC)
        shift = tl.load(raw_at + MOVED, mask=mask, other=0).to(ACC)
        value = tl.load(y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
        t, _ = _tanh(raw)
        s = bound * t
        u = (value - shift) * tl.exp(-s)
        tl.store(x + rows * N + at[None, :], (u - offset) * scale, mask=mask)
        sum_s += s
    own = -tl.sum(sum_s, axis=1) - _actnorm_log_det(log_scale, CHANNELS, POSITIONS, ACC)
    if log_det is not None:
        own += tl.load(log_det + row, mask=row < samples, other=0)
    tl.store(total + row, own, mask=row < samples)


@triton.jit
def _backward_kernel(
    grad_y, grad_log_det, y, params, log_scale, bias, gain, grad_x, grad_params, partials,
    samples, iterations,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEPT_BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    KEPT_BEGIN: tl.constexpr = MOVED if FLIP else 0
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else KEPT
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first = group * iterations * ROWS
    sum_log_scale = tl.zeros((ROWS, BLOCK), ACC)
    sum_bias = tl.zeros((ROWS, BLOCK), ACC)
    if block < KEPT_BLOCKS:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        live = columns < KEPT
        at = KEPT_BEGIN + columns
        scale = tl.exp(_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        for i in range(iterations):
            rows = (first + i * ROWS + tl.arange(0, ROWS))[:, None]
            mask = (rows < samples) & live[None, :]
            grad = tl.load(grad_y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            out = tl.load(y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            tl.store(grad_x + rows * N + at[None, :], grad * scale, mask=mask)
            sum_log_scale += grad * (out - offset)
            sum_bias += grad
        to = partials + group * 3 * N + at
        tl.store(to, tl.sum(sum_log_scale, axis=0), mask=live)
        tl.store(to + N, tl.sum(sum_bias, axis=0), mask=live)
    else:
        columns = (block - KEPT_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        live = columns < MOVED
        at = MOVED_BEGIN + columns
        scale = tl.exp(_spread(log_scale, at, live, POSITIONS, ACC))
        offset = _spread(bias, at, live, POSITIONS, ACC)
        bound = _spread(gain, columns, live, POSITIONS, ACC)
        sum_gain = tl.zeros((ROWS, BLOCK), ACC)
        for i in range(iterations):
            row = first + i * ROWS + tl.arange(0, ROWS)
            rows = row[:, None]
            mask = (rows < samples) & live[None, :]
            raw_at = rows * (2 * MOVED) + columns[None, :]
            raw = tl.load(params + raw_at, mask=mask, other=0).to(ACC)
            shift = tl.load(params + raw_at + MOVED, mask=mask, other=0).to(ACC)
            grad = tl.load(grad_y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            out = tl.load(y + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            g_log_det = tl.load(grad_log_det + row, mask=row < samples, other=0)[:, None]
            t, derivative = _tanh(raw)
            s = bound * t
            scaled = out - shift  # u * exp(s)
            grad_u = grad * tl.exp(s)
            grad_s = grad * scaled + g_log_det
            tl.store(grad_x + rows * N + at[None, :], grad_u * scale, mask=mask)
            tl.store(grad_params + raw_at, grad_s * bound * derivative, mask=mask)
            tl.store(grad_params + raw_at + MOVED, grad, mask=mask)
            sum_log_scale += grad_u * (scaled * tl.exp(-s) - offset)
            sum_bias += grad_u
            sum_gain += grad_s * t
        to = partials + group * 3 * N + at
        tl.store(to, tl.sum(sum_log_scale, axis=0), mask=live)
        tl.store(to + N, tl.sum(sum_bias, axis=0), mask=live)
        tl.store(to + 2 * N, tl.sum(sum_gain, axis=0), mask=live)


@triton.jit
def _inverse_backward_kernel(
    grad_x, grad_log_det, x, params, log_scale, bias, gain, grad_y, grad_params, partials,
    samples, iterations,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEPT_BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = (CHANNELS // 2) * POSITIONS
    KEPT: tl.constexpr = N - MOVED
    KEPT_BEGIN: tl.constexpr = MOVED if FLIP else 0
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else KEPT
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first = group * iterations * ROWS
    sum_log_scale = tl.zeros((ROWS, BLOCK), ACC)
    sum_bias = tl.zeros((ROWS, BLOCK), ACC)
    if block < KEPT_BLOCKS:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        live = columns < KEPT
        at = KEPT_BEGIN + columns
        scale = tl.exp(-_spread(log_scale, at, live, POSITIONS, ACC))
        for i in range(iterations):
            rows = (first + i * ROWS + tl.arange(0, ROWS))[:, None]
            mask = (rows < samples) & live[None, :]
            grad = tl.load(grad_x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            out = tl.load(x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            tl.store(grad_y + rows * N + at[None, :], grad * scale, mask=mask)
            sum_log_scale -= grad * out
            sum_bias -= grad * scale
        to = partials + group * 3 * N + at
        tl.store(to, tl.sum(sum_log_scale, axis=0), mask=live)
        tl.store(to + N, tl.sum(sum_bias, axis=0), mask=live)
    else:
        columns = (block - KEPT_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        live = columns < MOVED
        at = MOVED_BEGIN + columns
        log_scales = _spread(log_scale, at, live, POSITIONS, ACC)
        scale, unscale = tl.exp(-log_scales), tl.exp(log_scales)
        offset = _spread(bias, at, live, POSITIONS, ACC)
        bound = _spread(gain, columns, live, POSITIONS, ACC)
        sum_gain = tl.zeros((ROWS, BLOCK), ACC)
        for i in range(iterations):
            row = first + i * ROWS + tl.arange(0, ROWS)
            rows = row[:, None]
            mask = (rows < samples) & live[None, :]
            raw_at = rows * (2 * MOVED) + columns[None, :]
            raw = tl.load(params + raw_at, mask=mask, other=0).to(ACC)
            grad = tl.load(grad_x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            out = tl.load(x + rows * N + at[None, :], mask=mask, other=0).to(ACC)
            g_log_det = tl.load(grad_log_det + row, mask=row < samples, other=0)[:, None]
            t, derivative = _tanh(raw)
            u = out * unscale + offset
            grad_u = grad * scale
            grad_moved = grad_u * tl.exp(-bound * t)
            grad_s = -grad_u * u - g_log_det
            tl.store(grad_y + rows * N + at[None, :], grad_moved, mask=mask)
            tl.store(grad_params + raw_at, grad_s * bound * derivative, mask=mask)
            tl.store(grad_params + raw_at + MOVED, -grad_moved, mask=mask)
            sum_log_scale -= grad * out
            sum_bias -= grad_u
            sum_gain += grad_s * t
        to = partials + group * 3 * N + at
        tl.store(to, tl.sum(sum_log_scale, axis=0), mask=live)
        tl.store(to + N, tl.sum(sum_bias, axis=0), mask=live)
        tl.store(to + 2 * N, tl.sum(sum_gain, axis=0), mask=live)


@triton.jit
def _sum_channel(
    partials, channel, slot, groups,
    N: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sum of one parameter's partials over all groups and the positions of a channel."""
    total = tl.zeros((GROUPS, BLOCK), ACC)
    for first in range(0, groups, GROUPS):
        group = (first + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
        for start in range(0, POSITIONS, BLOCK):
            position = (start + tl.arange(0, BLOCK))[None, :]
            mask = (group < groups) & (position < POSITIONS)
            at = (group * 3 + slot) * N + channel * POSITIONS + position
            total += tl.load(partials + at, mask=mask, other=0)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _finish_kernel(
    partials, grad_log_det, grad_log_scale, grad_bias, grad_gain, groups, samples,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, FLIP: tl.constexpr, SIGN: tl.constexpr,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Second stage of every sum over samples. Without grad_gain (the identity op) the transformed
    half has no partials, and its gradients are zero."""
    N: tl.constexpr = CHANNELS * POSITIONS
    MOVED: tl.constexpr = CHANNELS // 2
    MOVED_BEGIN: tl.constexpr = 0 if FLIP else CHANNELS - MOVED
    channel = tl.program_id(0)
    moved = (channel >= MOVED_BEGIN) & (channel < MOVED_BEGIN + MOVED)
    present = groups
    if grad_gain is None:
        present = tl.where(moved, 0, groups)
    sum_log_scale = _sum_channel(partials, channel, 0, present, N, POSITIONS, BLOCK, GROUPS, ACC)
    sum_bias = _sum_channel(partials, channel, 1, present, N, POSITIONS, BLOCK, GROUPS, ACC)
    if grad_gain is not None:
        present = tl.where(moved, groups, 0)
        sum_gain = _sum_channel(partials, channel, 2, present, N, POSITIONS, BLOCK, GROUPS, ACC)
        tl.store(grad_gain + channel - MOVED_BEGIN, sum_gain, mask=moved)
        sum_log_det = tl.zeros((256,), ACC)
        for start in range(0, samples, 256):
            row = start + tl.arange(0, 256)
            sum_log_det += tl.load(grad_log_det + row, mask=row < samples, other=0)
        sum_log_scale += tl.sum(sum_log_det, axis=0) * (SIGN * POSITIONS)
    tl.store(grad_log_scale + channel, sum_log_scale)
    tl.store(grad_bias + channel, sum_bias)


class _Plan(NamedTuple):
    """How a shape is cut into tiles: by shape alone, so that sums are the same on every machine."""

    rows: int  # samples of a tile
    block: int  # columns of a tile
    kept_blocks: int
    moved_blocks: int
    iterations: int  # tiles one after another in a program of the backward
    groups: int  # programs of the backward along the samples


_WARPS = 4
_LONGEST_VECTOR = 8  # elements: 16 bytes of a 16-bit type
_LONGEST_BLOCK = 512
_PROGRAMS = 512  # of the backward: a few for every multiprocessor of the largest chips


def _plan(samples: int, channels: int, positions: int) -> _Plan:
    moved = (channels // 2) * positions
    kept = channels * positions - moved
    divisor = moved & -moved  # the largest power of two that divides the half
    tile = 32 * _WARPS * min(divisor, _LONGEST_VECTOR)  # one vector a thread
    whole = divisor if divisor >= 64 else triton.next_power_of_2(kept)
    block = min(whole, tile, _LONGEST_BLOCK)
    rows = tile // block
    kept_blocks, moved_blocks = triton.cdiv(kept, block), triton.cdiv(moved, block)
    wanted = triton.cdiv(_PROGRAMS, kept_blocks + moved_blocks)
    iterations = max(1, triton.cdiv(samples, rows * wanted))
    groups = triton.cdiv(samples, rows * iterations)
    return _Plan(rows, block, kept_blocks, moved_blocks, iterations, groups)


def _constants(x: Tensor, flip: bool, plan: _Plan) -> dict[str, Any]:
    return {
        "CHANNELS": x.shape[1],
        "POSITIONS": x.shape[2:].numel(),
        "FLIP": flip,
        "BLOCK": plan.block,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": _WARPS,
    }


def _plan_for(x: Tensor) -> _Plan:
    return _plan(x.shape[0], x.shape[1], x.shape[2:].numel())


def identity(x: Tensor, log_scale: Tensor, bias: Tensor, flip: bool) -> Tensor:
    plan = _plan_for(x)
    a = x.new_empty(x.shape[0], x.shape[1] - x.shape[1] // 2, *x.shape[2:])
    grid = (triton.cdiv(x.shape[0], plan.rows), plan.kept_blocks)
    launch(
        *(_identity_kernel, grid, x, log_scale, bias, a, x.shape[0]),
        **_constants(x, flip, plan),
        ROWS=plan.rows,
    )
    return a


def identity_backward(
    grad: Tensor, a: Tensor, log_scale: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = a.new_empty(a.shape[0], log_scale.shape[0], *a.shape[2:])
    plan = _plan_for(grad_x)
    constants = _constants(grad_x, flip, plan)
    partials = _partials(grad_x, plan)
    launch(
        *(_identity_backward_kernel, (plan.groups, plan.kept_blocks + plan.moved_blocks)),
        *(grad, a, log_scale, bias, grad_x, partials, a.shape[0], plan.iterations),
        **constants,
        ROWS=plan.rows,
        KEPT_BLOCKS=plan.kept_blocks,
    )
    grads = torch.empty_like(log_scale), torch.empty_like(bias)
    _finish(partials, None, (*grads, None), plan, constants, sign=1)
    return grad_x, *grads


def forward(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    return _map(_forward_kernel, x, params, log_scale, bias, gain, log_det, flip)


def inverse(
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    return _map(_inverse_kernel, y, params, log_scale, bias, gain, log_det, flip)


def backward(
    grad_y: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_y, grad_log_det, y, params, log_scale, bias, gain)
    return _gradients(_backward_kernel, inputs, flip, sign=1)


def inverse_backward(
    grad_x: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_x, grad_log_det, x, params, log_scale, bias, gain)
    return _gradients(_inverse_backward_kernel, inputs, flip, sign=-1)


def _map(
    kernel: Any,
    x: Tensor,
    params: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    gain: Tensor,
    log_det: Tensor | None,
    flip: bool,
) -> tuple[Tensor, Tensor]:
    plan = _plan_for(x)
    samples = x.shape[0]
    out, total = torch.empty_like(x), x.new_empty(samples, dtype=accumulate_dtype(x))
    launch(
        *(kernel, (triton.cdiv(samples, plan.rows),)),
        *(x, params, log_scale, bias, gain, log_det, out, total, samples),
        **_constants(x, flip, plan),
        ROWS=plan.rows,
    )
    return out, total


def _gradients(
    kernel: Any, inputs: tuple[Tensor, ...], flip: bool, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, grad_log_det, out, params, log_scale, bias, gain = inputs
    plan = _plan_for(out)
    constants = _constants(out, flip, plan)
    partials = _partials(out, plan)
    grad_in, grad_params = torch.empty_like(out), torch.empty_like(params)
    launch(
        *(kernel, (plan.groups, plan.kept_blocks + plan.moved_blocks)),
        *(*inputs, grad_in, grad_params, partials, out.shape[0], plan.iterations),
        **constants,
        ROWS=plan.rows,
        KEPT_BLOCKS=plan.kept_blocks,
    )
    grads = torch.empty_like(log_scale), torch.empty_like(bias), torch.empty_like(gain)
    _finish(partials, grad_log_det, grads, plan, constants, sign)
    return grad_in, grad_params, *grads


def _partials(x: Tensor, plan: _Plan) -> Tensor:
    """Per group of samples and column: sums for log_scale, for bias and (transformed) for gain."""
    columns = x.shape[1:].numel()
    return x.new_empty(plan.groups, 3, columns, dtype=accumulate_dtype(x))


def _finish(
    partials: Tensor,
    grad_log_det: Tensor | None,
    grads: tuple[Tensor | None, ...],
    plan: _Plan,
    constants: dict[str, Any],
    sign: int,
) -> None:
    channels, positions = constants["CHANNELS"], constants["POSITIONS"]
    block = min(triton.next_power_of_2(positions), 256)
    samples = 0 if grad_log_det is None else grad_log_det.shape[0]
    launch(
        *(_finish_kernel, (channels,), partials, grad_log_det, *grads, plan.groups, samples),
        **(constants | {"BLOCK": block}),
        SIGN=sign,
        GROUPS=max(1, 1024 // block),
    )
