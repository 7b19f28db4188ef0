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
from .boundary_sample import boundary_sample
from .conv_conditioner import conv_conditioner
from .conv_coupling import conv_coupling, conv_coupling_inverse
from .dequantize_logit import dequantize_logit, logit_transform, logit_transform_inverse
from .gmm_log_prob import GmmLogProb, gmm_log_prob
from .mlp_coupling import mlp_coupling, mlp_coupling_inverse
from .standard_normal_log_prob import standard_normal_log_prob
from .swap import FuseReport, fuse, unfuse

__all__ = [
    "ChainStep",
    "CouplingForm",
    "FuseReport",
    "GmmLogProb",
    "actnorm",
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_identity",
    "actnorm_inverse",
    "actnorm_statistics",
    "boundary_sample",
    "conv_conditioner",
    "conv_coupling",
    "conv_coupling_inverse",
    "coupling_chain",
    "dequantize_logit",
    "fuse",
    "gmm_log_prob",
    "logit_transform",
    "logit_transform_inverse",
    "mlp_coupling",
    "mlp_coupling_inverse",
    "standard_normal_log_prob",
    "unfuse",
]
