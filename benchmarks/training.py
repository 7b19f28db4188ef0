"""Training runs whose figures the README shows: `python -m benchmarks.training NAME`.

Each run is one call of `python -m hybridflow.train`, made as a user would make it; its results and its
validation curve are written to benchmarks/results/NAME.json as soon as it ends. Runs already in that file
are not made again.
"""

import argparse
import csv
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hybridflow.data import PLANAR, load_dataset
from hybridflow.evaluate import bridges
from hybridflow.launch import Job, launch, threads_per_run
from hybridflow.run import RunFolder, TrainedRun
from hybridflow.sample import draw_boundary_samples, draw_samples

RESULTS = Path(__file__).parent / "results"
SEEDS = [str(seed) for seed in range(5)]
ROWS = (
    *("full", "supervised", "nll", "nll+adversarial"),
    *("flowgmm", "flowgmm+consistency", "fm-gan"),
)
BEST: dict[str, list[str]] = {
    "best": [],
    "flow: no consistency": ["--terms.w-con-g", "0"],
    "discriminator: no consistency": ["--terms.w-con-d", "0"],
    "teacher: the current weights": ["--terms.teacher", "current"],
    "no shifts": ["--shift", "0"],
    "and label smoothing of 0.1": ["--terms.smoothing", "0.1"],
}
# A light likelihood, beside which the adversarial term has a say, and time to settle.
_BRIDGES = [
    *("--fused", "--preset", "pinwheel", "--steps", "15000", "--optimiser.lr-d", "1e-3"),
    *("--terms.w-nll", "0.1", "--terms.w-adv-g", "0.3"),
]
_BEST = ["--fused", "--preset", "digits-best"]
_POINTS = 300  # of each class, in the picture of 2-D data
EXPERIMENTS: dict[str, list[list[str]]] = {
    "digits-ablation": [
        ["--fused", "--objective", row, "--seed", seed] for row in ROWS for seed in SEEDS
    ],
    "digits-best": [[*_BEST, "--seed", seed] for seed in SEEDS]
    + [
        [*_BEST, "--labels", "50", *row, "--seed", seed]
        for row in BEST.values()
        for seed in (SEEDS[:3] if row else SEEDS)
    ],
    "digits-beta": [
        ["--fused", "--terms.beta", beta, "--seed", seed]
        for beta in ("0.5", "0.625", "0.75", "0.875", "1")
        for seed in SEEDS[:3]
    ],
    "digits-nll": [
        ["--fused", "--terms.w-nll", weight, "--seed", seed]
        for weight in ("0", "0.01", "0.1", "1", "10")
        for seed in SEEDS[:3]
    ],
    "mnist-small": [["--fused", "--preset", "mnist-small", "--seed", seed] for seed in SEEDS[:2]],
    "fashion-mnist-small": [["--fused", "--preset", "fashion-mnist-small", "--steps", "300"]],
    "cifar10-small": [["--fused", "--preset", "cifar10-small", "--precision", "bf16"]],
    "pinwheel-bridges": [
        [*_BRIDGES, "--objective", row, "--seed", seed]
        for row in ("nll", "nll+adversarial")
        for seed in SEEDS[:3]
    ],
    "time-to-accuracy": [
        [*fused, "--steps", "500", "--eval-every", "5", "--seed", str(seed)]
        for seed in range(3)
        for fused in ([], ["--fused"])
    ],
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data-dir", type=Path, help="folder of the data files")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the processors")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    args = parser.parse_args()
    path = args.results / f"{args.name}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    done = [record["arguments"] for record in records]
    others = [" ".join(arguments) for arguments in done if arguments not in EXPERIMENTS[args.name]]
    if others:
        parser.error(
            f"{path} holds runs that are not of this experiment: {'; '.join(others)}; "
            "move it away, or name another folder by --results"
        )
    wanted = [arguments for arguments in EXPERIMENTS[args.name] if arguments not in done]
    data = [] if args.data_dir is None else ["--data-dir", str(args.data_dir.resolve())]
    args.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {}
        for index, arguments in enumerate(wanted):
            folder = Path(scratch) / str(index)
            job = Job((*arguments, *data), RunFolder(folder / "run"), folder / "log.txt")
            jobs[job] = arguments
        with closing(launch(list(jobs), ["auto"] * args.jobs)) as ended:
            for job, status in tqdm(ended, total=len(jobs), unit="run"):
                if status:
                    raise SystemExit(f"{' '.join(job.arguments)}\n{job.log.read_text()[-2000:]}")
                records.append(record_of(job, jobs[job], threads_per_run(args.jobs)))
                records.sort(key=lambda record: EXPERIMENTS[args.name].index(record["arguments"]))
                path.write_text(json.dumps(records, indent=1) + "\n")


def record_of(job: Job, arguments: list[str], threads: int) -> dict[str, Any]:
    """A finished run's arguments, results and validation curve, with the seconds spent in steps alone.

    Of 2-D data also the mass between the arms, and points sampled from each class and between two.
    """
    with job.folder.metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_flow_accuracy"]]
    config = job.folder.read_config()
    images = config.batch_labelled + config.batch_unlabelled
    kept = ("step", "seconds", *(name for name in rows[0] if name.startswith("validation_")))
    record = {
        "arguments": arguments,
        "threads": threads,
        "processor": _processor(),
        "results": json.loads(job.folder.results.read_text()),
        "curve": [
            {name: float(row[name]) for name in kept} | {"step_seconds": _step_seconds(row, images)}
            for row in rows
        ],
    }
    if config.dataset in PLANAR:
        run, dataset = TrainedRun.load(job.folder.path), load_dataset(config.dataset)
        x, _ = draw_samples(run.model, dataset.classes, _POINTS)
        boundary = draw_boundary_samples(run.model, _POINTS * dataset.classes)
        record["bridges"] = bridges(run.model, dataset)
        record["samples"] = [_in_words(of_class) for of_class in x.view(dataset.classes, -1)]
        record["boundary_samples"] = _in_words(boundary)
    return record


def _in_words(points: Tensor) -> str:
    """The coordinates of points in turn."""
    return " ".join(f"{value:.3f}" for value in points.flatten().tolist())


def _step_seconds(row: dict[str, str], images: int) -> float:
    """Seconds spent in steps of so many images: validation, pictures and files left out."""
    return round(float(row["step"]) * images / float(row["images_per_second"]), 4)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
