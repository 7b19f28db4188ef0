"""From a configuration to the networks it describes."""

import torch

from hybridflow.config import DiscriminatorConfig, FlowConfig
from hybridflow.discriminator import ConvDiscriminator, DenseDiscriminator, Discriminator
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow, MultiScaleFlow, VectorFlow

__all__ = ["build_discriminator", "build_model"]


def build_model(config: FlowConfig, shape: torch.Size, classes: int) -> MixtureFlow:
    """The flow for data of this shape, (C, H, W) or (D,)."""
    if len(shape) == 1:
        return MixtureFlow(
            VectorFlow(shape[0], config.couplings, config.hidden), classes, logit=False
        )
    channels, height, width = shape
    try:
        flow = MultiScaleFlow(
            (channels, height, width),
            config.scales,
            config.couplings,
            config.hidden,
            config.last_hidden,
        )
    except ValueError as error:
        raise InputError(f"flow.scales: {error}") from None
    return MixtureFlow(flow, classes, logit=True)


def build_discriminator(
    config: DiscriminatorConfig, shape: torch.Size, classes: int
) -> Discriminator:
    """The discriminator for data of this shape, (C, H, W) or (D,)."""
    if config.kind == "dense":
        return DenseDiscriminator(
            shape.numel(), classes, config.widths, config.input_noise, config.hidden_noise
        )
    if not config.widths:
        raise InputError("discriminator.widths: got none, want the channels of each block")
    side = 2 * 2 ** len(config.widths) + 1
    if len(shape) != 3 or min(shape[1:]) < side:
        raise InputError(
            f"discriminator.kind: got conv with {len(config.widths)} blocks for data of shape "
            f"{tuple(shape)}, want dense, or images of at least {side}x{side} pixels"
        )
    return ConvDiscriminator(
        shape[0],
        classes,
        config.widths,
        config.input_noise,
        config.input_dropout,
        config.block_dropout,
    )
