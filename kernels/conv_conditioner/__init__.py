"""Two convolutions with a ReLU between them, fused; derivation and costs in README.md."""

from .op import conv_conditioner

__all__ = ["conv_conditioner"]
