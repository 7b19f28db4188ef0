"""Compare training with and without the kernels, step by step: `python -m benchmarks.curve --data-dir DATA`.

Two trainers of a preset on the CPU in float32: PyTorch layer by layer, and fused, every conditioner as one
op. Each step of the fused one starts from the state and the random numbers of the other's, so that its
losses may differ by rounding alone: left to themselves two runs part within a few steps whatever rounds
differently, as Adam's first steps have the size of the learning rate however small a gradient is. How far
they do is recorded too, for --free steps, beside a run of PyTorch's whose weights were moved by 1e-7
(relative). Exit status: 0 if no loss of a step differs by more than 1e-3, relative.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import machine
from hybridflow.config import PRESETS
from hybridflow.data import load_dataset, make_split
from hybridflow.kernels.swap import _choices
from hybridflow.run import RunFolder
from hybridflow.trainer import Trainer

__all__ = ["free", "largest_difference", "locked", "main"]

_VARIANTS = ("eager", "fused")
_LOSSES = ("loss_d", "loss_g")
_ALLOWED = 1e-3


class _Run:
    """A trainer after its initialisation, which draws the same random numbers in every run."""

    def __init__(self, preset: str, data_dir: Path | None, folder: Path, fused: bool) -> None:
        config = replace(PRESETS[preset], fused=fused, device="cpu", data_dir=data_dir)
        dataset = load_dataset(config.dataset, config.data_dir)
        split = make_split(
            dataset.train_y,
            classes=dataset.classes,
            num_labels=config.labels,
            num_validation=config.validation,
            seed=config.seed,
        )
        self.trainer = Trainer(config, RunFolder(folder), dataset, split)
        self.trainer.initialise()
        self.fused, self.random, self.done = fused, torch.get_rng_state(), 0

    def step(self) -> dict[str, float]:
        """The losses of the next step."""
        trainer = self.trainer
        torch.set_rng_state(self.random)
        for batches in (trainer.labelled, trainer.unlabelled):
            if self.done % batches.steps_per_epoch == 0:
                batches.shuffle()
        with _choices.using(self.fused):
            terms = trainer.step()
        self.random = torch.get_rng_state()
        self.done += 1
        return {name: terms[name].item() for name in _LOSSES}

    def continue_from(self, other: "_Run") -> None:
        self.trainer.step.load_state_dict(other.trainer.step.state_dict())
        self.random, self.done = other.random, other.done

    @torch.no_grad()
    def move_weights(self, relative: float) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.trainer.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + relative * noise)


def locked(preset: str, data_dir: Path | None, steps: int) -> dict[str, dict[str, list[float]]]:
    """The losses of every step, each fused one from the state that the eager one starts from."""
    found: dict[str, dict[str, list[float]]] = {n: {k: [] for k in _LOSSES} for n in _VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        eager, fused = (_Run(preset, data_dir, Path(scratch) / n, n == "fused") for n in _VARIANTS)
        for _ in tqdm(range(steps), unit="step"):
            fused.continue_from(eager)
            for name, run in (("eager", eager), ("fused", fused)):
                for loss, value in run.step().items():
                    found[name][loss].append(value)
    return found


def free(preset: str, data_dir: Path | None, steps: int) -> dict[str, dict[str, list[float]]]:
    """The losses of runs left to themselves: fused, and eager from weights moved by 1e-7."""
    found = {}
    for name in ("fused", "moved"):
        with tempfile.TemporaryDirectory() as scratch:
            run = _Run(preset, data_dir, Path(scratch), name == "fused")
            if name == "moved":
                run.move_weights(1e-7)
            rows = [run.step() for _ in range(steps)]
        found[name] = {loss: [row[loss] for row in rows] for loss in _LOSSES}
    return found


def largest_difference(eager: Sequence[float], fused: Sequence[float]) -> float:
    """Largest relative difference between the same steps' losses; NaN counts as infinite."""
    pairs = zip(eager, fused, strict=True)
    return max(abs(f - e) / abs(e) if f == f and e == e else float("inf") for e, f in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.curve", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="mnist")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--free", type=int, default=10, help="steps of the runs left to themselves")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files")
    parser.add_argument("--out", type=Path, help="by default results/curve-PRESET.json")
    args = parser.parse_args(argv)
    out, before = args.out or RESULTS / f"curve-{args.preset}.json", commit()
    alone = free(args.preset, args.data_dir, min(args.free, args.steps))
    runs = locked(args.preset, args.data_dir, args.steps)
    eager, data = runs["eager"], ["--data-dir", "DATA"] if args.data_dir else []
    differences = {n: largest_difference(eager[n], runs["fused"][n]) for n in _LOSSES}
    results = {
        "command": ["python", "-m", "benchmarks.curve", "--preset", args.preset, *data],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": before,
        "machine": machine(torch.device("cpu")),
        "largest_difference": {n: float(f"{d:.2g}") for n, d in differences.items()},
        "free": {
            name: {
                loss: [
                    float(f"{abs(f - e) / abs(e):.2g}")
                    for e, f in zip(eager[loss], values, strict=False)
                ]
                for loss, values in losses.items()
            }
            for name, losses in alone.items()
        },
        "losses": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"largest relative differences: {results['largest_difference']}\nresults: {out}")
    return 0 if max(differences.values()) <= _ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
