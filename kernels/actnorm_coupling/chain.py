"""A chain of couplings that keeps the activations of one: the backward walks it in reverse."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._operator import first_order
from . import op, reference
from .form import PLAIN, CouplingForm

__all__ = ["ChainStep", "coupling_chain"]


@dataclass(frozen=True)
class ChainStep:
    """One step of a chain: the operands of `actnorm_coupling`, with the conditioner for `params`.

    Args:
        conditioner: from the identity part, after actnorm, (B, C - T, *spatial), to params
            (B, 2T, *spatial). It runs twice for each training step, and must give the same both
            times: no dropout, no batch statistics.
        transformed: T.
        log_scale, bias, gain, form, flip, index: as in `actnorm_coupling`.
    """

    conditioner: nn.Module
    transformed: int
    log_scale: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None
    form: CouplingForm = PLAIN
    flip: bool = False
    index: Tensor | None = None

    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.log_scale, self.bias, self.gain

    def choices(self) -> tuple[str, bool]:
        return self.form.key, self.flip

    def identity(self, x: Tensor, normed: bool) -> Tensor:
        """The identity part of x, after actnorm or of an x that has passed it."""
        if normed or self.log_scale is None or self.bias is None:
            return reference.split(x, self.transformed, self.index, self.flip)[0]
        vectors = self.log_scale, self.bias, self.index
        return op.identity_operator(x, *vectors, self.transformed, *self.choices())

    def map(self, x: Tensor, params: Tensor, log_det: Tensor | None, inverse: bool) -> Any:
        """The step in one direction, without autograd."""
        operands = (x, params, *self.vectors(), log_det, self.index)
        return op.map_operator(*operands, *self.choices(), inverse)


def coupling_chain(
    x: Tensor,
    steps: Sequence[ChainStep],
    log_det: Tensor | None = None,
    *,
    inverse: bool = False,
    keep_every: int | None = 12,
) -> tuple[Tensor, Tensor]:
    """Steps one after the other, with the activations of a single step kept.

        forward: y = f_n(… f_1(x));    inverse: y = f_1⁻¹(… f_n⁻¹(x))

    Values and gradients are those of `actnorm_coupling` applied step by step, up to rounding. The
    backward goes from the output to the input: it inverts each step, runs its conditioner again, and
    forgets both; so the conditioners' activations do not add up with the number of steps, and each
    conditioner runs once more than it otherwise would. What inverting one step rounds, the steps
    before it amplify; so the output of every so many steps is kept, which ends that.

    Args:
        x: (B, C, *spatial).
        steps: the steps, in the order of the forward direction.
        log_det: (B,) in nats, float32 (float64 for float64 x); None counts as zero.
        inverse: the direction.
        keep_every: the output of one in so many steps is kept besides the last; None keeps the last
            alone.

    Returns:
        y, in the shape and type of x, and log_det plus that of the chain in this direction: (B,).

    Raises:
        ValueError: there is no step, or keep_every is below 1.

    Source: Gomez, Ren, Urtasun and Grosse, *The reversible residual network*, NeurIPS 2017.
    """
    if not steps:
        raise ValueError("steps: got none, want at least one")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every: got {keep_every}, want at least 1, or None")
    weights = [list(step.conditioner.parameters()) for step in steps]
    flat = [v for step, own in zip(steps, weights, strict=True) for v in (*step.vectors(), *own)]
    if log_det is None:
        log_det = x.new_zeros(x.shape[0], dtype=reference.accumulate_dtype(x))
    order = tuple(reversed(steps)) if inverse else tuple(steps)
    choices = (inverse, keep_every or len(order), _autocast(x.device.type))
    return _Chain.apply(x, log_det, order, *choices, *flat)


def _autocast(device: str) -> Callable[[], Any]:
    """Reproduces, inside the backward, the autocast that is in force now."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cache = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype, enabled=enabled, cache_enabled=cache)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_det: Tensor,
        steps: tuple[ChainStep, ...],  # in the order they run
        inverse: bool,
        keep_every: int,
        autocast: Callable[[], Any],
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kept = []
        for i, step in enumerate(steps):
            if i and i % keep_every == 0:
                kept.append(x)
            params = step.conditioner(step.identity(x, normed=inverse))
            x, log_det = step.map(x, params, log_det, inverse)
        ctx.save_for_backward(x, *kept, *flat)  # flat: autograd checks that none was changed since
        ctx.steps, ctx.inverse, ctx.keep_every = steps, inverse, keep_every
        ctx.autocast = autocast
        return x, log_det

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        out, *kept = ctx.saved_tensors
        last = len(ctx.steps) - 1
        gradients: list[list[Tensor | None]] = []
        for i in range(last, -1, -1):
            if i != last and (i + 1) % ctx.keep_every == 0:
                out = kept[i // ctx.keep_every]
            step = ctx.steps[i]
            out, grad, own = _undo(step, out, grad, grad_log_det, ctx.inverse, ctx.autocast)
            gradients.append(own)
        if not ctx.inverse:  # in the order of the forward direction
            gradients.reverse()
        in_order = itertools.chain.from_iterable(gradients)
        return grad, grad_log_det, None, None, None, None, *in_order


def _undo(
    step: ChainStep,
    out: Tensor,
    grad: Tensor,
    grad_log_det: Tensor,
    inverse: bool,
    autocast: Callable[[], Any],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From a step's output and its gradient: its input, that gradient, and those of its parameters
    (log_scale, bias, gain, then the conditioner's)."""
    weights = list(step.conditioner.parameters())
    trained = [w for w in weights if w.requires_grad]
    a = step.identity(out, normed=not inverse).detach().requires_grad_()
    with torch.enable_grad(), autocast():
        params = step.conditioner(a)
    fixed = params.detach()
    operands = (grad, grad_log_det, out, fixed, *step.vectors(), step.index)
    grad_x, grad_params, *grad_vectors = op.gradients_operator(*operands, *step.choices(), inverse)
    x, _ = step.map(out, fixed, None, not inverse)
    grad_a, *grad_weights = torch.autograd.grad(params, (a, *trained), grad_params)

    own = [g if v is not None else None for g, v in zip(grad_vectors, step.vectors(), strict=True)]
    if not inverse and step.log_scale is not None and step.bias is not None:
        # The conditioner read what actnorm made of the input.
        vectors = (step.log_scale, step.bias, step.index, step.transformed)
        grad_a, *through = op.identity_backward_operator(
            grad_a, a.detach(), *vectors, *step.choices()
        )
        own[:2] = (grad_vectors[0] + through[0], grad_vectors[1] + through[1])
    kept, moved = reference.split(grad_x, step.transformed, step.index, step.flip)
    grad_x = reference.merge(kept + grad_a, moved, step.index, step.flip)
    found = iter(grad_weights)
    own += [next(found) if w.requires_grad else None for w in weights]
    return x, grad_x, own
