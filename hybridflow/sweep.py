"""Train a grid of configurations over several seeds: `python -m hybridflow.sweep`."""

import csv
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from hybridflow.checkpoint import atomic_write_text
from hybridflow.cli import command, parse_config, preset, take_option
from hybridflow.config import PRESETS, Config
from hybridflow.data import Dataset, load_dataset, make_split
from hybridflow.errors import InputError
from hybridflow.launch import Job, launch, locked, terminated_as_interrupted, threads_per_run
from hybridflow.run import RunFolder, resolve_device
from hybridflow.sweep_table import (
    seconds_to_target,
    summarise,
    swept_number,
    table_cells,
    table_csv,
)
from hybridflow.tables import markdown_table, text_table
from hybridflow.trainer import Trainer

__all__ = ["SweepRun", "plan"]

_PROGRAM, _TRAIN = "python -m hybridflow.sweep", "python -m hybridflow.train"
_DESCRIPTION = f"""Train every combination of presets, option values and seeds, and tabulate the results.

  python -m hybridflow.sweep --out sweeps/beta --seeds 0 1 2 --set terms.beta=0,0.5,1 -- --fused

Presets: {", ".join(PRESETS)}.

What follows -- goes to every run; see {_TRAIN} --help. The same command continues
a sweep that was stopped: finished runs are not made again, others go on from their checkpoints."""
_OWN = {"preset": "--presets", "seed": "--seeds", "device": "--devices", "out": "--out"}
_HEADS = ("flow", "discriminator")


@dataclass(frozen=True)
class Sweep:
    """A sweep, as the command line describes it."""

    out: Path
    """Folder of the sweep: its runs, their logs, and the tables sweep.json, sweep.csv, sweep.md; if
    exactly one option takes several numbers, also their curves, sweep.png."""
    presets: tuple[str, ...] = ("digits",)
    """Presets."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; the tables are over them."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of train and its values, NAME=VALUE,VALUE,…; several make a grid. Values of several
    words: 'discriminator.widths=64 64,128 128'."""
    devices: tuple[str, ...] = ("auto",)
    """cpu, or GPUs such as cuda:0 cuda:1, each of which trains one run at a time; auto is one GPU, or
    the CPU where there is none."""
    jobs: int = 1
    """Runs at once on the CPU, which share its processors."""
    target: float = 0.9
    """Report the seconds of training until the validation accuracy first reaches this."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    preset: str
    options: tuple[tuple[str, str], ...]
    """The options that the sweep varies: names and values."""
    seed: int
    arguments: tuple[str, ...]
    """Command line of `python -m hybridflow.train`, but for --device and --out."""
    config: Config = field(repr=False)

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = [self.preset, *(f"{name}={value}" for name, value in self.options)]
        return re.sub(r"[^\w.,=+-]", "_", ",".join([*parts, f"seed={self.seed}"]))

    def job(self, folder: Path) -> Job:
        """The run as a process, in the folder of the sweep."""
        run, log = folder / "runs" / self.name, folder / "logs" / f"{self.name}.txt"
        return Job(self.arguments, RunFolder(run), log)


@command
def main() -> None:
    """Command line."""
    own, common = sys.argv[1:], []
    if "--" in own:
        place = own.index("--")
        own, common = own[:place], own[place + 1 :]
    sweep = tyro.cli(Sweep, args=own, prog=_PROGRAM, description=_DESCRIPTION)
    sys.exit(_run(sweep, common))


def _run(sweep: Sweep, common: list[str]) -> int:
    """Check everything, train what is not finished, tabulate; the exit status."""
    if not 0 < sweep.target <= 1:
        raise InputError(f"--target: got {sweep.target}, want an accuracy in (0, 1]")
    devices = _devices(sweep.devices, sweep.jobs)
    runs = plan(sweep.presets, sweep.seeds, sweep.set, common)
    _check(runs, devices)
    with locked(sweep.out) as lock, terminated_as_interrupted():
        for run in runs:
            _check_unchanged(run, sweep.out)
        by_job = {run.job(sweep.out): run for run in runs}
        unfinished = [job for job in by_job if not job.finished]
        failures: dict[str, str] = {}
        bar = tqdm(total=len(runs), initial=len(runs) - len(unfinished), unit="run")
        try:
            with bar, closing(launch(unfinished, devices, keep=(lock,))) as ended:
                for job, status in ended:
                    name = by_job[job].name
                    if status:
                        failures[name] = job.last_words()
                    bar.write(f"{name}: {failures.get(name, 'finished')}", file=sys.stderr)
                    bar.update(not status)
                    _report(sweep, runs, devices, failures)
        except KeyboardInterrupt:
            _report(sweep, runs, devices, failures)
            done = sum(job.finished for job in by_job)
            print(f"stopped: {done} of {len(runs)} runs are finished; the same command continues")
            return 130
        print(_report(sweep, runs, devices, failures))
    return 1 if failures else 0


def plan(
    presets: Iterable[str], seeds: Iterable[int], settings: Iterable[str], common: Sequence[str]
) -> list[SweepRun]:
    """Every combination of presets, option values and seeds, the seeds varying fastest.

    Args:
        presets: names of presets.
        seeds: seeds.
        settings: "NAME=VALUE,VALUE,…", the name being an option of `python -m hybridflow.train`.
        common: arguments of every run; a setting of the same option prevails.

    Raises:
        InputError: an unknown preset or option, a value out of range, or a run that repeats.
    """
    own = [flag for flag in _OWN if take_option(list(common), f"--{flag}")[0] is not None]
    if own:
        raise InputError(f"--{own[0]}: the sweep sets it; want {_OWN[own[0]]} before the --")
    if "--resume" in common:
        raise InputError("--resume: the same sweep command continues the runs by itself")
    grid = [_setting(text) for text in settings]
    names = [name for name, _ in grid]
    if len(set(names)) < len(names):
        raise InputError(
            f"--set: got {', '.join(names)}, want each option once, its values together"
        )
    runs, seen = [], dict[Config, str]()
    combinations = itertools.product(*(values for _, values in grid))
    for name, values, seed in itertools.product(presets, list(combinations), seeds):
        options = tuple(zip(names, values, strict=True))
        changed = [word for option in options for word in _as_arguments(*option)]
        arguments = ["--preset", name, *common, *changed, "--seed", str(seed)]
        defaults, rest = preset(arguments)
        config = parse_config(defaults, rest, _TRAIN, "")
        run = SweepRun(name, options, seed, tuple(arguments), config)
        if config in seen:
            raise InputError(f"--presets, --seeds, --set: {run.name} repeats {seen[config]}")
        seen[config] = run.name
        runs.append(run)
    if not runs:
        raise InputError("--presets, --seeds: got none, want at least one of each")
    if len({run.name for run in runs}) < len(runs):
        raise InputError("--set: two values differ only in signs that no folder's name can hold")
    return runs


def _setting(text: str) -> tuple[str, list[str]]:
    """The name and the values of NAME=VALUE,VALUE,…"""
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    if not equals or not all(value.strip() for value in values.split(",")):
        raise InputError(f"--set: got {text!r}, want NAME=VALUE or NAME=VALUE,VALUE,…")
    if name in _OWN:
        raise InputError(f"--set: got {name}, which the sweep sets by {_OWN[name]}")
    _default(name)
    return name, values.split(",")


def _default(name: str) -> Any:
    """The default of an option such as terms.beta."""
    value: Any = Config()
    for part in name.split("."):
        if not is_dataclass(value) or not hasattr(value, part):
            raise InputError(f"--set: got {name}, want an option of {_TRAIN}")
        value = getattr(value, part)
    if is_dataclass(value):
        raise InputError(f"--set: got {name}, want one of its options: {', '.join(vars(value))}")
    return value


def _as_arguments(name: str, value: str) -> list[str]:
    """An option as it stands on the command line of train."""
    option = name.replace("_", "-")
    if not isinstance(_default(name), bool):
        return [f"--{option}", *shlex.split(value)]
    if value.lower() not in ("true", "false"):
        raise InputError(f"--set: got {name}={value}, want true or false")
    group, _, last = option.rpartition(".")
    return [f"--{option}" if value.lower() == "true" else f"--{group}{'.' * bool(group)}no-{last}"]


def _devices(names: Sequence[str], jobs: int) -> list[str]:
    """The devices that train one run at a time, the CPU once for every job."""
    devices = [resolve_device(name) for name in names]
    found = [f"cuda:{d.index or 0}" if d.type == "cuda" else str(d) for d in devices]
    if not found or len(set(found)) < len(found):
        raise InputError(f"--devices: got {' '.join(names)}, want each device once")
    if jobs < 1 or (jobs > 1 and found != ["cpu"]):
        raise InputError(f"--jobs: got {jobs} for {' '.join(found)}, want 1, or more on cpu alone")
    return found * jobs


def _check(runs: Iterable[SweepRun], devices: Sequence[str]) -> None:
    """Set up each configuration as training would, on the CPU, before any is trained.

    Raises:
        InputError: naming the run.
    """
    datasets: dict[tuple[str, Path | None], Dataset] = {}
    for config, run in {replace(run.config, seed=0): run for run in runs}.items():
        try:
            key = config.dataset, config.data_dir
            dataset = datasets.get(key) or datasets.setdefault(key, load_dataset(*key))
            split = make_split(
                dataset.train_y,
                classes=dataset.classes,
                num_labels=config.labels,
                num_validation=config.validation,
                seed=config.seed,
            )
            fused = config.fused and "cpu" in devices
            here = replace(config, device="cpu", fused=fused)
            Trainer(here, RunFolder(Path(run.name)), dataset, split)
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from None


def _check_unchanged(run: SweepRun, folder: Path) -> None:
    """Check that what is in a run's folder was made with its configuration.

    Raises:
        InputError: naming what differs.
    """
    made = run.job(folder).folder
    if not made.config.exists():
        return
    saved = made.read_config()
    here = replace(run.config, out=saved.out, device=saved.device, data_dir=saved.data_dir)
    differing = [name for name, value in vars(here).items() if value != getattr(saved, name)]
    if differing:
        raise InputError(
            f"{made.path}: was made with other {', '.join(differing)}; want the same, or another --out"
        )


def _record(run: SweepRun, job: Job, target: float, failure: str | None) -> dict[str, Any]:
    """What became of a run, and its results once it is finished."""
    record: dict[str, Any] = {
        "name": run.name,
        "preset": run.preset,
        "options": dict(run.options),
        "seed": run.seed,
        "arguments": list(run.arguments),
        "status": "finished" if job.finished else "failed" if failure else "unfinished",
    }
    if failure:
        record["failure"] = failure
    if job.finished:
        record["results"] = results = json.loads(job.folder.results.read_text())
        with job.folder.metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for head in _HEADS:
            seconds = seconds_to_target(rows, f"validation_{head}_accuracy", target)
            results[f"{head}_seconds_to_target"] = seconds
    return record


def _report(
    sweep: Sweep, runs: Sequence[SweepRun], devices: Sequence[str], failures: dict[str, str]
) -> str:
    """Write sweep.json, sweep.csv, sweep.md and, of a number, sweep.png; the table for the terminal."""
    records = [
        _record(run, run.job(sweep.out), sweep.target, failures.get(run.name)) for run in runs
    ]
    table = summarise(records)
    threads = threads_per_run(len(devices))
    content = {"target": sweep.target, "devices": list(devices), "threads": threads}
    content |= {"table": table, "runs": records}
    atomic_write_text(sweep.out / "sweep.json", json.dumps(content, indent=1) + "\n")
    atomic_write_text(sweep.out / "sweep.csv", table_csv(table))
    cells = table_cells(table, sweep.target)
    where = (
        f"{len(devices)} at once on {', '.join(dict.fromkeys(devices))}, threads of each: {threads}"
    )
    note = (
        f"Test figures at the last step, mean ± standard deviation over the seeds; `to "
        f"{100 * sweep.target:g} %`: seconds until validation accuracy first reached it, of the runs "
        f"that did. {where}."
    )
    atomic_write_text(sweep.out / "sweep.md", f"{markdown_table(*cells)}\n\n{note}\n")
    files = "sweep.json, sweep.csv, sweep.md"
    option = swept_number(table)
    if option and any(row["finished"] for row in table):
        from hybridflow.pictures import sweep_curves  # here, for matplotlib is slow to import

        sweep_curves(table, sweep.out / "sweep.png", option=option)
        files += ", sweep.png"
    failed = "".join(f"\nfailed: {name}: {words}" for name, words in failures.items())
    return f"{text_table(*cells)}\n\n{note}{failed}\n{sweep.out}/{files}"


if __name__ == "__main__":
    main()
