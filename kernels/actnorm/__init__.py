"""Activation normalisation and its data-dependent start; derivation and costs in README.md."""

from .op import actnorm, actnorm_inverse, actnorm_statistics

__all__ = ["actnorm", "actnorm_inverse", "actnorm_statistics"]
