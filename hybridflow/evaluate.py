"""Evaluate a trained run: `python -m hybridflow.evaluate RUN`."""

import json
from pathlib import Path
from typing import Literal

import tyro

from hybridflow.checkpoint import atomic_write_text
from hybridflow.cli import command
from hybridflow.data import load_dataset, load_split
from hybridflow.pictures import confusion_picture
from hybridflow.prediction import predict
from hybridflow.run import RunFolder, TrainedRun

__all__: list[str] = []


@command
def main() -> None:
    """Command line."""
    tyro.cli(_evaluate, prog="python -m hybridflow.evaluate")


def _evaluate(
    run: tyro.conf.Positional[Path],
    part: Literal["test", "validation"] = "test",
    device: str = "auto",
    data_dir: Path | None = None,
) -> None:
    """Evaluate both heads of a trained run and its density, at its newest checkpoint.

    Prints the figures and writes them to evaluation-PART.json in the run folder, with the confusion
    matrices as a picture beside it.

    Args:
        run: The run folder.
        part: Part of the data set: the test images, or the training images held out.
        device: cpu, cuda, cuda:N or auto.
        data_dir: Folder of the data files; by default the one the run was trained from.
    """
    trained = TrainedRun.load(run, device)
    dataset = load_dataset(trained.config.dataset, data_dir or trained.config.data_dir)
    folder = RunFolder(run)
    x, y = dataset.test_x, dataset.test_y
    if part == "validation":
        held_out = load_split(folder.split).validation
        x, y = dataset.train_x[held_out], dataset.train_y[held_out]
    prediction = predict(trained.model, trained.discriminator, x, y, levels=dataset.levels)
    report = {"part": part, "images": len(y), "step": trained.step, **prediction.summary()}
    matrices = prediction.confusion()
    confusion = {name: matrix.tolist() for name, matrix in matrices.items()}
    path = run / f"evaluation-{part}.json"
    atomic_write_text(path, json.dumps({**report, "confusion": confusion}, indent=2) + "\n")
    picture = folder.picture(f"confusion-{part}")
    confusion_picture(matrices, picture, class_names=dataset.class_names)
    for name, value in report.items():
        print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    print(path, picture, sep="\n")


if __name__ == "__main__":
    main()
