"""A run folder: what is in it, and a trained run read back from it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from hybridflow import checkpoint
from hybridflow.config import Config, config_from_json, config_to_json
from hybridflow.discriminator import Discriminator
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow
from hybridflow.networks import build_discriminator, build_model

__all__ = ["RunFolder", "TrainedRun", "resolve_device"]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, by what they hold."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def split(self) -> Path:
        return self.path / "split.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def start(self) -> Path:
        """Latents of some test images before the first step."""
        return self.path / "start.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json.gz"

    def picture(self, name: str) -> Path:
        """Where the picture of this name lies."""
        return self.path / f"{name}.png"

    def create(self, config: Config) -> None:
        """Make the folder and write its configuration.

        Raises:
            InputError: the folder holds something already, or cannot be made or written.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            hint = f"; to continue that run: --resume {self.path}" if self.config.exists() else ""
            raise InputError(
                f"--out: {self.path} is not empty, want a new or an empty folder{hint}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: cannot make {self.path}: {error.strerror}") from None
        text = json.dumps(config_to_json(config), indent=2) + "\n"
        checkpoint.atomic_write_text(self.config, text)

    def read_config(self) -> Config:
        """The configuration the run was made with.

        Raises:
            InputError: there is no such run, or its configuration is damaged.
        """
        try:
            return config_from_json(json.loads(self.config.read_text()))
        except OSError as error:
            raise InputError(
                f"run: got {self.path}, want a run folder: {self.config.name} cannot be read: "
                f"{error.strerror}"
            ) from None
        except ValueError as error:
            raise InputError(f"{self.config}: damaged: {error}") from None


@dataclass(frozen=True)
class TrainedRun:
    """A trained model and discriminator with averaged weights, ready for use.

    Example:
        >>> run = TrainedRun.load("runs/digits", device="cpu")     # doctest: +SKIP
        >>> run.model.log_prob(x), run.discriminator(x)            # doctest: +SKIP
    """

    config: Config
    step: int
    model: MixtureFlow
    discriminator: Discriminator
    classes: int
    class_names: tuple[str, ...]
    levels: int | None

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Self:
        """Read a run's configuration and newest checkpoint.

        Raises:
            InputError: there is no such run, or its checkpoint is missing, damaged or of another
                architecture.
        """
        folder = RunFolder(Path(path))
        config = folder.read_config()
        where = resolve_device(device)
        tensors, data = checkpoint.load(folder.checkpoint, where)
        shape = torch.Size(data["shape"])
        model = build_model(config.flow, shape, data["classes"])
        discriminator = build_discriminator(config.discriminator, shape, data["classes"])
        network: MixtureFlow | Discriminator
        for network, weights, averages in (
            (model, "model", "average_g"),
            (discriminator, "discriminator", "average_d"),
        ):
            state = _under(weights, tensors) | _under(averages, tensors)
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise InputError(f"{folder.checkpoint}: not of {folder.config}: {error}") from None
            network.to(where).eval()
        return cls(
            config=config,
            step=data["step"],
            model=model,
            discriminator=discriminator,
            classes=data["classes"],
            class_names=tuple(data["class_names"]),
            levels=data["levels"],
        )


def resolve_device(name: str) -> torch.device:
    """The device a name stands for; auto is the GPU where there is one.

    Raises:
        InputError: no such device, or none at hand.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device: got {name!r}, want cpu, cuda or auto: {reason}") from None
    return device


def _under(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")
    }
