"""What a model and a discriminator say of a set of images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.data import iterate
from hybridflow.discriminator import Discriminator
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.metrics import accuracy, bits_per_dim, confusion_matrix, expected_calibration_error

__all__ = ["Prediction", "bin_centres", "predict"]


@dataclass(frozen=True)
class Prediction:
    """Per-image outputs of both heads, on the CPU, and the figures that summarise them."""

    flow_log_probs: Tensor
    """log p(k | x) of the flow: (N, K), in nats."""
    discriminator_logits: Tensor
    """l_k(x) of the discriminator: (N, K); their softmax is p_φ(k | x, real), and their logsumexp LSE(x)."""
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

    @property
    def logits(self) -> dict[str, Tensor]:
        """Logits (N, K) of both heads by name; their softmax is p(k | x) and p_φ(k | x, real)."""
        return {"flow": self.flow_log_probs, "discriminator": self.discriminator_logits}

    def summary(self) -> dict[str, float]:
        """Accuracies and calibration errors of both heads, as fractions, and bits per dimension."""
        figures = {
            f"{name}_accuracy": accuracy(logits.argmax(1), self.labels)
            for name, logits in self.logits.items()
        }
        bits = bits_per_dim(self.log_prob.double(), self.dims, self.levels)
        figures["bits_per_dim"] = bits.mean().item()
        for name, logits in self.logits.items():
            figures[f"{name}_ece"] = expected_calibration_error(logits.softmax(1), self.labels)
        return figures

    def confusion(self) -> dict[str, Tensor]:
        """Confusion matrices (K, K) of both heads, rows the truth."""
        return {
            name: confusion_matrix(logits.argmax(1), self.labels, logits.shape[1])
            for name, logits in self.logits.items()
        }


def bin_centres(x: Tensor, levels: int | None) -> Tensor:
    """(x + 1/2) / levels: grey levels 0 … levels-1 → the centres of their bins, float32 in (0, 1).

    Continuous data (`levels` None) are returned as they are.
    """
    return x if levels is None else (x.float() + 0.5) / levels


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
    flow_log_probs, discriminator_logits, log_prob, latents = [], [], [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for batch, _ in iterate(x, y, batch_size):
            batch = batch.to(device)
            log_prob.append(model.log_prob(dequantise(batch, levels)))
            centre = bin_centres(batch, levels)
            z_k, _, _ = model(centre)
            latents.append(z_k)
            flow_log_probs.append(model.prior.joint_log_prob(z_k).log_softmax(1))
            discriminator_logits.append(discriminator(centre))
    discriminator.train(was_training)
    return Prediction(
        flow_log_probs=torch.cat(flow_log_probs).cpu(),
        discriminator_logits=torch.cat(discriminator_logits).cpu(),
        log_prob=torch.cat(log_prob).cpu(),
        latents=torch.cat(latents).cpu(),
        labels=y.cpu(),
        dims=x.shape[1:].numel(),
        levels=levels,
    )
