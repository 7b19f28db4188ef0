"""Actnorm followed by affine coupling, fused; derivation and costs in README.md."""

from .form import CouplingForm
from .op import actnorm_coupling, actnorm_coupling_inverse, actnorm_identity

__all__ = ["CouplingForm", "actnorm_coupling", "actnorm_coupling_inverse", "actnorm_identity"]
