"""Fused kernels for flow layers: CUDA through Triton, CPU through a native library.

The functions work on plain tensors and know nothing of the trainer. `fuse` swaps them into a model.
"""

from .actnorm import actnorm, actnorm_inverse, actnorm_statistics
from .actnorm_coupling import (
    ChainStep,
    CouplingForm,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
    coupling_chain,
)
from .swap import FuseReport, fuse, unfuse

__all__ = [
    "ChainStep",
    "CouplingForm",
    "FuseReport",
    "actnorm",
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_identity",
    "actnorm_inverse",
    "actnorm_statistics",
    "coupling_chain",
    "fuse",
    "unfuse",
]
