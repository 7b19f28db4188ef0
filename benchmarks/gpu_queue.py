"""The queue of `gpu.py`: stages, their time, their processes and the results file.

Standard library only, so that it starts on a bare machine: whatever needs torch runs in processes of
its own, each with a time bound.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "CHECKOUT",
    "TAIL",
    "Context",
    "Outcome",
    "Report",
    "Result",
    "Results",
    "Stage",
    "failed",
    "python",
    "run_commands",
    "run_queue",
    "time_bound",
    "waits",
    "worker",
]

CHECKOUT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters of a failed command's output that are kept
Result = dict[str, Any]
Report = Callable[[Result], None]


class Results:
    """The results file, rewritten whole and atomically whenever something becomes known.

    Args:
        path: the file; its folder is made. Stages of earlier calls that it holds stay.
        header: what stands before the stages.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = dict(header)
        self.stages: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if "calls" in header and path.exists():
            self.stages = json.loads(path.read_text())["stages"]
        self._write()

    def record(self, stage: str, result: Result) -> None:
        """Set one stage's result."""
        self.stages[stage] = result
        self._write()

    def status(self, stage: str) -> str | None:
        """How a stage ended; None if it never ran."""
        return self.stages.get(stage, {}).get("status")

    def _write(self) -> None:
        text = json.dumps(self.header | {"stages": self.stages}, indent=1) + "\n"
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, self.path)


@dataclass(frozen=True)
class Context:
    """What every stage needs to know. Paths are absolute.

    Attributes:
        scratch: a folder of this call.
        kept: the folder of the installation, of caches and of runs, which a later call may find.
        out: the results file.
    """

    gpu: Mapping[str, str]
    scratch: Path
    kept: Path
    out: Path
    wheels: Path | None = None
    data_dir: Path | None = None

    @property
    def target(self) -> Path:
        """Where packages are installed."""
        return self.kept / "target"

    @property
    def suites(self) -> Path:
        """Folder of a copy of benchmarks/, importable from there: the checkout's own hybridflow/,
        which has no kernels/ inside, is not beside it."""
        return self.scratch / "suites"

    def rows(self, kind: str) -> Path:
        """The file beside the results for a benchmark's own."""
        return self.out.with_name(f"{self.out.stem}-{kind}.json")

    def environment(self) -> dict[str, str]:
        """Environment of the processes: the target first on the path, what is compiled kept, every
        other cache in scratch, and a cuBLAS that does the same twice."""
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(self.target), str(self.suites), variables.get("PYTHONPATH", "")]
        folders = {
            "CUDA_CACHE_PATH": self.kept / "cuda",
            "MPLCONFIGDIR": self.scratch / "matplotlib",
            "TMPDIR": self.scratch / "tmp",
            "TORCHINDUCTOR_CACHE_DIR": self.kept / "inductor",
            "TRITON_CACHE_DIR": self.kept / "triton",
            "XDG_CACHE_HOME": self.scratch / "cache",
        }
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return (
            variables
            | {name: str(folder) for name, folder in folders.items()}
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
            | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        )


@dataclass(frozen=True)
class Stage:
    """A stage of the queue: the seconds it wants, and what it runs.

    `run(context, seconds, report)` returns the result, a dictionary with "status" and "summary",
    and may report it half done.
    """

    name: str
    wants: float
    run: Callable[[Context, float, Report], Result]


def time_bound(seconds_left: float, wanted: Sequence[float], least: float = 0.0) -> float:
    """Seconds the first of the pending stages may take: its share, or `least` if that is more.

    What it leaves goes to the later ones.
    """
    left = max(0.0, seconds_left)
    return min(left, max(left * wanted[0] / sum(wanted), least))


def waits(stage: Stage, seconds_left: float, seconds: float) -> bool:
    """Whether a stage is better left to a later call: it wants more than is left, and more than half
    of this call is over."""
    return seconds_left < min(stage.wants, seconds / 2)


def run_queue(
    stages: Sequence[Stage],
    context: Context,
    results: Results,
    seconds: float,
    resumable: bool = False,
) -> bool:
    """Run the stages in order within `seconds`; whether every one passed.

    A stage that raises is recorded as failed, and the next one runs. Where a later call can go on,
    a stage gets what it wants or waits; otherwise the stages share the time.
    """
    deadline = time.monotonic() + seconds
    for i, stage in enumerate(stages):
        left = deadline - time.monotonic()
        if resumable and waits(stage, left, seconds):
            print(f"{stage.name}: left to a later call", flush=True)
            continue
        least = stage.wants if resumable else 0.0
        _run_stage(stage, context, results, time_bound(left, [s.wants for s in stages[i:]], least))
    return all(results.status(stage.name) == "passed" for stage in stages)


def _run_stage(stage: Stage, context: Context, results: Results, bound: float) -> None:
    started = time.monotonic()
    call = {"call": len(results.header["calls"])} if "calls" in results.header else {}

    def report(result: Result) -> None:
        times = {"seconds": round(time.monotonic() - started, 1), "bound": round(bound, 1)}
        results.record(stage.name, {"status": "running"} | result | times | call)

    report({})
    try:
        result = stage.run(context, bound, report)
    except Exception as error:
        failure = failed(f"{type(error).__name__}: {error}", traceback.format_exc())
        result = results.stages[stage.name] | failure
    report(result)
    print(f"{stage.name}: {result['status']}: {result.get('summary', '')}", flush=True)


def failed(summary: str, output: str = "") -> Result:
    """The end of a result that is a failure."""
    return {"status": "failed", "summary": summary, "output": output[-TAIL:]}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status (None: out of time) and output, standard error included."""

    status: int | None
    output: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The results a worker has printed: the lines that are JSON objects."""
        rows = []
        for line in self.output.splitlines():
            if line.startswith("{") and line.endswith("}"):
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows

    def complaint(self, name: str) -> str:
        """What went wrong, in a few words; empty if nothing did."""
        if self.status is None:
            return f"{name} ran out of time"
        return f"{name} ended with exit status {self.status}" if self.status else ""


def run_commands(
    commands: Mapping[str, Sequence[str]],
    context: Context,
    seconds: float,
    progress: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Run named commands side by side in the scratch folder, for `seconds` at most.

    `progress` is given the output so far every two seconds. Whatever still runs at the end, or when
    the queue itself is stopped, is terminated with all its children.
    """
    deadline = time.monotonic() + seconds
    running: dict[str, subprocess.Popen[bytes]] = {}

    def outcomes() -> dict[str, Outcome]:
        texts = {n: _log(context, n).read_text(errors="replace") for n in running}
        return {n: Outcome(p.poll(), texts[n]) for n, p in running.items()}

    try:
        for name, command in commands.items():
            with _log(context, name).open("wb") as log:
                running[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=context.scratch,
                    env=context.environment(),
                    start_new_session=True,
                )
        due = time.monotonic() + 2
        while any(p.poll() is None for p in running.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
            if time.monotonic() > due:
                progress(outcomes())
                due = time.monotonic() + 2
        return outcomes()
    finally:
        _stop(running.values())


def _log(context: Context, name: str) -> Path:
    return context.scratch / f"{name}.log"


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask each process that still runs and its children to end; insist after three seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [p for p in processes if p.poll() is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)


def python(*arguments: str) -> list[str]:
    """This Python without the current or the script's folder on its path: the checkout's own
    hybridflow/ has no kernels/ inside."""
    return [sys.executable, "-P", *arguments]


def worker(name: str, *arguments: str) -> list[str]:
    """A worker of gpu_workers.py."""
    return python("-m", "benchmarks.gpu_workers", name, *arguments)
