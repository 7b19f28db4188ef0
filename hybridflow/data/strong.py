"""Strongly augmented views of images, drawn on the device without a word from the host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.config import StrongConfig

__all__ = ["strong_view"]


def strong_view(x: Tensor, config: StrongConfig, levels: int) -> Tensor:
    """Each image moved, bent, recoloured and partly covered at random.

    In this order: one affine map (rotation, zoom, shear, shift; bilinear), contrast about the image's
    mean and brightness, a square set to the image's mean, each drawn uniformly for each image by itself.
    Outside of the image lies black for grey images, and the mirrored image for colour.

    Can be captured in a CUDA graph; random numbers come from the device's default generator.

    Args:
        x: uint8 grey levels 0 … levels - 1, (B, C, H, W).
        config: the ranges.
        levels: grey levels of the data.

    Returns:
        Grey levels like x, rounded.

    Source: after RandAugment (Cubuk et al., 2020) and Cutout (DeVries and Taylor, 2017).
    """
    top = levels - 1
    view = x.float() / top
    padding = "zeros" if x.shape[1] == 1 else "reflection"
    grid = F.affine_grid(_affine(view, config), list(view.shape), align_corners=False)
    view = F.grid_sample(view, grid, padding_mode=padding, align_corners=False)
    if config.contrast or config.brightness:
        contrast, brightness = _uniform(view, 2)[:, :, None, None, None]
        mean = view.mean((1, 2, 3), keepdim=True)
        view = (view - mean) * (1 + config.contrast * contrast) + mean
        view = view + config.brightness * brightness
    if config.cutout:
        view = torch.where(_square(view, config.cutout), view.mean((1, 2, 3), keepdim=True), view)
    return (view.clamp(0, 1) * top).round().to(x.dtype)


def _uniform(x: Tensor, count: int) -> Tensor:
    """U[-1, 1): (count, B)."""
    return 2 * torch.rand(count, len(x), device=x.device) - 1


def _affine(x: Tensor, config: StrongConfig) -> Tensor:
    """Where each pixel of a view is found in its image: (B, 2, 3), coordinates in [-1, 1]."""
    turn, zoom_x, zoom_y, shear, right, down = _uniform(x, 6)
    angle = torch.deg2rad(config.rotate * turn)
    zoom_x, zoom_y = (torch.exp(config.zoom * zoom) for zoom in (zoom_x, zoom_y))
    shear = config.shear * shear
    cos, sin = angle.cos(), angle.sin()
    rows = (
        (zoom_x * cos, zoom_x * (shear * cos - sin), 2 * config.shift * right),
        (zoom_y * sin, zoom_y * (shear * sin + cos), 2 * config.shift * down),
    )
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _square(x: Tensor, side: float) -> Tensor:
    """Which pixels lie in a square of that share of the image's side, centred anywhere: (B, 1, H, W)."""
    inside = [
        ((torch.arange(size, device=x.device) + 0.5) / size - centre[:, None]).abs() < side / 2
        for size, centre in zip(x.shape[2:], torch.rand(2, len(x), device=x.device), strict=True)
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
