"""Convolutional conditioner, actnorm and affine coupling, fused; derivation and costs in README.md."""

from .op import conv_coupling, conv_coupling_inverse

__all__ = ["conv_coupling", "conv_coupling_inverse"]
