"""Two-dimensional data, generated from fixed seeds."""

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor

__all__ = ["PINWHEEL_ARMS", "pinwheel", "two_moons"]

PINWHEEL_ARMS = 5


def pinwheel(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on the spiral arms of a pinwheel, `count` divided evenly among the arms.

    In the complex plane, for arm k of K: r = 1 + 0.3 ε₁ + 0.05 i ε₂, ε ~ N(0, 1), and
    x = r · exp(i (2πk/K + 0.25 · exp(Re r))).

    Args:
        count: number of points N.
        seed: seed of the generator.

    Returns:
        points, float32 (N, 2), and arms, int64 (N,).

    Source: Johnson et al., Composing graphical models with neural networks, NeurIPS 2016
    (the parameters are those of its experiments).
    """
    rng = np.random.default_rng(seed)
    arm = np.arange(count) % PINWHEEL_ARMS
    r = 1 + 0.3 * rng.standard_normal(count) + 0.05j * rng.standard_normal(count)
    x = r * np.exp(1j * (2 * np.pi * arm / PINWHEEL_ARMS + 0.25 * np.exp(r.real)))
    points = np.stack([x.real, x.imag], axis=1)
    return torch.from_numpy(points).float(), torch.from_numpy(arm)


def two_moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaving half circles with Gaussian noise of standard deviation 0.1.

    Args:
        count: number of points N, half of them in each moon.
        seed: seed of the generator.

    Returns:
        points, float32 (N, 2), and moons, int64 (N,).
    """
    points, moon = make_moons(count, noise=0.1, random_state=seed)
    return torch.from_numpy(points).float(), torch.from_numpy(moon).long()
