"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

A program of the forward owns ROWS samples and their log-dets; a sample is a row. Random numbers come
four at a time, one for each quarter of a row, so that all four are used and each goes to contiguous
memory. The other kernels work element by element on tiles of ROWS by BLOCK.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype

__all__ = ["dequantize", "inverse", "inverse_backward", "logit", "logit_backward"]


@triton.jit
def _logit(v, c, mask):
    """ln(v/c), and -ln v - ln c; both 0 outside the mask."""
    y = tl.log(tl.where(mask, v / c, 1.0))
    return y, tl.abs(y) - 2.0 * tl.log(tl.where(mask, tl.maximum(v, c), 1.0))


@triton.jit
def _finish(log_det, total, sums, row, samples, OWN: tl.constexpr):
    """A row's log-det: what was given, the sums over the row and a constant."""
    value = tl.sum(sums, axis=1) + OWN
    if log_det is not None:
        value += tl.load(log_det + row, mask=row < samples, other=0)
    tl.store(total + row, value, mask=row < samples)


@triton.jit
def _quarter(
    x, noise, y, word, row, samples, m,
    QUARTER: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr, ALPHA: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The elements PART·QUARTER + m of each row; returns their part of the log-det."""
    column = PART * QUARTER + m[None, :]
    mask = (row[:, None] < samples) & (m[None, :] < QUARTER) & (column < COLUMNS)
    at = row[:, None] * COLUMNS + column
    grey = tl.load(x + at, mask=mask, other=0).to(ACC)
    if noise is None:
        # Signed before it is a float: the top 24 bits fit, and signed conversions are cheaper.
        u = (word >> 8).to(tl.int32).to(ACC) * 5.9604644775390625e-8
    else:
        u = tl.load(noise + at, mask=mask, other=0).to(ACC)
    SLOPE: tl.constexpr = (1 - 2 * ALPHA) / LEVELS
    v = ALPHA + SLOPE * (grey + u)
    c = ALPHA + SLOPE * ((LEVELS - 1.0 - grey) + (1.0 - u))
    value, term = _logit(v, c, mask)
    tl.store(y + at, value, mask=mask)
    return term


@triton.jit
def _dequantize_kernel(
    x, seed, noise, log_det, y, total, samples,
    COLUMNS: tl.constexpr, LEVELS: tl.constexpr, ALPHA: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = (COLUMNS + 3) // 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, QUARTER, BLOCK):
        m = start + tl.arange(0, BLOCK)
        block = row[:, None] * QUARTER + m[None, :]
        if noise is None:
            a, b, c, d = tl.randint4x(tl.load(seed), block)
        else:
            a, b, c, d = None, None, None, None
        sums += _quarter(x, noise, y, a, row, samples, m, QUARTER, 0, COLUMNS, LEVELS, ALPHA, ACC)
        sums += _quarter(x, noise, y, b, row, samples, m, QUARTER, 1, COLUMNS, LEVELS, ALPHA, ACC)
        sums += _quarter(x, noise, y, c, row, samples, m, QUARTER, 2, COLUMNS, LEVELS, ALPHA, ACC)
        sums += _quarter(x, noise, y, d, row, samples, m, QUARTER, 3, COLUMNS, LEVELS, ALPHA, ACC)
    _finish(log_det, total, sums, row, samples, OWN)


@triton.jit
def _logit_kernel(
    x, log_det, y, total, samples,
    COLUMNS: tl.constexpr, ALPHA: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BLOCK), ACC)
    SLOPE: tl.constexpr = 1 - 2 * ALPHA
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (row[:, None] < samples) & (column[None, :] < COLUMNS)
        at = row[:, None] * COLUMNS + column[None, :]
        value = tl.load(x + at, mask=mask, other=0).to(ACC)
        value, term = _logit(ALPHA + SLOPE * value, ALPHA + SLOPE * (1.0 - value), mask)
        tl.store(y + at, value, mask=mask)
        sums += term
    _finish(log_det, total, sums, row, samples, OWN)


@triton.jit
def _logit_backward_kernel(
    grad, grad_log_det, y, grad_x, samples,
    COLUMNS: tl.constexpr, ALPHA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row[:, None] < samples) & (column[None, :] < COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    g_log_det = tl.load(grad_log_det + row, mask=row < samples, other=0).to(ACC)[:, None]
    out = tl.load(y + at, mask=mask, other=0).to(ACC)
    g = tl.load(grad + at, mask=mask, other=0).to(ACC)
    grown = tl.exp(tl.abs(out))
    e = 1.0 / grown
    half = (1.0 - e) / (1.0 + e)  # tanh(|y|/2)
    g_out = g + g_log_det * tl.where(out < 0, -half, half)
    SLOPE: tl.constexpr = 1 - 2 * ALPHA
    tl.store(grad_x + at, g_out * SLOPE * (2.0 + (grown + e)), mask=mask)


@triton.jit
def _inverse_kernel(
    y, x, elements, ALPHA: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    value = tl.load(y + at, mask=mask, other=0).to(ACC)
    SCALE: tl.constexpr = 1 / (1 - 2 * ALPHA)
    tl.store(x + at, (1.0 / (1.0 + tl.exp(-value)) - ALPHA) * SCALE, mask=mask)


@triton.jit
def _inverse_backward_kernel(
    grad, y, grad_y, elements, ALPHA: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    e = tl.exp(-tl.abs(tl.load(y + at, mask=mask, other=0).to(ACC)))
    g = tl.load(grad + at, mask=mask, other=0).to(ACC)
    r = 1.0 / (1.0 + e)
    SCALE: tl.constexpr = 1 / (1 - 2 * ALPHA)
    tl.store(grad_y + at, g * (e * r * r * SCALE), mask=mask)


_TILE = 1024  # elements of a tile: eight for each thread of four warps


def _tile(columns: int, elements: int) -> tuple[int, int]:
    """ROWS and BLOCK, for rows of so many columns and tiles of so many elements."""
    block = min(triton.next_power_of_2(max(columns, 1)), elements)
    return elements // block, block


def _acc(x: Tensor | None) -> tl.dtype:
    return tl.float64 if accumulate_dtype(x) == torch.float64 else tl.float32


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1:].numel()


def dequantize(
    x: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    log_det: Tensor | None,
    levels: int,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    samples, columns = _sizes(x)
    dtype = accumulate_dtype(noise)
    y, total = torch.empty_like(x, dtype=dtype), x.new_empty(samples, dtype=dtype)
    rows, block = _tile((columns + 3) // 4, _TILE // 2)  # of each quarter
    launch(
        _dequantize_kernel, (triton.cdiv(samples, rows),),
        x, seed, noise, log_det, y, total, samples,
        COLUMNS=columns, LEVELS=levels, ALPHA=alpha, OWN=columns * math.log1p(-2 * alpha),
        ROWS=rows, BLOCK=block, ACC=_acc(noise), num_warps=4,
    )  # fmt: skip
    return y, total


def logit(x: Tensor, log_det: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    samples, columns = _sizes(x)
    y, total = torch.empty_like(x), x.new_empty(samples, dtype=accumulate_dtype(x))
    rows, block = _tile(columns, _TILE)
    launch(
        _logit_kernel, (triton.cdiv(samples, rows),),
        x, log_det, y, total, samples,
        COLUMNS=columns, ALPHA=alpha, OWN=columns * math.log1p(-2 * alpha),
        ROWS=rows, BLOCK=block, ACC=_acc(x), num_warps=4,
    )  # fmt: skip
    return y, total


def logit_backward(grad: Tensor, grad_log_det: Tensor, y: Tensor, alpha: float) -> Tensor:
    samples, columns = _sizes(y)
    grad_x = torch.empty_like(y)
    rows, block = _tile(columns, _TILE)
    launch(
        _logit_backward_kernel, (triton.cdiv(samples, rows), triton.cdiv(columns, block)),
        grad, grad_log_det, y, grad_x, samples,
        COLUMNS=columns, ALPHA=alpha, ROWS=rows, BLOCK=block, ACC=_acc(y), num_warps=4,
    )  # fmt: skip
    return grad_x


def inverse(y: Tensor, alpha: float) -> Tensor:
    x = torch.empty_like(y)
    launch(
        _inverse_kernel, (triton.cdiv(y.numel(), _TILE),), y, x, y.numel(),
        ALPHA=alpha, BLOCK=_TILE, ACC=_acc(y), num_warps=4,
    )  # fmt: skip
    return x


def inverse_backward(grad: Tensor, y: Tensor, alpha: float) -> Tensor:
    grad_y = torch.empty_like(y)
    launch(
        _inverse_backward_kernel, (triton.cdiv(y.numel(), _TILE),), grad, y, grad_y, y.numel(),
        ALPHA=alpha, BLOCK=_TILE, ACC=_acc(y), num_warps=4,
    )  # fmt: skip
    return grad_y
