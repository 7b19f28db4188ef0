"""Actnorm followed by affine coupling, fused; derivation and costs in README.md."""

from .chain import ChainStep, coupling_chain
from .form import CouplingForm
from .op import actnorm_coupling, actnorm_coupling_inverse, actnorm_identity

__all__ = [
    "ChainStep",
    "CouplingForm",
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_identity",
    "coupling_chain",
]
