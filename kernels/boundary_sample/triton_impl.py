"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

A program of the forward owns ROWS samples: it draws them a quarter of a block at a time, so that the
four words of a random block all serve, and adds up their squared distances to all classes on the way.
The backward writes sums over groups of samples, which `_finish_kernel` adds in a fixed order. WIDTH is
the number of classes, raised to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype, spread

__all__ = ["backward", "forward"]


@triton.jit
def _two_normals(first, second, ACC: tl.constexpr):
    """Box-Muller. Quadrant and rest of the angle, in 2^-24 of a turn, are exact. In float32 the sine
    and cosine are Cephes' polynomials: CUDA's own would spill, for the sake of angles beyond a turn."""
    # Signed before it is a float: the top 24 bits fit, and signed conversions are cheaper.
    u = (first >> 8).to(tl.int32).to(ACC) * 5.9604644775390625e-8
    radius = tl.sqrt(-2.0 * tl.log(1.0 - u))
    angle = (second >> 8).to(tl.int32)
    quadrant = (angle + 2097152) >> 22
    x = (angle - (quadrant << 22)).to(ACC) * 3.7450702829239286e-7  # 2 pi / 2^24
    if ACC == tl.float64:
        sine, cosine = tl.sin(x), tl.cos(x)
    else:
        z = x * x
        sine = (-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1
        sine = sine * z * x + x
        cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
        cosine = cosine * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    along = radius * tl.where(odd, sine, cosine)
    across = radius * tl.where(odd, cosine, sine)
    along = tl.where(((quadrant + 1) & 2) != 0, -along, along)
    return along, tl.where((quadrant & 2) != 0, -across, across)


@triton.jit
def _below(word, N: tl.constexpr):
    return ((word.to(tl.uint64) * N) >> 32).to(tl.int64)


@triton.jit
def _quarter(
    means, z, noise, a, b, row, count, m,
    PART: tl.constexpr, CLASSES: tl.constexpr, SIZE: tl.constexpr, QUARTER: tl.constexpr,
    SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, SPREAD: tl.constexpr,
    WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns PART·QUARTER + m of the samples; returns their part of the squared distances."""
    column = PART * QUARTER + m
    live = (m < QUARTER) & (column < SIZE)
    mask = (row < count)[:, None] & live[None, :]
    mean_a = tl.load(means + a[:, None] * SIZE + column[None, :], mask=mask, other=0).to(ACC)
    mean_b = tl.load(means + b[:, None] * SIZE + column[None, :], mask=mask, other=0).to(ACC)
    value = SHARE_A * mean_a + SHARE_B * mean_b + SPREAD * noise
    tl.store(z + row[:, None] * SIZE + column[None, :], value, mask=mask)
    k = tl.arange(0, WIDTH)
    known = (k < CLASSES)[:, None] & live[None, :]
    mu = tl.load(means + k[:, None] * SIZE + column[None, :], mask=known, other=0).to(ACC)
    difference = tl.where(live[None, None, :], value[:, None, :] - mu[None, :, :], 0.0)
    return tl.sum(difference * difference, axis=2)


@triton.jit
def _forward_kernel(
    means, seed, z, labels, pair, count,
    CLASSES: tl.constexpr, SIZE: tl.constexpr,
    SHARE_A: tl.constexpr, SHARE_B: tl.constexpr, SPREAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = (SIZE + 3) // 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    key = tl.load(seed)
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(key, low, high, low * 0 + 1, low * 0)
    a = _below(first, CLASSES)
    b = (a + 1 + _below(second, CLASSES - 1)) % CLASSES
    tl.store(pair + 2 * row, a, mask=inside)
    tl.store(pair + 2 * row + 1, b, mask=inside)
    squared = tl.zeros((ROWS, WIDTH), ACC)
    for start in range(0, QUARTER, BLOCK):
        m = start + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = tl.randint4x(key, row[:, None] * QUARTER + m[None, :])
        n0, n1 = _two_normals(w0, w1, ACC)
        n2, n3 = _two_normals(w2, w3, ACC)
        squared += _quarter(means, z, n0, a, b, row, count, m, 0, CLASSES, SIZE, QUARTER,
                            SHARE_A, SHARE_B, SPREAD, WIDTH, ACC)  # fmt: skip
        squared += _quarter(means, z, n1, a, b, row, count, m, 1, CLASSES, SIZE, QUARTER,
                            SHARE_A, SHARE_B, SPREAD, WIDTH, ACC)  # fmt: skip
        squared += _quarter(means, z, n2, a, b, row, count, m, 2, CLASSES, SIZE, QUARTER,
                            SHARE_A, SHARE_B, SPREAD, WIDTH, ACC)  # fmt: skip
        squared += _quarter(means, z, n3, a, b, row, count, m, 3, CLASSES, SIZE, QUARTER,
                            SHARE_A, SHARE_B, SPREAD, WIDTH, ACC)  # fmt: skip
    k = tl.arange(0, WIDTH)[None, :]
    logits = tl.where(k < CLASSES, -0.5 * squared, -float("inf"))
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    shares = shares / tl.sum(shares, axis=1)[:, None]
    tl.store(labels + row[:, None] * CLASSES + k, shares, mask=inside[:, None] & (k < CLASSES))


@triton.jit
def _backward_kernel(
    grad_z, grad_labels, z, labels, pair, means, partials, count, iterations,
    CLASSES: tl.constexpr, SIZE: tl.constexpr, SHARE_A: tl.constexpr, SHARE_B: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < SIZE
    k = tl.arange(0, WIDTH)
    at = k[:, None] * SIZE + column[None, :]
    known = (k < CLASSES)[:, None] & live[None, :]
    mu = tl.load(means + at, mask=known, other=0).to(ACC)
    total = tl.zeros((WIDTH, BLOCK), ACC)
    first = group * iterations
    for row in range(first, tl.minimum(first + iterations, count)):
        p = tl.load(labels + row * CLASSES + k, mask=k < CLASSES, other=0)
        g = tl.load(grad_labels + row * CLASSES + k, mask=k < CLASSES, other=0)
        out = tl.load(z + row * SIZE + column, mask=live, other=0)
        grad = tl.load(grad_z + row * SIZE + column, mask=live, other=0)
        a = tl.load(pair + 2 * row)
        b = tl.load(pair + 2 * row + 1)
        pull = (p * (g - tl.sum(p * g, axis=0)))[:, None] * (mu - out[None, :])
        grad += tl.sum(pull, axis=0)
        share = tl.where(k == a, SHARE_A, 0.0).to(ACC) + tl.where(k == b, SHARE_B, 0.0).to(ACC)
        total += share[:, None] * grad[None, :] - pull
    tl.store(partials + group * CLASSES * SIZE + at, total, mask=known)


@triton.jit
def _finish_kernel(
    partials, grad_means, groups,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((GROUPS, BLOCK), ACC)
    for start in range(0, groups, GROUPS):
        group = (start + tl.arange(0, GROUPS)).to(tl.int64)[:, None]
        mask = (group < groups) & (column < N)[None, :]
        total += tl.load(partials + group * N + column[None, :], mask=mask, other=0)
    tl.store(grad_means + column, tl.sum(total, axis=0), mask=column < N)


_TILE = 2048  # elements of classes x columns x samples: sixteen for each thread of four warps


def _sizes(means: Tensor, beta: float) -> dict[str, Any]:
    """The constants that both kernels share."""
    classes, size = means.shape
    double = accumulate_dtype(means) == torch.float64
    return {
        "CLASSES": classes, "SIZE": size, "SHARE_A": beta, "SHARE_B": 1 - beta,
        "WIDTH": triton.next_power_of_2(classes), "ACC": tl.float64 if double else tl.float32,
    }  # fmt: skip


def _block(columns: int, width: int) -> int:
    return min(triton.next_power_of_2(columns), max(16, _TILE // width))


def forward(means: Tensor, seed: Tensor, count: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(means, beta)
    z = means.new_empty(count, means.shape[1], dtype=accumulate_dtype(means))
    labels, pair = z.new_empty(count, means.shape[0]), seed.new_empty(count, 2)
    block = _block((means.shape[1] + 3) // 4, sizes["WIDTH"])
    means_tile = sizes["WIDTH"] * block
    warps = max(1, min(4, means_tile // 128))  # such that a thread reads four means at once
    rows = max(1, _TILE * warps // 4 // means_tile)
    launch(
        _forward_kernel, (triton.cdiv(count, rows),), means, seed, z, labels, pair, count,
        **sizes, SPREAD=spread(beta), ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return z, labels, pair


def backward(
    grad_z: Tensor,
    grad_labels: Tensor,
    z: Tensor,
    labels: Tensor,
    pair: Tensor,
    means: Tensor,
    beta: float,
) -> Tensor:
    sizes = _sizes(means, beta)
    count, n = z.shape[0], means.numel()
    iterations = max(8, triton.cdiv(count, 64))
    groups = triton.cdiv(count, iterations)
    partials, grad_means = z.new_empty(groups, n), torch.empty_like(means)
    block = _block(means.shape[1], sizes["WIDTH"])
    launch(
        _backward_kernel, (groups, triton.cdiv(means.shape[1], block)),
        grad_z, grad_labels, z, labels, pair, means, partials, count, iterations,
        **sizes, BLOCK=block, num_warps=4,
    )  # fmt: skip
    launch(
        _finish_kernel, (triton.cdiv(n, 128),), partials, grad_means, groups,
        N=n, GROUPS=8, BLOCK=128, ACC=sizes["ACC"], num_warps=4,
    )  # fmt: skip
    return grad_means
