"""Fused kernels for flow layers: CUDA through Triton, CPU through a native library.

The functions work on plain tensors and know nothing of the trainer. `fuse` swaps them into a model.
"""

from .actnorm_coupling import (
    CouplingForm,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
)
from .swap import FuseReport, fuse, unfuse

__all__ = [
    "CouplingForm",
    "FuseReport",
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_identity",
    "fuse",
    "unfuse",
]
