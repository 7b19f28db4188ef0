"""Measure how long a training run takes to start: `python -m benchmarks.startup`.

From the command `python -m hybridflow.train` to the end of its first step, in processes of their own: cold,
with every cache empty, and warm, with those that the first start left; plain and fused in turns. Stages are
told apart by the files of the run folder as they appear, and imports by `python -X importtime`.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels import RESULTS, ROOT, commit
from benchmarks.measuring import command, machine
from hybridflow.config import PRESETS
from hybridflow.run import RunFolder

__all__ = ["STAGES", "imports_of", "main", "start"]

STAGES = ("imports, data, networks", "initialisation", "first step")
_WARM = 5  # starts
_LOOK = 0.002  # seconds between two looks at the run folder
_VARIANTS: dict[str, list[str]] = {"plain": [], "fused": ["--fused"]}
_CACHES = (
    "PYTHONPYCACHEPREFIX",
    "XDG_CACHE_HOME",
    "MPLCONFIGDIR",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
)
_HEAVIEST = 8  # packages that are named
_IMPORT = re.compile(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", re.MULTILINE)


def start(arguments: Sequence[str], caches: Path) -> dict[str, float]:
    """Start a run and stop it after its first step: seconds of each stage.

    Raises:
        RuntimeError: the run ended before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = RunFolder(Path(scratch) / "run")
        command = [sys.executable, "-m", "hybridflow.train", *arguments, "--log-every", "1"]
        environment = os.environ | {name: str(caches / name) for name in _CACHES}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is never kept is never warm
        moments = [time.perf_counter()]
        with (
            (Path(scratch) / "output").open("w+") as output,
            subprocess.Popen(
                [*command, "--out", str(run.path)],
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
            ) as process,
        ):
            try:
                for file in (run.config, run.checkpoint, run.metrics):
                    while not file.exists():
                        if process.poll() is not None:
                            output.seek(0)
                            raise RuntimeError(f"{' '.join(command)}: {output.read()[-2000:]}")
                        time.sleep(_LOOK)
                    moments.append(time.perf_counter())
            finally:
                process.kill()
    passed = (b - a for a, b in itertools.pairwise(moments))
    return dict(zip(STAGES, passed, strict=True))


def _rows(variant: str, starts: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The first start, and the others: least, median and most seconds, and the median of each stage."""
    rows = []
    for kind, some in (("cold", starts[:1]), ("warm", starts[1:])):
        if some:
            totals = sorted(sum(stages.values()) for stages in some)
            seconds = [round(t, 3) for t in (totals[0], median(totals), totals[-1])]
            stages = {name: round(median(s[name] for s in some), 3) for name in STAGES}
            about = {"variant": variant, "start": kind, "starts": len(some)}
            rows.append(about | {"seconds": seconds, "stages": stages})
    return rows


def imports_of(log: str) -> dict[str, float]:
    """Seconds of each top-level package in what `python -X importtime` writes, the longest first.

    A module counts without those that it imports: these count for their own packages.
    """
    seconds: dict[str, float] = {}
    for own, name in _IMPORT.findall(log):
        package = name.split(".")[0]
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _imports() -> dict[str, Any]:
    """Of the module that the command runs: all seconds, and those of the heaviest packages."""
    command = [sys.executable, "-X", "importtime", "-c", "import hybridflow.train"]
    log = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    packages = imports_of(log)
    heaviest = dict(list(packages.items())[:_HEAVIEST])
    return {
        "seconds": round(sum(packages.values()), 3),
        "packages": {name: round(s, 3) for name, s in heaviest.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--preset", choices=PRESETS, default="digits")
    add("--data-dir", type=Path, help="folder of the data files; digits need none")
    add("--warm", type=int, default=_WARM, help="warm starts of each variant")
    add("--out", type=Path, help="results file; default benchmarks/results/startup-<device>.json")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"startup-{args.device}.json"
    data = [] if args.data_dir is None else ["--data-dir", str(args.data_dir.resolve())]
    common = ["--preset", args.preset, "--device", args.device, *data]
    results: dict[str, Any] = {
        "command": command("benchmarks.startup", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(torch.device(args.device)),
        "preset": args.preset,
        "imports": _imports(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    starts: dict[str, list[dict[str, float]]] = {variant: [] for variant in _VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(1 + args.warm):
            for variant, options in _VARIANTS.items():
                found = start([*common, *options], Path(scratch) / variant)
                print(variant, found, flush=True)
                starts[variant].append(found)
            results["rows"] = [
                row for variant in _VARIANTS for row in _rows(variant, starts[variant])
            ]
            out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"results: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
