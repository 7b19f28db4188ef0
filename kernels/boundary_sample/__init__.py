"""Samples between two classes, with soft labels, fused; derivation and costs in README.md."""

from .op import boundary_sample

__all__ = ["boundary_sample"]
