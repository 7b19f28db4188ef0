"""Uniform dequantisation and the logit, fused; derivation and costs in README.md."""

from .op import dequantize_logit, logit_transform, logit_transform_inverse

__all__ = ["dequantize_logit", "logit_transform", "logit_transform_inverse"]
