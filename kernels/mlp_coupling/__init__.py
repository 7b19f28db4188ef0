"""Actnorm, dense conditioner and affine coupling as one op; derivation and costs in README.md."""

from .op import mlp_coupling, mlp_coupling_inverse

__all__ = ["mlp_coupling", "mlp_coupling_inverse"]
