"""Everything that needs an NVIDIA GPU, in one command and one results file; see README.md.

The queue is standard library only, so that it starts on a bare machine: whatever needs torch runs
in processes of its own (`gpu_workers.py`, pytest, the suites), each with a time bound, after the
install stage has made the checkout importable.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["main"]

CHECKOUT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]
Report = Callable[[Result], None]

_RESERVE = 8.0  # seconds kept back for stopping processes and writing the results
_TAIL = 4000  # characters of a failed command's output that are kept
_SHOWN = 20  # failures of a kind that are


# --- the results file and the queue ---------------------------------------------------------------


class Results:
    """The results file, rewritten whole and atomically whenever something becomes known.

    Args:
        path: the file; its folder is made.
        header: what stands before the stages.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = dict(header)
        self.stages: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def record(self, stage: str, result: Result) -> None:
        """Set one stage's result."""
        self.stages[stage] = result
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.header | {"stages": self.stages}, indent=1) + "\n"
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, self.path)


@dataclass(frozen=True)
class Context:
    """What every stage needs to know. Paths are absolute; `rows` is where the suites' results go."""

    gpu: Mapping[str, str]
    scratch: Path
    target: Path
    rows: Path
    wheels: Path | None = None
    data_dir: Path | None = None

    @property
    def suites(self) -> Path:
        """Folder of a copy of benchmarks/, importable from there: the checkout's own hybridflow/,
        which has no kernels/ inside, is not beside it."""
        return self.scratch / "suites"

    def environment(self) -> dict[str, str]:
        """Environment of the processes: the target first on the path, every cache in scratch, and
        a cuBLAS that does the same twice."""
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(self.target), str(self.suites), variables.get("PYTHONPATH", "")]
        folders = {
            "CUDA_CACHE_PATH": "cuda",
            "MPLCONFIGDIR": "matplotlib",
            "TMPDIR": "tmp",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "XDG_CACHE_HOME": "cache",
        }
        for folder in folders.values():
            (self.scratch / folder).mkdir(exist_ok=True)
        return (
            variables
            | {name: str(self.scratch / folder) for name, folder in folders.items()}
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
            | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        )


@dataclass(frozen=True)
class Stage:
    """A stage of the queue: its weight in the sharing of the time, and what it runs.

    `run(context, seconds, report)` returns the result, a dictionary with "status" and "summary",
    and may report it half done.
    """

    name: str
    weight: float
    run: Callable[[Context, float, Report], Result]


def time_bound(seconds_left: float, weights: Sequence[float]) -> float:
    """Seconds the first of the pending stages may take; what it leaves goes to the later ones."""
    return max(0.0, seconds_left) * weights[0] / sum(weights)


def run_queue(stages: Sequence[Stage], context: Context, results: Results, seconds: float) -> bool:
    """Run the stages in order within `seconds`; whether every one passed.

    A stage that raises is recorded as failed, and the next one runs.
    """
    deadline = time.monotonic() + seconds
    for i, stage in enumerate(stages):
        bound = time_bound(deadline - time.monotonic(), [s.weight for s in stages[i:]])
        _run_stage(stage, context, results, bound)
    return all(results.stages[stage.name]["status"] == "passed" for stage in stages)


def _run_stage(stage: Stage, context: Context, results: Results, bound: float) -> None:
    started = time.monotonic()

    def report(result: Result) -> None:
        times = {"seconds": round(time.monotonic() - started, 1), "bound": round(bound, 1)}
        results.record(stage.name, {"status": "running"} | result | times)

    report({})
    try:
        result = stage.run(context, bound, report)
    except Exception as error:
        failure = _failed(f"{type(error).__name__}: {error}", traceback.format_exc())
        result = results.stages[stage.name] | failure
    report(result)
    print(f"{stage.name}: {result['status']}: {result.get('summary', '')}", flush=True)


def _failed(summary: str, output: str = "") -> Result:
    return {"status": "failed", "summary": summary, "output": output[-_TAIL:]}


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


def _python(*arguments: str) -> list[str]:
    """This Python without the current or the script's folder on its path: the checkout's own
    hybridflow/ has no kernels/ inside."""
    return [sys.executable, "-P", *arguments]


def _worker(name: str, *arguments: str) -> list[str]:
    return _python("-m", "benchmarks.gpu_workers", name, *arguments)


# --- stage 1: environment -------------------------------------------------------------------------

_GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem"),
    *("clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu"),
)
_OPTIONAL = ("pytest-benchmark", "pytest-xdist", "normflows", "nflows", "zuko", "FrEIA")
_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pytest", "tyro", "pooch", *_OPTIONAL)


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails or takes over 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def first_gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, units included; None without one. Reads only."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader")
    if not text:
        return None
    values = next(csv.reader([text.splitlines()[0]], skipinitialspace=True))
    return dict(zip(_GPU_FIELDS, values, strict=True)) if len(values) == len(_GPU_FIELDS) else None


def environment_stage(context: Context, seconds: float, report: Report) -> Result:
    """The card, the driver, the versions and the commit."""
    cuda = re.search(r"CUDA Version: *([\d.]+)", _output("nvidia-smi") or "")
    git = ("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "status": "passed",
        "summary": f"{context.gpu['name']}, driver {context.gpu['driver_version']}",
        "gpu": dict(context.gpu),
        "driver_cuda": cuda and cuda[1],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name, sys.path) for name in _PACKAGES},
        "commit": _output(*git, "--exclude=*"),
    }


# --- stage 2: install -----------------------------------------------------------------------------


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_version(name: str, path: Sequence[str]) -> str | None:
    """Version of a package installed in one of the folders of `path`, the first found."""
    found = importlib.metadata.Distribution.discover(name=name, path=list(path))
    return next((d.version for d in found), None)


def project_requirements(pyproject: Path) -> list[str]:
    """What the stages need: the project's dependencies, its train extra, pytest and setuptools.

    The other build requirements, CMake and Ninja, may as well be programs; the package installs
    without them.
    """
    content = tomllib.loads(pyproject.read_text())
    project = content["project"]
    extras = project["optional-dependencies"]
    tools = [*extras["test"], *content["build-system"]["requires"]]
    needed = [tool for tool in tools if _name(tool) in ("pytest", "setuptools")]
    return [*project["dependencies"], *extras["train"], *needed]


def _name(requirement: str) -> str:
    return canonical(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])


def unmet(requirements: Iterable[str], path: Sequence[str]) -> list[str]:
    """Names of the requirements that no folder of `path` holds in a version asked for.

    Without the package `packaging`, versions and markers are not looked at, but for optional
    requirements ("extra"), which never count.
    """
    has_packaging = importlib.util.find_spec("packaging") is not None
    names = []
    for requirement in requirements:
        version = installed_version(_name(requirement), path)
        if has_packaging:
            from packaging.requirements import Requirement

            wanted = Requirement(requirement)
            if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
                continue
            met = version is not None and wanted.specifier.contains(version, prereleases=True)
        else:
            met = version is not None or "extra ==" in requirement
        if not met:
            names.append(_name(requirement))
    return names


@dataclass
class Brought:
    """What came from wheels, what is in none of them, and what went wrong."""

    installed: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    output: str = ""

    def add(self, outcome: Outcome, name: str) -> bool:
        """Note what went wrong with a command, if anything did; whether it did."""
        problem = outcome.complaint(name)
        if problem:
            self.problems.append(problem)
            self.output += outcome.output[-_TAIL:]
        return bool(problem)


def install_stage(context: Context, seconds: float, report: Report) -> Result:
    """Requirements from wheels, theirs included, then the checkout: all into the target."""
    deadline = time.monotonic() + seconds
    path = [str(context.target), *sys.path]
    needed = unmet(project_requirements(CHECKOUT / "pyproject.toml"), path)
    brought = _bring(needed, context, deadline)
    if brought.lacking:
        source = f"not in {context.wheels}" if context.wheels else "no --wheels folder was given"
        names = ", ".join(sorted({*brought.lacking}))
        brought.problems.append(f"packages missing, {source}: {names}")
    optional = _bring(unmet(_OPTIONAL, path), context, deadline)
    outcome = _pip(context, deadline, "--no-build-isolation", str(_copy_checkout(context)))
    brought.add(outcome, "pip install of the checkout")
    native = any(context.target.glob("hybridflow/kernels/native/lib*"))
    installed = [*brought.installed, *optional.installed]
    result: Result = {
        "installed": installed,
        "lacking": brought.lacking,
        "optional_lacking": optional.lacking,
        "native_library": native,
    }
    if problems := [*brought.problems, *optional.problems]:
        return result | _failed("; ".join(problems), brought.output + optional.output)
    came = ", ".join(installed) or "nothing"
    library = "with" if native else "without"
    without = f"; without {', '.join(optional.lacking)}" if optional.lacking else ""
    summary = f"from wheels: {came}; hybridflow {library} its CPU library{without}"
    return result | {"status": "passed", "summary": summary}


def _bring(todo: list[str], context: Context, deadline: float) -> Brought:
    """Install packages from the wheels, and what these need."""
    path = [str(context.target), *sys.path]
    wheels = [*context.wheels.glob("*.whl")] if context.wheels else []
    offered = {canonical(wheel.name.split("-")[0]) for wheel in wheels}
    brought = Brought()
    while todo:
        here = [name for name in todo if name in offered]
        brought.lacking += [name for name in todo if name not in offered]
        if here:
            outcome = _pip(context, deadline, "--find-links", str(context.wheels), *here)
            if brought.add(outcome, f"pip install of {', '.join(here)}"):
                break
        brought.installed += here
        found = (importlib.metadata.Distribution.discover(name=n, path=path) for n in here)
        needs = [requirement for ds in found for d in ds for requirement in d.requires or ()]
        todo = sorted({*unmet(needs, path)} - {*brought.installed, *brought.lacking})
    return brought


def _pip(context: Context, deadline: float, *arguments: str) -> Outcome:
    """`pip install` into the target, without network, dependencies or writing elsewhere."""
    quiet = ("--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--upgrade")
    command = ("-m", "pip", "install", "--no-index", "--no-deps", "--target", str(context.target))
    commands = {"pip": _python(*command, *quiet, *arguments)}
    return run_commands(commands, context, deadline - time.monotonic())["pip"]


def _copy_checkout(context: Context) -> Path:
    """A copy of what the package is built from: building writes beside its sources."""
    copy = context.scratch / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("hybridflow", "kernels"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=ignored)
    for file in CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def _copy_suites(context: Context) -> None:
    """What the processes of the other stages are made of, and pytest's settings."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(CHECKOUT / "benchmarks", context.suites / "benchmarks", ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", context.suites)


# --- stage 3: kernels -----------------------------------------------------------------------------


_CHECKED = ("float32", "bfloat16", "float16")


def kernels_stage(context: Context, seconds: float, report: Report) -> Result:
    """The kernels' tests and, beside them, every operation checked in each type."""
    junit = context.scratch / "pytest.xml"
    tests, shares = _processes(len(os.sched_getaffinity(0)))
    xdist = installed_version("pytest-xdist", [str(context.target), *sys.path])
    parallel = ("-n", str(tests)) if xdist else ()
    pytest = _python(
        *("-m", "pytest", str(CHECKOUT / "tests" / "kernels"), "-q", "--tb=short", *parallel),
        *("-c", str(CHECKOUT / "pyproject.toml"), "-p", "no:cacheprovider", f"--junitxml={junit}"),
    )
    commands = {"pytest": ["env", "OMP_NUM_THREADS=1", *pytest]} | {
        f"check-{dtype}-{share}": _worker("check", dtype, str(share), str(shares))
        for dtype in _CHECKED
        for share in range(shares)
    }

    def result(outcomes: Mapping[str, Outcome]) -> Result:
        checks = [row for name in commands if name != "pytest" for row in outcomes[name].rows]
        counts, failures = _tests(junit)
        return {"checks": _condensed(checks), "pytest": counts, "failed_tests": failures}

    outcomes = run_commands(commands, context, seconds, lambda some: report(result(some)))
    final = result(outcomes)
    checks, counts = final["checks"], final["pytest"]
    problems = [p for name, outcome in outcomes.items() if (p := outcome.complaint(name))]
    if checks["passed"] < checks["run"]:
        problems.append(f"{checks['run'] - checks['passed']} checks failed")
    passed = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no report"
    summary = f"checks: {checks['passed']} of {checks['run']} passed; tests: {passed}"
    if problems:
        output = "".join(o.output[-_TAIL:] for n, o in outcomes.items() if o.complaint(n))
        return final | _failed("; ".join([*problems, summary]), output)
    return final | {"status": "passed", "summary": summary}


def _processes(cores: int) -> tuple[int, int]:
    """Processes for the tests, and for the checks of one type: a third of the cores and the rest.
    Nearly all of their time goes to compiling kernels."""
    tests = max(1, cores // 3)
    return tests, max(1, (cores - tests) // len(_CHECKED))


def _condensed(checks: Sequence[Result]) -> Result:
    """How many checks ran and passed, the first failed ones, of the others the largest error."""
    failed = [row for row in checks if not row["passed"]]
    ops: dict[str, int] = {}
    largest: dict[str, float] = {}
    for row in checks:
        if row["passed"]:
            largest[row["dtype"]] = max(largest.get(row["dtype"], 0.0), row["error_of_allowed"])
            ops[row["op"]] = ops.get(row["op"], 0) + 1
    return {
        "run": len(checks),
        "passed": len(checks) - len(failed),
        "passed_by_op": ops,
        "largest_error_of_allowed": largest,
        "failed": _some_of_each(failed),
    }


def _some_of_each(failed: Sequence[Result]) -> list[Result]:
    """A few of each operation's."""
    seen: dict[str, list[Result]] = {}
    for row in failed:
        of_op = seen.setdefault(row["op"], [])
        of_op += [row] if len(of_op) < 3 else []
    return [row for rows in seen.values() for row in rows]


def _tests(junit: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of a junit report, and the first failed tests with their reasons; nothing without it."""
    if not junit.exists():
        return {}, []
    suite = ET.parse(junit).getroot().find("testsuite")
    if suite is None:
        return {}, []
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failures = [
        f"{test.get('name')}: {' '.join((element.get('message') or kind).split())[:300]}"
        for test in suite.iter("testcase")
        for kind in ("failure", "error")
        for element in test.iter(kind)
    ]
    return counts, failures[:_SHOWN]


# --- stage 4: sanitizer ---------------------------------------------------------------------------

_TOOLS = ("memcheck", "racecheck")


def sanitizer_stage(context: Context, seconds: float, report: Report) -> Result:
    """compute-sanitizer's errors over every kernel at the smallest shapes."""
    folders = (os.environ.get("PATH", ""), "/usr/local/cuda/bin")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        return {"status": "absent", "summary": "compute-sanitizer was not found"}
    deadline = time.monotonic() + seconds
    errors: dict[str, int | None] = {}
    output = ""
    for i, tool in enumerate(_TOOLS):
        command = [program, "--tool", tool, *_worker("exercise")]
        bound = (deadline - time.monotonic()) / (len(_TOOLS) - i)
        outcome = run_commands({tool: command}, context, bound)[tool]
        finished = any(row.get("exercised") for row in outcome.rows)
        errors[tool] = sanitizer_errors(outcome.output) if finished else None
        output += outcome.output[-_TAIL:] if errors[tool] != 0 else ""
        report({"errors": errors})
    counts = (f"{tool} {'no result' if n is None else f'{n} errors'}" for tool, n in errors.items())
    summary = ", ".join(counts)
    if output:
        return {"errors": errors} | _failed(summary, output)
    return {"errors": errors, "status": "passed", "summary": summary}


def sanitizer_errors(output: str) -> int | None:
    """The count in compute-sanitizer's last line, race hazards included; None without that line."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return max(int(n) for pair in found for n in pair if n) if found else None


# --- stage 5: op ----------------------------------------------------------------------------------

_CLOSING = 30.0  # seconds that the suites may take to start, and to write what they have
_OF_SUITES = 0.8  # share of the stage's time; the rest is for max-autotune


def op_stage(context: Context, seconds: float, report: Report) -> Result:
    """The benchmark suites, as far as they come, and the coupling beside max-autotune."""
    deadline = time.monotonic() + seconds
    path = [str(context.target), *sys.path]
    missing = [name for name in _MEASURED_WITH if installed_version(name, path) is None]
    result: Result = {"missing": missing}
    problems: list[str] = []
    output = ""
    if "pytest-benchmark" in missing:
        problems.append("pytest-benchmark is missing: the suites did not run")
    else:
        outcome = _run_suites(context, _OF_SUITES * seconds)
        measured = json.loads(context.rows.read_text()) if context.rows.exists() else {}
        result |= suites_result(measured)
        report(result)
        problems += result["problems"]
        if not any(result["rows"].values()):
            problems.append(outcome.complaint("the run of the suites") or "no row was measured")
        output += outcome.output[-_TAIL:] if problems else ""
    command = {"autotune": _worker("autotune")}
    outcome = run_commands(command, context, deadline - time.monotonic())["autotune"]
    result["autotune"] = speedups(outcome.rows)
    problems += [f"max-autotune's rows: {p}" for row in outcome.rows for p in row["problems"]]
    if outcome.status:  # out of time is no fault here
        problems.append(outcome.complaint("max-autotune"))
        output += outcome.output[-_TAIL:]
    words = [*suites_summary(result), f"max-autotune: {len(outcome.rows)} rows"]
    summary = "; ".join([*words, *([f"without {', '.join(missing)}"] if missing else [])])
    if problems:
        return result | _failed("; ".join([*problems, summary]), output)
    return result | {"status": "passed", "summary": summary}


_MEASURED_WITH = ("pytest-benchmark", "normflows", "nflows", "zuko", "FrEIA")


def _run_suites(context: Context, seconds: float) -> Outcome:
    """`python -m benchmarks.kernels`, which stops in time to write what it has."""
    context.rows.unlink(missing_ok=True)  # of an earlier run
    minutes = f"{max(1.0, seconds - _CLOSING) / 60:.3f}"
    command = _python(
        *("-m", "benchmarks.kernels", "--device", "cuda"),
        *("--minutes", minutes, "--out", str(context.rows)),
    )
    return run_commands({"suites": command}, context, seconds)["suites"]


def suites_result(measured: Mapping[str, Any]) -> Result:
    """Of the suites' results file: counts, what is wrong, and how many times faster fused is."""
    rows = {suite: measured.get(suite, []) for suite in ("ops", "models", "memory")}
    every = [row for suite in rows.values() for row in suite]
    peaks = {(row["variant"], row["couplings"]): row["peak_bytes"] for row in rows["memory"]}
    # A failed assertion is a wrong row, which says so itself; a skip is a missing package.
    broken = [
        f"{name}: {reason}"
        for name, reason in measured.get("not_measured", {}).items()
        if not reason.startswith(("skipped", "failure: AssertionError"))
    ]
    wrong = [row for row in every if row["problems"]]
    problems = [f"{len(wrong)} wrong rows"] if wrong else []
    return {
        "rows": {suite: len(found) for suite, found in rows.items()},
        "stopped": measured.get("stopped", False),
        "copy_gb_s": (measured.get("copy") or {}).get("gb_s"),
        "wrong": wrong[:_SHOWN],
        "speedups": speedups([*rows["ops"], *rows["models"]]),
        "peak_of_48_couplings_over_8": {
            variant: round(peak / peaks[variant, 8], 3)
            for (variant, couplings), peak in peaks.items()
            if couplings == 48 and (variant, 8) in peaks
        },
        "problems": [*problems, *broken[:5]],
    }


def suites_summary(result: Result) -> list[str]:
    """Number of rows and middling ratios, in words; nothing if the suites did not run."""
    if "rows" not in result:
        return []
    counts = ", ".join(f"{count} {suite}" for suite, count in result["rows"].items())
    words = [f"rows: {counts}{', then out of time' if result['stopped'] else ''}"]
    captured = [row for row in result["speedups"] if row["launch"] == "graph"]
    for name in ("eager", "compile"):
        ratios = [row["over"][name] for row in captured if name in row["over"]]
        if ratios:
            words.append(f"fused over {name} in graphs: {min(ratios)} to {max(ratios)}, ")
            words[-1] += f"median {median(ratios):.2f}"
    return words


_KINDS = ("op", "library", "note", "shape", "dtype", "direction", "launch")


def speedups(rows: Sequence[Result]) -> list[Result]:
    """How many times faster "fused" is than each other variant, by median, where both are right."""
    cases: dict[str, dict[str, Result]] = {}
    for row in rows:
        if not row["problems"]:
            kind = json.dumps([row.get(k) for k in _KINDS])
            cases.setdefault(kind, {})[row["variant"]] = row
    compared = []
    for case in cases.values():
        fused = case.pop("fused", None)
        if fused and case:
            over = {name: round(row["us"][1] / fused["us"][1], 2) for name, row in case.items()}
            kept = {k: fused[k] for k in (*_KINDS, "us", "of_copy") if k in fused}
            compared.append({"launch": "python"} | kept | {"over": over})
    return compared


# --- stage 6: train -------------------------------------------------------------------------------

_STEPS, _LOG_EVERY, _COMPARED = 500, 10, 50
_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)

# Over the first steps the two runs differ by rounding only; later ones may drift apart.
_LARGEST_FIRST_DIFFERENCE = 0.02


def train_stage(context: Context, seconds: float, report: Report) -> Result:
    """A short training, unfused and fused from the same seed: speed, accuracies, losses."""
    deadline = time.monotonic() + seconds
    preset = "mnist" if has_mnist(context.data_dir) else "digits"
    result: Result = {"preset": preset, "steps": _STEPS}
    if preset == "digits":
        result["note"] = f"no MNIST files in --data-dir ({context.data_dir}): trained on digits"
    runs = {"unfused": [], "fused": ["--fused"]}
    for i, (name, options) in enumerate(runs.items()):
        folder = context.scratch / f"run-{name}"
        bound = (deadline - time.monotonic()) / (len(runs) - i)
        command = _worker(
            *("train", "--preset", preset, "--labels", "100", "--steps", str(_STEPS)),
            *("--device", "cuda", "--seed", "0", "--log-every", str(_LOG_EVERY)),
            *("--minutes", f"{max(0.5 * bound, 1) / 60:.3f}", "--out", str(folder), *options),
            *(("--data-dir", str(context.data_dir)) if preset == "mnist" else ()),
        )
        outcome = run_commands({name: command}, context, bound)[name]
        if problem := outcome.complaint(f"the {name} run"):
            return result | _failed(problem, outcome.output)
        result[name] = read_run(folder) | {k: v for row in outcome.rows for k, v in row.items()}
        report(result)
    differences = {
        loss: relative_difference(result["unfused"][loss], result["fused"][loss])
        for loss in ("loss_d", "loss_g")
    }
    rates = (f"{name} {result[name]['steady_images_per_second']:.0f}" for name in runs)
    summary = f"{preset}: images/s {', '.join(rates)}"
    result["loss_differences"] = differences
    if not all(d["first"] <= _LARGEST_FIRST_DIFFERENCE for d in differences.values()):
        return result | _failed(f"the losses of the two runs differ from the start; {summary}")
    return result | {"status": "passed", "summary": summary}


def has_mnist(data_dir: Path | None) -> bool:
    """Whether the files of MNIST are in the folder or in its mnist/."""
    if data_dir is None:
        return False
    folders = (data_dir / "mnist", data_dir)
    return any(all((folder / name).is_file() for name in _MNIST_FILES) for folder in folders)


def read_run(folder: Path) -> Result:
    """What a run reports of itself, its first logged losses, and its speed once it runs steadily.

    The steady speed is taken between a fifth of the rows of metrics.csv and the last one, on the
    clock: compilation is left out, and waiting for the device is not.
    """
    results = json.loads((folder / "results.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first, last = rows[len(rows) // 5], rows[-1]
    batch = config["batch_labelled"] + config["batch_unlabelled"]
    steps = int(last["step"]) - int(first["step"])
    elapsed = float(last["seconds"]) - float(first["seconds"])
    kept = {k: v for k, v in results.items() if k not in ("versions", "commit", "dataset")}
    return kept | {
        "steady_images_per_second": round(batch * steps / elapsed, 1) if elapsed > 0 else 0.0,
        **{loss: [float(r[loss]) for r in rows[:_COMPARED]] for loss in ("loss_d", "loss_g")},
    }


def relative_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """First, mean and largest difference of two series, relative to the mean size of the first."""
    size = sum(map(abs, a)) / len(a)
    differences = [abs(x - y) / size for x, y in zip(a, b, strict=False)]
    mean = sum(differences) / len(differences)
    named = {"first": differences[0], "mean": mean, "largest": max(differences)}
    return {name: float(f"{value:.3g}") for name, value in named.items()}


# --- couplings with their conditioners ------------------------------------------------------------

_BATCHES = (64, 300, 2048)


def couplings_stage(context: Context, seconds: float, report: Report) -> Result:
    """Couplings of the presets with the conditioner as one op and layer by layer, bf16 and fp32."""
    deadline = time.monotonic() + seconds
    table = context.rows.with_name(f"{context.rows.stem.removesuffix('-kernels')}-choices.json")
    table.unlink(missing_ok=True)  # of an earlier run
    result: Result = {"table": table.name, "faster": {}}
    problems, output, words = [], "", []
    types = ("bfloat16", "float32")
    for i, name in enumerate(types):
        command = _python(
            *("-m", "benchmarks.choices", "--device", "cuda", "--type", name),
            *("--batches", *map(str, _BATCHES), "--out", str(table)),
        )
        bound = (deadline - time.monotonic()) / (len(types) - i)
        outcome = run_commands({f"choices-{name}": command}, context, bound)[f"choices-{name}"]
        rows = rows_of_type(table, name)
        result["faster"][name] = {label: row["faster"] for label, row in rows.items()}
        report(result)
        if outcome.status or not rows:  # out of time is no fault if there are rows
            problems.append(outcome.complaint(name) or f"{name}: no coupling was measured")
            output += outcome.output[-_TAIL:]
        wins = sum(row["faster"].get("300", 0) >= 1 for row in rows.values())
        words.append(f"{name}: one op faster in {wins} of {len(rows)} couplings of 300 images")
    summary = "; ".join(words)
    if problems:
        return result | _failed("; ".join([*problems, summary]), output)
    return result | {"status": "passed", "summary": summary}


def rows_of_type(table: Path, name: str) -> dict[str, Any]:
    """Rows of the table's section for this type, named by the conditioner's sizes."""
    sections = json.loads(table.read_text()) if table.exists() else {}
    rows = [row for key, s in sections.items() if key.endswith(f" {name}") for row in s["rows"]]
    sizes = ("inputs", "hidden", "outputs", "height", "width")
    return {"x".join(str(row[size]) for size in sizes): row for row in rows}


# --- the command ----------------------------------------------------------------------------------

STAGES = (
    Stage("environment", 1, environment_stage),
    Stage("install", 9, install_stage),
    Stage("kernels", 30, kernels_stage),
    Stage("sanitizer", 12, sanitizer_stage),
    Stage("op", 26, op_stage),
    Stage("couplings", 9, couplings_stage),
    Stage("train", 13, train_stage),
)


def summary_table(results: Results) -> str:
    """Stages, speed-ups and the results file, as text for the end of the output."""
    lines = [f"{'stage':12} {'status':8} {'seconds':>7}  summary"]
    for name, result in results.stages.items():
        what = str(result.get("summary", ""))[:300]
        lines.append(f"{name:12} {result['status']:8} {result['seconds']:7.1f}  {what}")
    op = results.stages.get("op", {})
    compared = [*op.get("speedups", []), *op.get("autotune", [])]
    compared = [row for row in compared if row["launch"] == "graph" or "library" in row]
    if compared:
        lines += ["", "fused, p50, operations within CUDA graphs; times faster than other variants"]
    for row in compared:
        over = ", ".join(f"{name} {factor}x" for name, factor in row["over"].items())
        name = " ".join(filter(None, (row.get("op"), row.get("library"), row.get("note"))))
        shape = f"{'x'.join(map(str, row['shape']))} {row.get('dtype', '')}"
        share = f"{row['of_copy']:4.0%} of copy  " if "of_copy" in row else ""
        lines.append(f"{name:40} {shape:21} {row['us'][1]:9.2f} us  {share}{over}")
    return "\n".join([*lines, "", f"results: {results.path}"])


def _folder(value: str) -> Path:
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {value!r}, want an existing folder")
    return path


def _path(value: str) -> Path:
    return Path(value).expanduser().resolve()


def _minutes(value: str) -> float:
    try:
        minutes = float(value)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"got {value!r}, want a positive number")
    return minutes


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="gpu.py", description="Run the checks and measurements that need an NVIDIA GPU."
    )
    add = parser.add_argument
    add("--minutes", type=_minutes, required=True, help="time for all stages together")
    add("--wheels", type=_folder, help="folder of wheels that may be missing on this machine")
    add("--data-dir", type=_folder, help="folder that holds mnist/; without it: the digits preset")
    add("--out", type=_path, help="results file; default benchmarks/results/gpu-<name>-<date>.json")
    add("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    add("--target", type=_path, help="folder to install into; default a temporary one")
    return parser.parse_args(argv)


def default_out(gpu_name: str, date: datetime) -> Path:
    """The results file that is named after the GPU and the day."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return CHECKOUT / "benchmarks" / "results" / f"gpu-{slug}-{date:%Y-%m-%d}.json"


def main(argv: Sequence[str]) -> int:
    """Command line. Status: 0 if every stage passed, 1 if not, 2 for bad arguments or no GPU."""
    args = _arguments(argv)
    gpu = first_gpu()
    if gpu is None:
        print("error: no NVIDIA GPU here: nvidia-smi is missing or lists none", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    now = datetime.now().astimezone()
    header = {
        "command": ["benchmarks/gpu.py", *argv],
        "date": now.isoformat(timespec="seconds"),
        "minutes": args.minutes,
    }
    out = args.out or default_out(gpu["name"], now)
    results = Results(out, header)
    stages = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    with tempfile.TemporaryDirectory(
        prefix="hybridflow-gpu-", ignore_cleanup_errors=True
    ) as folder:
        scratch = Path(folder)
        target = args.target or scratch / "target"
        rows = out.with_name(f"{out.stem}-kernels.json")
        context = Context(gpu, scratch, target, rows, args.wheels, args.data_dir)
        _copy_suites(context)
        try:
            passed = run_queue(stages, context, results, 60 * args.minutes - _RESERVE)
        finally:
            print(f"\n{summary_table(results)}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
