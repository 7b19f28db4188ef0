"""Log-density of a Gaussian mixture with unit covariances; derivation and costs in README.md."""

from .op import GmmLogProb, gmm_log_prob

__all__ = ["GmmLogProb", "gmm_log_prob"]
