"""The generative model: a flow with a Gaussian mixture in its latent space."""

from hybridflow.flow.actnorm import ActNorm
from hybridflow.flow.coupling import AffineCoupling, FlowStep, conv_conditioner, dense_conditioner
from hybridflow.flow.model import MixtureFlow
from hybridflow.flow.multiscale import MultiScaleFlow, VectorFlow
from hybridflow.flow.preprocess import LogitTransform, dequantise
from hybridflow.flow.prior import GaussianMixture, standard_normal_log_prob
from hybridflow.flow.reshape import depth_to_space, space_to_depth

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "FlowStep",
    "GaussianMixture",
    "LogitTransform",
    "MixtureFlow",
    "MultiScaleFlow",
    "VectorFlow",
    "conv_conditioner",
    "dense_conditioner",
    "depth_to_space",
    "dequantise",
    "space_to_depth",
    "standard_normal_log_prob",
]
