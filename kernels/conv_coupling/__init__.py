"""Convolutional conditioner, actnorm and affine coupling, fused; derivation and costs in README.md."""

from .conditioner import conv_conditioner
from .op import conv_coupling, conv_coupling_inverse

__all__ = ["conv_conditioner", "conv_coupling", "conv_coupling_inverse"]
