"""The objective, a function per term (Tables 4.1 and 4.2), and the samples near the decision boundary.

Logits of the discriminator are l (B, K), the (K+1)-th being fixed at 0; `joint` is the flow's
log p(x, k) or any (B, K) whose softmax is p(k | x). Every term is a mean over its batch, in nats.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.config import Objective, ObjectiveConfig
from hybridflow.flow import GaussianMixture

__all__ = [
    "adversarial_d",
    "adversarial_g",
    "boundary_sample",
    "certain_shares",
    "class_thresholds",
    "consistency",
    "feature_matching",
    "joint_nll",
    "nll",
    "pseudo_label",
    "supervised",
    "terms_of",
]

_SUPERVISED = ("w_sup_d", "w_sup_g")
_ADVERSARIAL = (*_SUPERVISED, "w_nll", "w_adv_d", "w_adv_g")
_FLOWGMM = ("w_sup_d", "w_joint")
_USED: dict[Objective, tuple[str, ...]] = {
    "supervised": _SUPERVISED,
    "nll": (*_SUPERVISED, "w_nll"),
    "nll+adversarial": _ADVERSARIAL,
    "full": (*_ADVERSARIAL, "w_pl_d", "w_pl_g", "w_con_d", "w_con_g"),
    "flowgmm": _FLOWGMM,
    "flowgmm+consistency": (*_FLOWGMM, "w_joint_con"),
    "fm-gan": ("w_sup_d", "w_adv_d", "w_fm_g"),
}


def terms_of(objective: Objective, terms: ObjectiveConfig) -> ObjectiveConfig:
    """The weights with those an objective leaves out set to 0; fm-gan draws plain samples (β = 1)."""
    unused = {name for name in vars(terms) if name.startswith("w_")} - set(_USED[objective])
    weights: dict[str, Any] = dict.fromkeys(unused, 0.0)
    return replace(terms, **weights, beta=1.0 if objective == "fm-gan" else terms.beta)


def supervised(
    logits: Tensor, labels: Tensor, threshold: float | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy -log p(y | x) of logits (B, K) and labels (B,).

    For the flow this is the supervised likelihood: not -log p(x, y), which pulls the means together.
    With a threshold, images with p(y | x) above it count as 0. With smoothing ε the label is 1 - ε of
    its class and ε / K of each (Szegedy et al., CVPR 2016).
    """
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if threshold is not None:
        p = logits.detach().softmax(1).gather(1, labels[:, None]).squeeze(1)
        losses = losses * (p <= threshold)
    return losses.mean()


def nll(joint: Tensor, dims: int) -> Tensor:
    """-log p(x) = -logsumexp_k log p(x, k), in nats per dimension."""
    return -joint.logsumexp(1).mean() / dims


def joint_nll(joint: Tensor, labels: Tensor, dims: int) -> Tensor:
    """-log p(x, y), in nats per dimension: FlowGMM's labelled term."""
    return -joint.gather(1, labels[:, None]).mean() / dims


def adversarial_d(real: Tensor, generated: Tensor) -> Tensor:
    """-log p(real | x_u) - log p(generated | x') = softplus(LSE(x_u)) - LSE(x_u) + softplus(LSE(x'))."""
    return F.softplus(-real.logsumexp(1)).mean() + F.softplus(generated.logsumexp(1)).mean()


def adversarial_g(generated: Tensor, soft_labels: Tensor) -> Tensor:
    """-Σ_k y'_k log p_φ(k | x') over K+1 outputs: be real, and of class y', at once."""
    log_p = generated - F.softplus(generated.logsumexp(1, keepdim=True))
    return -(soft_labels * log_p).sum(1).mean()


def pseudo_label(logits: Tensor, target: Tensor) -> Tensor:
    """(1/K) Σ_k (p(k | x) - target_k)², the target (B, K) being the other network's probabilities."""
    return F.mse_loss(logits.softmax(1), target.detach())


def consistency(logits: Tensor, target: Tensor, confidence: float | Tensor) -> Tensor:
    """-log p(y | strong view), y = argmax_k target_k, where target_y is the confidence or more, else 0.

    Args:
        logits: of strong views, (B, K).
        target: probabilities of the same images, (B, K).
        confidence: the least probability of a class to go by; one for all classes, or (K,).

    Source: Sohn et al., *FixMatch*, NeurIPS 2020.
    """
    certain, labels = _certain(target, confidence)
    return (F.cross_entropy(logits, labels, reduction="none") * certain).mean()


def certain_shares(target: Tensor, confidence: float) -> Tensor:
    """Of probabilities (B, K), the share that give class k, at this confidence or more: (K,)."""
    certain, labels = _certain(target, confidence)
    classes = torch.arange(target.shape[1], device=target.device)
    return ((labels[:, None] == classes) & certain[:, None]).float().mean(0)


def class_thresholds(shares: Tensor, confidence: float) -> Tensor:
    """The confidence to ask of each class, lower where few images reach it: (K,).

        τ_k = τ · M(s_k / max(max_j s_j, 1 - Σ_j s_j)),    M(x) = x / (2 - x)

    where s_k are the shares of images of class k that reach the confidence τ. Images of every class
    thus have a say before a class that was learnt early has taken those between it and others; while
    most images do not reach the confidence all of them have.

    Args:
        shares: s, (K,).
        confidence: τ.

    Source: Zhang et al., *FlexMatch*, NeurIPS 2021.
    """
    relative = shares / torch.maximum(shares.max(), 1 - shares.sum())
    return confidence * relative / (2 - relative)


def _certain(target: Tensor, confidence: float | Tensor) -> tuple[Tensor, Tensor]:
    """Whether the likeliest class of each row is as likely as that, and which it is: (B,) each."""
    p, labels = target.detach().max(1)
    least = confidence[labels] if isinstance(confidence, Tensor) else confidence
    return p >= least, labels


def feature_matching(generated: Tensor, real: Tensor) -> Tensor:
    """Mean over features of (mean f(x') - mean f(x))², features (B, d) of generated and real images.

    Source: Salimans et al., *Improved techniques for training GANs*, NeurIPS 2016.
    """
    return F.mse_loss(generated.mean(0), real.detach().mean(0))


def boundary_sample(prior: GaussianMixture, count: int, beta: float) -> tuple[Tensor, Tensor]:
    """Latents between two classes and the classes they belong to (Eq. 4.6).

        a ≠ b uniform,  z_a ~ N(μ_a, I),  z_b ~ N(μ_b, I)
        z' = β z_a + (1 - β) z_b,    y' = softmax_k log N(z'; μ_k, I)

    Gradients reach the means through both. At least two classes.

    Returns:
        z' (count, d) and y' (count, K).
    """
    classes, size = prior.means.shape
    device = prior.means.device
    a = torch.randint(classes, (count,), device=device)
    b = (a + torch.randint(1, classes, (count,), device=device)) % classes
    z_a = prior.means[a] + torch.randn(count, size, device=device)
    z_b = prior.means[b] + torch.randn(count, size, device=device)
    z = beta * z_a + (1 - beta) * z_b
    return z, prior.component_log_prob(z).softmax(1)
