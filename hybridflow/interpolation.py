"""Paths in latent space from one class to another, and what both heads say along them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.errors import InputError
from hybridflow.run import TrainedRun

__all__ = ["Paths", "find_class", "paths_between"]


@dataclass(frozen=True)
class Paths:
    """n paths of S points each, from class a to class b; on the CPU."""

    x: Tensor
    """(n, S, …)."""
    beta: Tensor
    """From 1 at class a to 0 at class b: (S,)."""
    flow: Tensor
    """p(a | x) and p(b | x) of the flow: (n, S, 2)."""
    discriminator: Tensor
    """p_φ(a | x), p_φ(b | x) and p_φ(generated | x), of K+1 outputs: (n, S, 3)."""


@torch.no_grad()
def paths_between(
    run: TrainedRun,
    a: int,
    b: int,
    count: int,
    *,
    steps: int = 11,
    temperature: float = 1.0,
    seed: int = 0,
) -> Paths:
    """`count` paths of `steps` points across the boundary between two classes.

        z_a ~ N(μ_a, T²I),  z_b ~ N(μ_b, T²I),  z_N ~ N(0, T²I), drawn once a path
        z_K(β) = β z_a + (1 - β) z_b,    x(β) = G(z_K(β), z_N)

    The training's samples near the boundary lie on such paths (Eq. 4.6). The flow's p(k | x) is taken
    at z_K itself. The random state is left as it was; the same seed gives the same paths on the same
    device.
    """
    model, means = run.model, run.model.prior.means
    device = means.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ends = means[[a, b], None] + temperature * torch.randn(
            2, count, means.shape[1], device=device
        )
        z_n = temperature * torch.randn(count, model.flow.latent_sizes[1], device=device)
    beta = torch.linspace(1, 0, steps, device=device)
    z_k = torch.lerp(ends[1][:, None], ends[0][:, None], beta[:, None]).flatten(0, 1)
    x = model.inverse(z_k, z_n.repeat_interleave(steps, dim=0))
    flow = model.prior.joint_log_prob(z_k).softmax(1)
    discriminator = F.pad(run.discriminator(x), (0, 1)).softmax(1)
    return Paths(
        x=x.unflatten(0, (count, steps)).cpu(),
        beta=beta.cpu(),
        flow=flow[:, [a, b]].unflatten(0, (count, steps)).cpu(),
        discriminator=discriminator[:, [a, b, -1]].unflatten(0, (count, steps)).cpu(),
    )


def find_class(text: str, class_names: Sequence[str]) -> int:
    """The number of a class that is given by its name or its number.

    Raises:
        InputError: there is no such class.
    """
    if text in class_names:
        return class_names.index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    raise InputError(
        f"--interpolate: got {text!r}, want a class: {', '.join(class_names)}, "
        f"or a number from 0 to {len(class_names) - 1}"
    )
