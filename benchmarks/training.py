"""Training runs whose figures the README shows: `python -m benchmarks.training NAME`.

Each run is one call of `python -m hybridflow.train`, made as a user would make it; its results and its
validation curve are written to benchmarks/results/NAME.json as soon as it ends. Runs already in that file
are not made again.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
ROWS = ("full", "supervised", "nll", "nll+adversarial", "flowgmm")
EXPERIMENTS: dict[str, list[list[str]]] = {
    "digits-ablation": [
        ["--fused", "--objective", row, "--seed", str(seed)] for row in ROWS for seed in range(5)
    ],
    "mnist-small": [["--fused", "--preset", "mnist-small", "--minutes", "20"]],
    "fashion-mnist-small": [["--fused", "--preset", "fashion-mnist-small", "--steps", "300"]],
    "cifar10-small": [["--fused", "--preset", "cifar10-small"]],
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
    wanted = [arguments for arguments in EXPERIMENTS[args.name] if arguments not in done]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    data = [] if args.data_dir is None else ["--data-dir", str(args.data_dir.resolve())]
    args.results.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda arguments: train(arguments, data, threads), wanted)
        for record in tqdm(runs, total=len(wanted), unit="run"):
            records.append(record)
            path.write_text(json.dumps(records, indent=1) + "\n")


def train(arguments: list[str], data: list[str], threads: int) -> dict[str, Any]:
    """One run; its arguments, results and validation curve, with the seconds spent in steps alone."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "hybridflow.train", *arguments, *data, "--out", str(run)]
        finished = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
        with (run / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["validation_flow_accuracy"]]
        config = json.loads((run / "config.json").read_text())
        images = config["batch_labelled"] + config["batch_unlabelled"]
        kept = ("step", "seconds", *(name for name in rows[0] if name.startswith("validation_")))
        return {
            "arguments": arguments,
            "threads": threads,
            "processor": _processor(),
            "results": json.loads((run / "results.json").read_text()),
            "curve": [
                {name: float(row[name]) for name in kept}
                | {"step_seconds": _step_seconds(row, images)}
                for row in rows
            ],
        }


def _step_seconds(row: dict[str, str], images: int) -> float:
    """Seconds spent in steps of so many images: validation, pictures and files left out."""
    return round(float(row["step"]) * images / float(row["images_per_second"]), 4)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
