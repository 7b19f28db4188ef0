"""Space-to-depth, the flow's squeeze."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["depth_to_space", "space_to_depth"]


def space_to_depth(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, 4C, H/2, W/2); a permutation, so its log-det is 0."""
    return F.pixel_unshuffle(x, 2)


def depth_to_space(y: Tensor) -> Tensor:
    """(B, 4C, H, W) → (B, C, 2H, 2W), the inverse of `space_to_depth`."""
    return F.pixel_shuffle(y, 2)
