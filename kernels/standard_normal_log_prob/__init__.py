"""Log-density of the standard normal, added to a log-det; derivation and costs in README.md."""

from .op import standard_normal_log_prob

__all__ = ["standard_normal_log_prob"]
