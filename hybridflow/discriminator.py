"""The (K+1)-class discriminator: K logits, the logit of the class "generated" fixed at 0."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["ConvDiscriminator", "DenseDiscriminator", "Discriminator"]


_GAIN = "parametrizations.weight.original0"  # g of the weight norm


class _Noise(nn.Module):
    """Adds Gaussian noise while training."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training and self.std else x


class Discriminator(nn.Module):
    """A network from images to K logits.

    With LSE the logsumexp of the K logits and the (K+1)-th fixed at 0,
    p(real | x) = exp(LSE) / (1 + exp(LSE)), and p(k | x, real) is the softmax over the K.

    Weight-normed throughout: W = g · v/‖v‖ (Salimans and Kingma, NeurIPS 2016).

    Shapes: x (B, C, H, W) with values in [0, 1], or (B, D); logits (B, K).
    Source: Salimans et al., *Improved techniques for training GANs*, NeurIPS 2016.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.scale_input(x)).float()

    def features(self, x: Tensor) -> Tensor:
        """What the last layer is given: (B, d)."""
        return self.layers[:-1](self.scale_input(x)).float()

    def scale_input(self, x: Tensor) -> Tensor:
        """From values in [0, 1] to what the first layer expects."""
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Data-dependent start: every weight-normed layer has outputs of mean 0 and variance 1 on x."""
        h = self.scale_input(x)
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                axes = [d for d in range(h.dim()) if d != 1]
                variance, mean = torch.var_mean(h, dim=axes, correction=0)
                scale = (variance + 1e-10).rsqrt()
                gain, bias = layer.get_parameter(_GAIN), layer.get_parameter("bias")
                gain.mul_(scale.view(gain.shape))
                bias.copy_((bias - mean) * scale)
                shape = (1, -1, *(1,) * (h.dim() - 2))
                h = (h - mean.view(shape)) * scale.view(shape)


class DenseDiscriminator(Discriminator):
    """Dense layers with ReLU and Gaussian noise before each, as the Improved GAN's for MNIST.

    Args:
        inputs: size of the flattened input.
        classes: K.
        widths: hidden layers.
        input_noise, hidden_noise: standard deviations of the noise while training.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        widths: tuple[int, ...] = (1000, 500, 250, 250, 250),
        input_noise: float = 0.3,
        hidden_noise: float = 0.5,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten(), _Noise(input_noise)]
        for width in widths:
            layers += [weight_norm(nn.Linear(inputs, width)), nn.ReLU(), _Noise(hidden_noise)]
            inputs = width
        super().__init__(nn.Sequential(*layers, weight_norm(nn.Linear(inputs, classes))))


class ConvDiscriminator(Discriminator):
    """Nine weight-normed convolutions, as in the Improved-GAN and Bad-GAN recipes for SVHN and CIFAR-10.

    Blocks of three 3x3 convolutions, the third with stride 2; a 3x3 convolution without padding, two
    1x1 convolutions, global average pooling, a dense layer. Leaky ReLU of slope 0.2. The weight norm's
    gain is frozen but for the last layer.

    Args:
        channels: C of the input, with sides of at least 2·2ⁿ + 1 pixels, of n blocks.
        classes: K.
        widths: channels of each block, two blocks in the recipes.
        input_noise: standard deviation of the noise while training.
        input_dropout, block_dropout: dropout of the input and after each block.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = (64, 128),
        input_noise: float = 0.05,
        input_dropout: float = 0.2,
        block_dropout: float = 0.5,
    ) -> None:
        if not widths:
            raise ValueError("widths: got none, want the channels of each block")
        layers: list[nn.Module] = [_Noise(input_noise), nn.Dropout(input_dropout)]
        for width in widths:
            layers += _conv(channels, width) + _conv(width, width) + _conv(width, width, stride=2)
            layers.append(nn.Dropout(block_dropout))
            channels = width
        layers += _conv(channels, channels, padding=0)
        layers += _conv(channels, channels, kernel=1, padding=0) + _conv(
            channels, channels, kernel=1, padding=0
        )
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), weight_norm(nn.Linear(channels, classes))]
        super().__init__(nn.Sequential(*layers))

    def scale_input(self, x: Tensor) -> Tensor:
        return (2 * x - 1).contiguous(memory_format=torch.channels_last)


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> list[nn.Module]:
    conv = weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    conv.get_parameter(_GAIN).requires_grad_(False)
    return [conv, nn.LeakyReLU(0.2)]
