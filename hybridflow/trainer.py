"""A run: set up, loop, log, save, report."""

import csv
import io
import json
import math
import platform
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hybridflow import __version__, checkpoint
from hybridflow.capture import CapturedStep
from hybridflow.config import Config
from hybridflow.data import (
    Batches,
    Dataset,
    Split,
    load_dataset,
    load_split,
    make_split,
    save_split,
)
from hybridflow.discriminator import Discriminator
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.kernels import fuse
from hybridflow.networks import build_discriminator, build_model
from hybridflow.objective import terms_of
from hybridflow.phases import phase
from hybridflow.prediction import Prediction, bin_centres, predict
from hybridflow.profiling import RunProfile
from hybridflow.run import RunFolder, resolve_device
from hybridflow.step import HybridStep

__all__ = ["Trainer", "resume", "train"]

_INITIAL_IMAGES = 500
_SHOWN_IMAGES = 500


def train(config: Config, folder: RunFolder) -> int:
    """Make a run and train it to its end; the exit status.

    Raises:
        InputError: bad data, configuration or folder; nothing has been written then.
    """
    dataset = load_dataset(config.dataset, config.data_dir)
    split = make_split(
        dataset.train_y,
        classes=dataset.classes,
        num_labels=config.labels,
        num_validation=config.validation,
        seed=config.seed,
    )
    trainer = Trainer(config, folder, dataset, split)
    folder.create(config)
    save_split(split, folder.split)
    trainer.initialise()
    trainer.save_start()
    trainer.save()
    return trainer.run()


def resume(config: Config, folder: RunFolder) -> int:
    """Continue a run from its last checkpoint; the exit status.

    Raises:
        InputError: no run, or a damaged one; nothing has been written then.
    """
    dataset = load_dataset(config.dataset, config.data_dir)
    trainer = Trainer(config, folder, dataset, load_split(folder.split))
    trainer.restore()
    return trainer.run()


class Trainer:
    """Trains one configuration on one data set and keeps its run folder.

    Args:
        config: the run.
        folder: where it is kept.
        dataset: the data.
        split: which training images are labelled, unlabelled and held out.
    """

    def __init__(self, config: Config, folder: RunFolder, dataset: Dataset, split: Split) -> None:
        self.config, self.folder, self.dataset, self.split = config, folder, dataset, split
        self.device = resolve_device(config.device)
        torch.manual_seed(config.seed)
        self.model, self.discriminator = self._networks()
        self.averaged_model, self.averaged_discriminator = self._networks()
        self.labelled = self._batches(split.labelled, config.batch_labelled, dataset.train_y)
        self.unlabelled = self._batches(split.unlabelled, config.batch_unlabelled)
        self.total_steps = config.steps
        if config.epochs is not None:
            self.total_steps = max(1, round(config.epochs * self.unlabelled.steps_per_epoch))
        terms = terms_of(config.objective, config.terms)
        if (terms.w_con_d or terms.w_con_g) and (dataset.train_x.dim() != 4 or not dataset.levels):
            raise InputError(
                f"terms.w_con_d, terms.w_con_g: got {terms.w_con_d}, {terms.w_con_g} for "
                f"{config.dataset}; only images have strong views"
            )
        self.step = HybridStep(
            self.model,
            self.discriminator,
            self.labelled,
            self.unlabelled,
            levels=dataset.levels,
            terms=terms,
            strong=config.strong,
            optimiser=config.optimiser,
            total_steps=self.total_steps,
            precision=config.precision,
        )
        graphs = config.graphs and config.fused and self.device.type == "cuda"
        self.train_step = (
            CapturedStep(self._summed_step, self.device) if graphs else self._summed_step
        )
        self.done = 0
        self.seconds = self.step_seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        self.summed = 0

    def _batches(self, which: Tensor, size: int, labels: Tensor | None = None) -> Batches:
        return Batches(
            self.dataset.train_x[which],
            None if labels is None else labels[which],
            size,
            shift=self.config.shift,
            flip=self.config.mirror,
            device=self.device,
        )

    def _networks(self) -> tuple[MixtureFlow, Discriminator]:
        shape, classes = self.dataset.train_x.shape[1:], self.dataset.classes
        model = build_model(self.config.flow, shape, classes).to(self.device)
        discriminator = build_discriminator(self.config.discriminator, shape, classes)
        if self.config.fused:
            try:
                fuse(model)
            except (RuntimeError, ImportError) as error:
                raise InputError(f"--fused: {error}") from None
        return model, discriminator.to(self.device)

    @torch.no_grad()
    def initialise(self) -> None:
        """Data-dependent starts: actnorms, the discriminator's layers, the mixture's means.

        The means come from k-means on the latents of the labelled images, itself started from the
        mean of each class, so that component k belongs to class k.
        """
        levels, classes = self.dataset.levels, self.dataset.classes
        images = self.dataset.train_x[self.split.unlabelled[:_INITIAL_IMAGES]].to(self.device)
        x = dequantise(images, levels)
        self.model.initialise(x)
        self.discriminator.initialise(x)
        labelled = self.dataset.train_x[self.split.labelled].to(self.device)
        labels = self.dataset.train_y[self.split.labelled]
        latents = torch.cat(
            [self.model(dequantise(b, levels))[0] for b in labelled.split(500)]
        ).cpu()
        starts = np.stack([latents[labels == k].mean(0).numpy() for k in range(classes)])
        means = KMeans(classes, init=starts, n_init=1).fit(latents.numpy()).cluster_centers_
        self.model.prior.initialise(torch.from_numpy(means))
        self.step.start_averages()

    @torch.no_grad()
    def save_start(self) -> None:
        """Keep the latents of some test images, and the means, as they are before the first step."""
        x = bin_centres(self.dataset.test_x[self._shown()].to(self.device), self.dataset.levels)
        start = {"latents": self.model(x)[0], "means": self.model.prior.means}
        checkpoint.save(self.folder.start, start, {})

    def _shown(self) -> slice:
        """The test images whose latents are drawn: at most `_SHOWN_IMAGES`, evenly spaced."""
        return slice(None, None, -(-len(self.dataset.test_x) // _SHOWN_IMAGES))

    def run(self) -> int:
        """Train to the last step, or until stopped; report at the end. Returns the exit status."""
        config = self.config
        limit = math.inf if config.minutes is None else 60 * config.minutes
        started = time.perf_counter() - self.seconds
        bar = tqdm(total=self.total_steps, initial=self.done, unit="step", dynamic_ncols=True)
        self._open_metrics()
        profile = None
        if config.profile:
            profile = RunProfile(self.device, self.folder.profile, self.folder.trace)
        with (
            _Interrupts() as stop,
            SummaryWriter(str(self.folder.tensorboard)) as board,
            bar,
            profile or nullcontext(),
        ):
            while self.done < self.total_steps and self.seconds < limit and not stop.signal:
                began = time.perf_counter()
                self._one_step()
                self.seconds = time.perf_counter() - started
                ends = self.done == self.total_steps or self.seconds >= limit
                row: dict[str, float] = {}
                if ends or self.done % config.log_every == 0:
                    row |= self._read_sums()
                    if not all(map(math.isfinite, row.values())):
                        return self._diverged(row)
                self.step_seconds += time.perf_counter() - began
                if ends or self.done % config.eval_every == 0:
                    with phase("evaluation"):
                        row |= self._validate()
                if row:
                    with phase("logging"):
                        self._log(row, board, bar)
                if ends or self.done % config.save_every == 0:
                    with phase("checkpoint"):
                        self.save()
                bar.update()
                if profile:
                    profile.step()
        if profile:
            profile.report()
        if stop.signal:
            self.save()
            print(
                f"stopped at step {self.done}; saved. To continue:\n"
                f"  python -m hybridflow.train --resume {self.folder.path}"
            )
            return 128 + stop.signal
        self.report()
        return 0

    def _diverged(self, row: dict[str, float]) -> int:
        """Say that training broke down; the last checkpoint stays as it is."""
        terms = ", ".join(f"{name} = {value}" for name, value in row.items())
        print(
            f"diverged by step {self.done}: {terms}; the checkpoint of an earlier step was kept in "
            f"{self.folder.path}. Smaller learning rates (--optimiser.lr-g, --optimiser.lr-d) may help.",
            file=sys.stderr,
        )
        return 1

    def _one_step(self) -> None:
        for batches in self.labelled, self.unlabelled:
            if self.done % batches.steps_per_epoch == 0:
                batches.shuffle()
        self.train_step()
        self.summed += 1
        self.done += 1

    def _summed_step(self) -> None:
        """A step whose terms are added up on the device; this is what a graph holds."""
        terms = self.step()
        if not self.sums:
            self.sums = {name: torch.zeros_like(value) for name, value in terms.items()}
        torch._foreach_add_(list(self.sums.values()), list(terms.values()))

    def _read_sums(self) -> dict[str, float]:
        """Mean of every term since the last reading, the only place the loop waits for the device."""
        means = (torch.stack(list(self.sums.values())) / self.summed).tolist()
        self.summed = 0
        for total in self.sums.values():
            total.zero_()
        return dict(zip(self.sums, means, strict=True))

    def _validate(self) -> dict[str, float]:
        """Accuracies of both heads on the held-out images, with averaged weights."""
        held_out = self.split.validation
        x, y = self.dataset.train_x[held_out], self.dataset.train_y[held_out]
        summary = self._predict(x, y).summary()
        return {f"validation_{n}": v for n, v in summary.items() if n.endswith(("accuracy", "dim"))}

    def _predict(self, x: Tensor, y: Tensor) -> Prediction:
        model, discriminator = self.averaged_model, self.averaged_discriminator
        for network, state in zip((model, discriminator), self.step.averaged_states(), strict=True):
            network.load_state_dict(state)
        return predict(model, discriminator, x, y, levels=self.dataset.levels)

    def images_per_second(self) -> float:
        """Training images, labelled and unlabelled, per second spent in steps."""
        per_step = self.config.batch_labelled + self.config.batch_unlabelled
        return self.done * per_step / max(self.step_seconds, 1e-9)

    def save(self) -> None:
        """Write the checkpoint; the previous one stays whole until this one is."""
        state = self.step.state_dict() | {f"sums.{k}": v for k, v in self.sums.items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        data: dict[str, checkpoint.JSON] = {
            "step": self.done,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "sums": list(self.sums),
            "summed": self.summed,
            "shape": list(self.dataset.train_x.shape[1:]),
            "classes": self.dataset.classes,
            "class_names": list(self.dataset.class_names),
            "levels": self.dataset.levels,
        }
        checkpoint.save(self.folder.checkpoint, state, data)

    def restore(self) -> None:
        """Continue from the folder's checkpoint.

        Raises:
            InputError: it is missing, damaged, or of another architecture.
        """
        state, data = checkpoint.load(self.folder.checkpoint)
        self.step.load_state_dict(state)
        self.done, self.seconds = data["step"], data["seconds"]
        self.step_seconds = data["step_seconds"]
        self.summed = data["summed"]
        self.sums = {name: state[f"sums.{name}"].to(self.device) for name in data["sums"]}
        torch.set_rng_state(state["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)

    def _open_metrics(self) -> None:
        """Drop the rows of metrics.csv that are later than the step the run continues from."""
        self.rows = [
            row for row in _read_rows(self.folder.metrics) if int(row["step"]) <= self.done
        ]

    def _log(self, row: dict[str, float], board: SummaryWriter, bar: tqdm) -> None:
        row |= {"seconds": self.seconds, "images_per_second": self.images_per_second()}
        for name, value in row.items():
            board.add_scalar(name, value, self.done)
        self.rows.append({"step": str(self.done)} | {k: f"{v:.6g}" for k, v in row.items()})
        _write_rows(self.folder.metrics, self.rows)
        shown = {
            "loss_d": "loss_d",
            "loss_g": "loss_g",
            "validation_flow_accuracy": "flow",
            "validation_discriminator_accuracy": "disc",
            "images_per_second": "img/s",
        }
        latest = {k: v for earlier in self.rows for k, v in earlier.items() if v}
        bar.set_postfix({s: f"{float(latest[n]):.3g}" for n, s in shown.items() if n in latest})

    def report(self) -> dict[str, Any]:
        """Judge the last step on the test images; write results.json and the pictures, print a table."""
        # Imported here, as in the next three: matplotlib would keep the first step waiting.
        from hybridflow.pictures import confusion_picture

        dataset, folder = self.dataset, self.folder
        prediction = self._predict(dataset.test_x, dataset.test_y)
        config = self.config
        results: dict[str, Any] = {
            "dataset": config.dataset,
            "labels": config.labels,
            "seed": config.seed,
            "objective": config.objective,
            "fused": config.fused,
            "device": _device_name(self.device),
            "steps": self.done,
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.images_per_second(), 1),
            **prediction.summary(),
            "versions": _versions(),
            "commit": _commit(),
        }
        checkpoint.atomic_write_text(folder.results, json.dumps(results, indent=2) + "\n")
        names = dataset.class_names
        confusion_picture(prediction.confusion(), folder.picture("confusion"), class_names=names)
        self._picture_latents(prediction)
        self._picture_samples()
        self._picture_curves()
        for name, value in results.items():
            if not isinstance(value, dict):
                print(
                    f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}"
                )
        print(f"{'run folder':24} {folder.path}")
        return results

    def _picture_latents(self, prediction: Prediction) -> None:
        """Latents of the same test images at the start and at the end."""
        from hybridflow.pictures import latent_picture

        shown, panels = self._shown(), {}
        if self.folder.start.exists():  # runs of earlier versions have none
            start, _ = checkpoint.load(self.folder.start)
            panels["before the first step"] = start["latents"], start["means"]
        means = self.averaged_model.prior.means
        panels[f"after step {self.done}"] = prediction.latents[shown], means
        labels, names = self.dataset.test_y[shown], self.dataset.class_names
        latent_picture(panels, labels, self.folder.picture("latent"), class_names=names)

    def _picture_samples(self) -> None:
        from hybridflow.pictures import scatter_panels
        from hybridflow.sample import draw_samples, picture_samples

        dataset, path = self.dataset, self.folder.picture("samples")
        count = 10 if dataset.train_x.dim() == 4 else 2000 // dataset.classes
        x, labels = draw_samples(self.averaged_model, dataset.classes, count)
        if dataset.train_x.dim() == 4:
            picture_samples(x, labels, path, dataset.class_names)
        else:
            panels = {"data": (dataset.test_x, dataset.test_y), "samples": (x, labels)}
            scatter_panels(panels, path, class_names=dataset.class_names)

    def _picture_curves(self) -> None:
        from hybridflow.pictures import curves

        names = list(dict.fromkeys(name for row in self.rows for name in row))
        columns = {n: [float(row[n]) if row.get(n) else None for row in self.rows] for n in names}
        accuracies = [n for n in names if n.endswith("accuracy")]
        losses = [n for n in names if n in self.sums]
        path = self.folder.picture("curves")
        curves(columns, path, losses=losses, accuracies=accuracies)


class _Interrupts:
    """While entered, Ctrl-C and SIGTERM are noted in `signal` instead of ending the program."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._previous = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows anew, atomically: they are few, and later ones may bring new columns."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.atomic_write_text(path, text.getvalue())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "hybridflow": __version__}
    for package in "torch", "triton", "numpy":
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _commit() -> str | None:
    """The commit of the source checkout, marked where files differ from it; None without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
