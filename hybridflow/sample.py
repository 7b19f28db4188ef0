"""Draw class-conditional samples from a trained run: `python -m hybridflow.sample RUN`."""

from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from hybridflow.cli import command
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow
from hybridflow.pictures import sample_grid, scatter_panels
from hybridflow.run import RunFolder, TrainedRun

__all__ = ["draw_samples", "picture_samples"]


def draw_samples(
    model: MixtureFlow, classes: int, count: int, temperature: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`count` samples of each class: (K·count, …), and their classes (K·count,); on the CPU.

    The random state is left as it was; the same seed gives the same samples on the same device.
    """
    device = model.prior.means.device
    labels = torch.arange(classes, device=device).repeat_interleave(count)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return model.sample(labels, temperature).cpu(), labels.cpu()


def picture_samples(x: Tensor, labels: Tensor, path: Path, class_names: tuple[str, ...]) -> None:
    """Draw images as a grid, a row per class; points in the plane by class."""
    if x.dim() == 2:
        scatter_panels({"samples": (x, labels)}, path, class_names=class_names)
    else:
        grid = x.view(len(class_names), -1, *x.shape[1:])
        sample_grid(grid, path, class_names=class_names)


@command
def main() -> None:
    """Command line."""
    tyro.cli(_sample, prog="python -m hybridflow.sample")


def _sample(
    run: tyro.conf.Positional[Path],
    count: int = 10,
    temperature: Annotated[
        float, tyro.conf.arg(help="Scale of the latent noise; 1 is the model.")
    ] = 1.0,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Draw class-conditional samples from a trained run and write them as a picture, a row per class.

    Args:
        run: The run folder.
        count: Samples per class.
        seed: Seed of the samples.
        device: cpu, cuda, cuda:N or auto.
        out: The PNG file to write; by default samples-SEED.png in the run folder.
    """
    if count < 1:
        raise InputError(f"--count: got {count}, want at least 1")
    if temperature < 0:
        raise InputError(f"--temperature: got {temperature}, want at least 0")
    trained = TrainedRun.load(run, device)
    x, labels = draw_samples(trained.model, trained.classes, count, temperature, seed)
    path = out or RunFolder(run).picture(f"samples-{seed}")
    picture_samples(x, labels, path, trained.class_names)
    print(path)


if __name__ == "__main__":
    main()
