"""What a model and a discriminator say of a set of images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.data import iterate
from hybridflow.discriminator import Discriminator
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.metrics import accuracy, bits_per_dim, confusion_matrix, expected_calibration_error

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """Per-image outputs of both heads, on the CPU, and the figures that summarise them."""

    flow_probs: Tensor
    """p(k | x) of the flow: (N, K)."""
    discriminator_probs: Tensor
    """p_φ(k | x, real) of the discriminator: (N, K)."""
    log_prob: Tensor
    """log p(x): (N,), in nats."""
    latents: Tensor
    """z_K: (N, d_K)."""
    labels: Tensor
    """True classes: (N,)."""
    dims: int
    """D, dimensions of one image."""
    levels: int | None
    """Grey levels of the data."""

    def summary(self) -> dict[str, float]:
        """Accuracies and calibration errors of both heads, as fractions, and bits per dimension."""
        heads = {"flow": self.flow_probs, "discriminator": self.discriminator_probs}
        figures = {
            f"{name}_accuracy": accuracy(p.argmax(1), self.labels) for name, p in heads.items()
        }
        bits = bits_per_dim(self.log_prob.double(), self.dims, self.levels)
        figures["bits_per_dim"] = bits.mean().item()
        for name, probs in heads.items():
            figures[f"{name}_ece"] = expected_calibration_error(probs, self.labels)
        return figures

    def confusion(self) -> dict[str, Tensor]:
        """Confusion matrices (K, K) of both heads, rows the truth."""
        heads = {"flow": self.flow_probs, "discriminator": self.discriminator_probs}
        return {
            name: confusion_matrix(p.argmax(1), self.labels, p.shape[1])
            for name, p in heads.items()
        }


@torch.no_grad()
def predict(
    model: MixtureFlow,
    discriminator: Discriminator,
    x: Tensor,
    y: Tensor,
    *,
    levels: int | None,
    batch_size: int = 500,
) -> Prediction:
    """Run both heads over images x (N, …) and labels y (N,), in evaluation mode.

    Classes are read off the centre of each grey level's bin; log p(x) is taken at one uniformly
    dequantised point per image, the same at each call. The random state is left as it was.
    """
    device = model.prior.means.device
    was_training = discriminator.training
    discriminator.eval()
    flow_probs, discriminator_probs, log_prob, latents = [], [], [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for batch, _ in iterate(x, y, batch_size):
            batch = batch.to(device)
            log_prob.append(model.log_prob(dequantise(batch, levels)))
            centre = batch if levels is None else (batch.float() + 0.5) / levels
            z_k, _, _ = model(centre)
            latents.append(z_k)
            flow_probs.append(model.prior.joint_log_prob(z_k).softmax(1))
            discriminator_probs.append(discriminator(centre).softmax(1))
    discriminator.train(was_training)
    return Prediction(
        flow_probs=torch.cat(flow_probs).cpu(),
        discriminator_probs=torch.cat(discriminator_probs).cpu(),
        log_prob=torch.cat(log_prob).cpu(),
        latents=torch.cat(latents).cpu(),
        labels=y.cpu(),
        dims=x.shape[1:].numel(),
        levels=levels,
    )
