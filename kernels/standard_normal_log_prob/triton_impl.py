"""Triton kernels and their launchers: dense tensors in, tensors out, as in reference.py.

A sample is a row of D elements in whatever order its memory has. Tiles are ROWS samples by BLOCK
columns; a program of the forward owns its samples, so nothing is summed across programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype

__all__ = ["backward", "forward"]

_LOG_TWO_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _forward_kernel(
    z, log_det, log_prob, samples,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (row < samples)[:, None] & (column < D)[None, :]
        value = tl.load(z + row[:, None] * D + column[None, :], mask=mask, other=0).to(ACC)
        sums += value * value
    result = -0.5 * (tl.sum(sums, axis=1) + D * _LOG_TWO_PI)
    if log_det is not None:
        result += tl.load(log_det + row, mask=row < samples, other=0)
    tl.store(log_prob + row, result, mask=row < samples)


@triton.jit
def _backward_kernel(
    z, grad, grad_z, samples,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * D + column[None, :]
    mask = (row < samples)[:, None] & (column < D)[None, :]
    weight = tl.load(grad + row, mask=row < samples, other=0)
    value = tl.load(z + at, mask=mask, other=0).to(ACC)
    tl.store(grad_z + at, -value * weight[:, None], mask=mask)


_WARPS = 4
_TILE = 1024  # elements of a tile: one 16-byte vector of a 16-bit type for each thread


def _tile(z: Tensor) -> dict[str, Any]:
    size = z.shape[1:].numel()
    block = min(triton.next_power_of_2(max(size, 1)), _TILE)
    return {
        "D": size,
        "ROWS": _TILE // block,
        "BLOCK": block,
        "ACC": tl.float64 if z.dtype == torch.float64 else tl.float32,
        "num_warps": _WARPS,
    }


def forward(z: Tensor, log_det: Tensor | None) -> Tensor:
    samples, tile = z.shape[0], _tile(z)
    out = z.new_empty(samples, dtype=accumulate_dtype(z))
    grid = (triton.cdiv(samples, tile["ROWS"]),)
    launch(_forward_kernel, grid, z, log_det, out, samples, **tile)
    return out


def backward(grad: Tensor, z: Tensor) -> Tensor:
    samples, tile = z.shape[0], _tile(z)
    out = torch.empty_like(z)
    grid = (triton.cdiv(samples, tile["ROWS"]), triton.cdiv(tile["D"], tile["BLOCK"]))
    launch(_backward_kernel, grid, z, grad, out, samples, **tile)
    return out
