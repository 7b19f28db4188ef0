"""Compare training with and without the kernels, step by step: `python -m benchmarks.curve --data-dir DATA`.

Two runs of a preset from the same seed, on the CPU in float32: PyTorch layer by layer, and fused, every
conditioner as one op. Both draw the same random numbers, so that their losses may differ by rounding
alone. Exit status: 0 if no loss of a step differs by more than 1e-3, relative.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import machine
from hybridflow.config import PRESETS
from hybridflow.data import load_dataset, make_split
from hybridflow.kernels.swap import _choices
from hybridflow.run import RunFolder
from hybridflow.trainer import Trainer

__all__ = ["largest_difference", "losses", "main"]

_LOSSES = ("loss_d", "loss_g")
_ALLOWED = 1e-3


def losses(
    preset: str, data_dir: Path | None, steps: int, fused: bool, threads: int
) -> dict[str, list[float]]:
    """Each loss at every step of a run of its own."""
    torch.set_num_threads(threads)
    config = replace(PRESETS[preset], fused=fused, device="cpu", data_dir=data_dir)
    dataset = load_dataset(config.dataset, config.data_dir)
    split = make_split(
        dataset.train_y,
        classes=dataset.classes,
        num_labels=config.labels,
        num_validation=config.validation,
        seed=config.seed,
    )
    found: dict[str, list[float]] = {name: [] for name in _LOSSES}
    with (
        tempfile.TemporaryDirectory() as scratch,
        _choices.using(True) if fused else nullcontext(),
    ):
        trainer = Trainer(config, RunFolder(Path(scratch) / "run"), dataset, split)
        trainer.initialise()
        for done in range(steps):
            for batches in (trainer.labelled, trainer.unlabelled):
                if done % batches.steps_per_epoch == 0:
                    batches.shuffle()
            terms = trainer.step()
            for name, values in found.items():
                values.append(terms[name].item())
            if done % 10 == 9:
                print(f"{'fused' if fused else 'eager'}: step {done + 1}", flush=True)
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
    parser.add_argument("--data-dir", type=Path, help="folder of the data files")
    parser.add_argument("--out", type=Path, help="by default results/curve-PRESET.json")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"curve-{args.preset}.json"
    before, threads = commit(), max(1, torch.get_num_threads() // 2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        eager, fused = (
            pool.submit(losses, args.preset, args.data_dir, args.steps, fused, threads)
            for fused in (False, True)
        )
        runs = {"eager": eager.result(), "fused": fused.result()}
    differences = {n: largest_difference(runs["eager"][n], runs["fused"][n]) for n in _LOSSES}
    data = ["--data-dir", "DATA"] if args.data_dir else []
    chosen = ["--preset", args.preset, "--steps", str(args.steps), *data]
    results = {
        "command": ["python", "-m", "benchmarks.curve", *chosen],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": before,
        "machine": machine(torch.device("cpu")),
        "largest_difference": {n: float(f"{d:.2g}") for n, d in differences.items()},
        "losses": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"largest relative differences: {results['largest_difference']}\nresults: {out}")
    return 0 if max(differences.values()) <= _ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
