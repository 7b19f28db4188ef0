"""Triton kernels: mean and variance of each channel in one pass over memory.

A program reduces a group of rows to a mean and a sum of squared deviations for each of its columns,
tile after tile; a second kernel merges groups and the columns of a channel. Both merge by the rule of
Chan, Golub and LeVeque (1979), which does not cancel, in an order that depends on the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype

__all__ = ["moments"]


@triton.jit
def _columns_kernel(
    x, means, deviations, rows, iterations,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < N
    first = group * iterations * ROWS
    mean = tl.zeros((BLOCK,), ACC)
    deviation = tl.zeros((BLOCK,), ACC)
    count = tl.zeros((1,), ACC)
    for i in range(iterations):
        row = first + i * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & live[None, :]
        tile = tl.load(x + row[:, None] * N + columns[None, :], mask=mask, other=0).to(ACC)
        here = tl.sum((row < rows).to(ACC), axis=0)
        tile_mean = tl.sum(tile, axis=0) / tl.maximum(here, 1.0)
        centred = tl.where(mask, tile - tile_mean[None, :], 0.0)
        total = count + here
        weight = here / tl.maximum(total, 1.0)
        delta = tile_mean - mean
        deviation += tl.sum(centred * centred, axis=0) + delta * delta * (count * weight)
        mean += delta * weight
        count = total
    tl.store(means + group * N + columns, mean, mask=live)
    tl.store(deviations + group * N + columns, deviation, mask=live)


@triton.jit
def _channels_kernel(
    means, deviations, mean, variance, rows, rows_per_group, groups,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0)
    N: tl.constexpr = CHANNELS * INNER
    values = (rows * INNER).to(ACC)
    total = tl.zeros((GROUPS, BLOCK), ACC)
    for first in range(0, groups, GROUPS):
        group = (first + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
        count = tl.minimum(rows - group * rows_per_group, rows_per_group).to(ACC)
        for start in range(0, INNER, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            mask = (group < groups) & (column < INNER)
            at = group * N + channel * INNER + column
            total += tl.where(mask, count * tl.load(means + at, mask=mask, other=0), 0.0)
    centre = tl.sum(tl.sum(total, axis=1), axis=0) / values
    spread = tl.zeros((GROUPS, BLOCK), ACC)
    for first in range(0, groups, GROUPS):
        group = (first + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
        count = tl.minimum(rows - group * rows_per_group, rows_per_group).to(ACC)
        for start in range(0, INNER, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            mask = (group < groups) & (column < INNER)
            at = group * N + channel * INNER + column
            delta = tl.load(means + at, mask=mask, other=0) - centre
            within = tl.load(deviations + at, mask=mask, other=0)
            spread += tl.where(mask, within + count * delta * delta, 0.0)
    tl.store(mean + channel, centre)
    tl.store(variance + channel, tl.sum(tl.sum(spread, axis=1), axis=0) / values)


_WARPS = 4
_TILE = 32 * _WARPS * 8  # values of a tile: 16 bytes of a 16-bit type for each thread
_PROGRAMS = 512  # a few for every multiprocessor of the largest chips


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x)
    samples, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    outer, inner = (1, positions) if x.is_contiguous() else (positions, 1)
    rows, n = samples * outer, channels * inner
    block = min(triton.next_power_of_2(n), 256)
    tile_rows = _TILE // block
    blocks = triton.cdiv(n, block)
    iterations = max(1, triton.cdiv(rows, tile_rows * triton.cdiv(_PROGRAMS, blocks)))
    groups = triton.cdiv(rows, tile_rows * iterations)
    acc = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "num_warps": _WARPS}
    means, deviations = (x.new_empty(groups, n, dtype=dtype) for _ in range(2))
    launch(
        *(_columns_kernel, (groups, blocks), x, means, deviations, rows, iterations),
        **acc, N=n, ROWS=tile_rows, BLOCK=block,
    )  # fmt: skip
    mean, variance = (x.new_empty(channels, dtype=dtype) for _ in range(2))
    block = min(triton.next_power_of_2(inner), 256)
    launch(
        *(_channels_kernel, (channels,), means, deviations, mean, variance),
        *(rows, tile_rows * iterations, groups),
        **acc, CHANNELS=channels, INNER=inner, GROUPS=max(1, 1024 // block), BLOCK=block,
    )  # fmt: skip
    return mean, variance
