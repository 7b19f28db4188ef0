"""hybridflow: hybrid generative models for semi-supervised learning.

One model, trained by one objective, gives a classifier, exact likelihoods, class-conditional samples
and a discriminator: a multi-scale RealNVP flow with a Gaussian mixture in its last latent scale,
trained together with a (K+1)-class discriminator.
"""

__version__ = "0.1.0"
