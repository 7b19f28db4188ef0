"""Draw samples of each class, or paths between two: `python -m hybridflow.sample RUN`."""

from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from hybridflow.cli import command
from hybridflow.data import load_dataset
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow
from hybridflow.interpolation import find_class, paths_between
from hybridflow.objective import boundary_sample
from hybridflow.pictures import path_rows, paths_in_the_plane, sample_grid, scatter_panels
from hybridflow.run import RunFolder, TrainedRun

__all__ = ["draw_boundary_samples", "draw_samples", "picture_samples"]


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


def draw_boundary_samples(
    model: MixtureFlow, count: int, beta: float = 0.5, seed: int = 0
) -> Tensor:
    """`count` samples between two classes, x' of `hybridflow.objective.boundary_sample`; on the CPU.

    The random state is left as it was, as by `draw_samples`.
    """
    device = model.prior.means.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        z_k, _ = boundary_sample(model.prior, count, beta)
        z_n = torch.randn(count, model.flow.latent_sizes[1], device=device)
        return model.inverse(z_k, z_n).cpu()


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
    interpolate: tuple[str, str] | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Draw class-conditional samples from a trained run and write them as a picture, a row per class.

    Args:
        run: The run folder.
        count: Samples per class; with --interpolate, paths.
        interpolate: Instead draw paths in latent space from one class to another (names or numbers),
            with both heads' probabilities of the two along them.
        seed: Seed of the samples.
        device: cpu, cuda, cuda:N or auto.
        out: The PNG file to write; by default samples-SEED.png or interpolation-A-B-SEED.png in the
            run folder.
    """
    if count < 1:
        raise InputError(f"--count: got {count}, want at least 1")
    if temperature < 0:
        raise InputError(f"--temperature: got {temperature}, want at least 0")
    trained, folder = TrainedRun.load(run, device), RunFolder(run)
    if interpolate is not None:
        a, b = (find_class(text, trained.class_names) for text in interpolate)
        if a == b:
            raise InputError(
                f"--interpolate: got {' '.join(interpolate)}, want two different classes"
            )
        path = out or folder.picture(f"interpolation-{a}-{b}-{seed}")
        _picture_paths(trained, (a, b), count, temperature, seed, path)
    else:
        x, labels = draw_samples(trained.model, trained.classes, count, temperature, seed)
        path = out or folder.picture(f"samples-{seed}")
        picture_samples(x, labels, path, trained.class_names)
    print(path)


def _picture_paths(
    trained: TrainedRun,
    classes: tuple[int, int],
    count: int,
    temperature: float,
    seed: int,
    path: Path,
) -> None:
    """Draw paths as rows of images, or over the test points in the plane."""
    planar = trained.levels is None
    found = paths_between(
        trained,
        *classes,
        count,
        steps=101 if planar else 11,
        temperature=temperature,
        seed=seed,
    )
    if planar:
        dataset = load_dataset(trained.config.dataset)
        data = dataset.test_x, dataset.test_y
        paths_in_the_plane(found, data, path, ends=classes, class_names=trained.class_names)
    else:
        path_rows(found, path, ends=classes, class_names=trained.class_names)


if __name__ == "__main__":
    main()
