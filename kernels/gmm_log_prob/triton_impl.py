"""Triton kernels and their launchers: contiguous tensors in, tensors out, as in reference.py.

Tiles are ROWS samples by CLASSES classes by BLOCK columns, and ‖z - μ‖² is summed directly. Up to 16
classes fit one tile: then a program knows a sample's whole joint, and the forward is one kernel and
the backward two. With more, tiles of classes are programs of their own and what needs a whole row of
the joint is a kernel over rows. Nothing is accumulated atomically: the backward writes partial sums
per group of samples, which `_finish_kernel` adds in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import accumulate_dtype

__all__ = ["backward", "forward"]

_LOG_TWO_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _finish_rows(
    value, labels, log_prob, posterior, row, klass, mask, samples,
    K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log_prob and posterior from whole rows of the joint, (ROWS, CLASSES), -inf where masked."""
    largest = tl.max(value, axis=1)
    power = tl.exp(value - largest[:, None])
    total = tl.sum(power, axis=1)
    share = power / total[:, None]
    tl.store(posterior + row[:, None] * K + klass[None, :], share, mask=mask)
    result = largest + tl.log(total)
    if labels is not None:
        label = tl.load(labels + row, mask=row < samples, other=-1)
        own = tl.sum(tl.where(klass[None, :] == label[:, None], value, 0.0), axis=1)
        result = tl.where(label < 0, result, own)
    tl.store(log_prob + row, result, mask=row < samples)


@triton.jit
def _joint_kernel(
    z, means, log_prior, labels, joint, log_prob, posterior, samples,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    klass = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    sums = tl.zeros((ROWS, CLASSES, BLOCK), ACC)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        value = tl.load(z + at, mask=(row < samples)[:, None] & live, other=0).to(ACC)
        at = klass[:, None].to(tl.int64) * D + column[None, :]
        mean = tl.load(means + at, mask=(klass < K)[:, None] & live, other=0).to(ACC)
        difference = value[:, None, :] - mean[None, :, :]
        sums += difference * difference
    prior = tl.load(log_prior + klass, mask=klass < K, other=-float("inf")).to(ACC)
    value = prior[None, :] - 0.5 * (tl.sum(sums, axis=2) + D * _LOG_TWO_PI)
    mask = (row < samples)[:, None] & (klass < K)[None, :]
    tl.store(joint + row[:, None] * K + klass[None, :], value, mask=mask)
    if WHOLE:
        _finish_rows(value, labels, log_prob, posterior, row, klass, mask, samples, K, ACC)


@triton.jit
def _rows_kernel(
    joint, labels, log_prob, posterior, samples,
    K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    klass = tl.arange(0, CLASSES)
    mask = (row < samples)[:, None] & (klass < K)[None, :]
    at = row[:, None] * K + klass[None, :]
    value = tl.load(joint + at, mask=mask, other=-float("inf"))
    value = tl.where((row < samples)[:, None], value, 0.0)
    _finish_rows(value, labels, log_prob, posterior, row, klass, mask, samples, K, ACC)


@triton.jit
def _joint_gradient(
    grad_joint, grad_log_prob, grad_posterior, posterior, labels, row, klass, samples,
    K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G, (ROWS, CLASSES): what reaches whole rows of the joint from all three outputs."""
    mask = (row < samples)[:, None] & (klass < K)[None, :]
    at = row[:, None] * K + klass[None, :]
    total = tl.zeros(at.shape, ACC)
    if grad_joint is not None:
        total += tl.load(grad_joint + at, mask=mask, other=0)
    if posterior is not None:
        share = tl.load(posterior + at, mask=mask, other=0)
        if grad_log_prob is not None:
            down = tl.load(grad_log_prob + row, mask=row < samples, other=0)[:, None]
            if labels is not None:
                label = tl.load(labels + row, mask=row < samples, other=-1)[:, None]
                own = tl.where(klass[None, :] == label, 1.0, 0.0).to(ACC)
                total += down * tl.where(label < 0, share, own)
            else:
                total += down * share
        if grad_posterior is not None:
            grad = tl.load(grad_posterior + at, mask=mask, other=0)
            total += share * (grad - tl.sum(share * grad, axis=1)[:, None])
    return total


@triton.jit
def _joint_gradient_kernel(
    posterior, grad_joint, grad_log_prob, grad_posterior, labels, out, samples,
    K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    klass = tl.arange(0, CLASSES)
    total = _joint_gradient(
        grad_joint, grad_log_prob, grad_posterior, posterior, labels, row, klass, samples, K, ACC
    )
    mask = (row < samples)[:, None] & (klass < K)[None, :]
    tl.store(out + row[:, None] * K + klass[None, :], total, mask=mask)


@triton.jit
def _means_kernel(
    z, means, grad_joint, grad_log_prob, grad_posterior, posterior, labels,
    grad_z, partials, prior_partials, samples, iterations,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over a group of samples for the gradients of means and log_prior, and, where the whole
    joint fits the tile, grad_z. Without posterior, grad_joint is G itself."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    klass = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    live = (column < D)[None, :]
    at_means = klass[:, None].to(tl.int64) * D + column[None, :]
    live_means = (klass < K)[:, None] & live
    mean = tl.load(means + at_means, mask=live_means, other=0).to(ACC)
    sums = tl.zeros((CLASSES, BLOCK), ACC)
    prior_sums = tl.zeros((CLASSES,), ACC)
    for i in range(iterations):
        row = (group * iterations + i) * ROWS + tl.arange(0, ROWS)
        total = _joint_gradient(
            grad_joint,
            grad_log_prob,
            grad_posterior,
            posterior,
            labels,
            row,
            klass,
            samples,
            K,
            ACC,
        )
        at = row[:, None] * D + column[None, :]
        mask = (row < samples)[:, None] & live
        value = tl.load(z + at, mask=mask, other=0).to(ACC)
        weighted = total[:, :, None] * (value[:, None, :] - mean[None, :, :])
        sums += tl.sum(weighted, axis=0)
        prior_sums += tl.sum(total, axis=0)
        if grad_z is not None:
            tl.store(grad_z + at, -tl.sum(weighted, axis=1), mask=mask)
    tl.store(partials + group * K * D + at_means, sums, mask=live_means)
    if tl.program_id(1) == 0:
        tl.store(prior_partials + group * K + klass, prior_sums, mask=klass < K)


@triton.jit
def _grad_z_kernel(
    z, means, grad_joint, grad_z, samples,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    mask = (row < samples)[:, None] & live
    value = tl.load(z + at, mask=mask, other=0).to(ACC)
    sums = tl.zeros((ROWS, CLASSES, BLOCK), ACC)
    for first in range(0, K, CLASSES):
        klass = first + tl.arange(0, CLASSES)
        known = (row < samples)[:, None] & (klass < K)[None, :]
        total = tl.load(grad_joint + row[:, None] * K + klass[None, :], mask=known, other=0)
        at_means = klass[:, None].to(tl.int64) * D + column[None, :]
        mean = tl.load(means + at_means, mask=(klass < K)[:, None] & live, other=0).to(ACC)
        sums += total[:, :, None] * (mean[None, :, :] - value[:, None, :])
    tl.store(grad_z + at, tl.sum(sums, axis=1), mask=mask)


@triton.jit
def _sum_groups(
    partials, out, first, groups, columns,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[n] = Σ over groups of partials[group, n] for a block of n that begins with `first`."""
    column = first + tl.arange(0, BLOCK)
    live = (column < columns)[None, :]
    total = tl.zeros((GROUPS, BLOCK), ACC)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        at = group[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.load(partials + at, mask=(group < groups)[:, None] & live, other=0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def _finish_kernel(
    partials, prior_partials, grad_means, grad_log_prior, groups,
    D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Second stage of the sums over samples."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < K * D:
        _sum_groups(partials, grad_means, first, groups, K * D, BLOCK, GROUPS, ACC)
    else:
        first -= tl.cdiv(K * D, BLOCK) * BLOCK
        _sum_groups(prior_partials, grad_log_prior, first, groups, K, BLOCK, GROUPS, ACC)


_WARPS = 8
_ROW_WARPS = 4
_LARGEST_CLASSES = 16  # classes of a tile
_TILE = 2048  # elements of a tile: eight of a thread
_SUM_TILE = 1024  # the same beside sums over samples: AMD's chips have few scalar registers
_ROW_TILE = 1024  # elements of a tile of whole rows of the joint
_FINISH_BLOCK = 128  # columns of a program of the second stage
_FINISH_TILE = 2048  # elements that it adds at once
_PROGRAMS = 512  # of the backward: a few for every multiprocessor of the largest chips


class _Plan(NamedTuple):
    """How a shape is cut into tiles: by shape alone, so that sums are the same on every machine."""

    rows: int
    classes: int
    block: int
    whole: bool  # one tile holds all classes
    iterations: int  # tiles one after another in a program that sums over samples
    groups: int  # such programs along the samples


def _plan(samples: int, size: int, classes: int, tile: int) -> _Plan:
    tile_classes = min(triton.next_power_of_2(classes), _LARGEST_CLASSES)
    block = min(triton.next_power_of_2(size), tile // tile_classes, 512)
    rows = max(1, min(tile // (tile_classes * block), 64))
    tiles = triton.cdiv(samples, rows)
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(size, block) * triton.cdiv(classes, tile_classes))
    least = triton.cdiv(classes, rows)  # so that partial sums take no more memory than z
    iterations = max(triton.cdiv(tiles, wanted), least)
    groups = triton.cdiv(tiles, iterations)
    return _Plan(rows, tile_classes, block, classes <= _LARGEST_CLASSES, iterations, groups)


def _acc(z: Tensor) -> Any:
    return tl.float64 if z.dtype == torch.float64 else tl.float32


def _tile(z: Tensor, means: Tensor, plan: _Plan) -> dict[str, Any]:
    return {
        "D": z.shape[1],
        "K": means.shape[0],
        "ROWS": plan.rows,
        "CLASSES": plan.classes,
        "BLOCK": plan.block,
        "ACC": _acc(z),
        "num_warps": _WARPS,
    }


def _row_tile(z: Tensor, means: Tensor) -> dict[str, Any]:
    """For kernels over whole rows of the joint."""
    classes = triton.next_power_of_2(means.shape[0])
    return {
        "K": means.shape[0],
        "ROWS": max(1, _ROW_TILE // classes),
        "CLASSES": classes,
        "ACC": _acc(z),
        "num_warps": _ROW_WARPS,
    }


def forward(
    z: Tensor, means: Tensor, log_prior: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    samples, classes, dtype = z.shape[0], means.shape[0], accumulate_dtype(z)
    plan = _plan(samples, z.shape[1], classes, _TILE)
    joint = z.new_empty(samples, classes, dtype=dtype)
    log_prob, posterior = z.new_empty(samples, dtype=dtype), torch.empty_like(joint)
    launch(
        *(_joint_kernel, (triton.cdiv(samples, plan.rows), triton.cdiv(classes, plan.classes))),
        *(z, means, log_prior, labels, joint, log_prob, posterior, samples),
        **_tile(z, means, plan),
        WHOLE=plan.whole,
    )
    if not plan.whole:
        constants = _row_tile(z, means)
        grid = (triton.cdiv(samples, constants["ROWS"]),)
        launch(_rows_kernel, grid, joint, labels, log_prob, posterior, samples, **constants)
    return joint, log_prob, posterior


def backward(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    z: Tensor,
    means: Tensor,
    log_prior: Tensor,
    posterior: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, size, classes = *z.shape, means.shape[0]
    plan = _plan(samples, size, classes, _SUM_TILE)
    tile = _tile(z, means, plan)
    grad_z = torch.empty_like(z)
    given: tuple[Tensor | None, ...]
    if plan.whole:
        given = (grad_joint, grad_log_prob, grad_posterior, posterior, labels, grad_z)
    else:
        total = _total(grad_joint, grad_log_prob, grad_posterior, z, means, posterior, labels)
        wide = _plan(samples, size, classes, _TILE)
        grid = (triton.cdiv(samples, wide.rows), triton.cdiv(size, wide.block))
        constants = _tile(z, means, wide)
        launch(_grad_z_kernel, grid, z, means, total, grad_z, samples, **constants)
        given = (total, None, None, None, None, None)
    partials = posterior.new_empty(plan.groups, classes * size)
    prior_partials = posterior.new_empty(plan.groups, classes)
    programs = plan.groups, triton.cdiv(size, plan.block), triton.cdiv(classes, plan.classes)
    launch(
        *(_means_kernel, programs, z, means, *given),
        *(partials, prior_partials, samples, plan.iterations),
        **tile,
    )
    grad_means, grad_log_prior = torch.empty_like(means), torch.empty_like(log_prior)
    block = min(triton.next_power_of_2(classes * size), _FINISH_BLOCK)
    finishing = triton.cdiv(classes * size, block) + triton.cdiv(classes, block)
    sums = (partials, prior_partials, grad_means, grad_log_prior, plan.groups)
    launch(
        *(_finish_kernel, (finishing,), *sums),
        **{k: tile[k] for k in ("D", "K", "ACC", "num_warps")},
        BLOCK=block,
        GROUPS=_FINISH_TILE // block,
    )
    return grad_z, grad_means, grad_log_prior


def _total(
    grad_joint: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_posterior: Tensor | None,
    z: Tensor,
    means: Tensor,
    posterior: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """G, (B, K)."""
    total, constants = torch.empty_like(posterior), _row_tile(z, means)
    launch(
        *(_joint_gradient_kernel, (triton.cdiv(z.shape[0], constants["ROWS"]),)),
        *(posterior, grad_joint, grad_log_prob, grad_posterior, labels, total, z.shape[0]),
        **constants,
    )
    return total
