"""The stages of `gpu.py`. Standard library only, as the queue is."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_queue import (
    CHECKOUT,
    TAIL,
    Context,
    Outcome,
    Report,
    Result,
    Stage,
    failed,
    python,
    run_commands,
    worker,
)

__all__ = ["STAGES", "copy_suites", "first_gpu", "git_commit"]

_SHOWN = 20  # failures of a kind that are kept


# --- environment ----------------------------------------------------------------------------------

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


def git_commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None without git."""
    git = ("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40")
    return _output(*git, "--exclude=*")


def environment_stage(context: Context, seconds: float, report: Report) -> Result:
    """The card, the driver, the versions and the commit."""
    cuda = re.search(r"CUDA Version: *([\d.]+)", _output("nvidia-smi") or "")
    return {
        "status": "passed",
        "summary": f"{context.gpu['name']}, driver {context.gpu['driver_version']}",
        "gpu": dict(context.gpu),
        "driver_cuda": cuda and cuda[1],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name, sys.path) for name in _PACKAGES},
        "commit": git_commit(),
    }


# --- install --------------------------------------------------------------------------------------


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
            self.output += outcome.output[-TAIL:]
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
        return result | failed("; ".join(problems), brought.output + optional.output)
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
    commands = {"pip": python(*command, *quiet, *arguments)}
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


def copy_suites(context: Context) -> None:
    """What the processes of the other stages are made of, and pytest's settings."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(CHECKOUT / "benchmarks", context.suites / "benchmarks", ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", context.suites)


# --- kernels --------------------------------------------------------------------------------------


_CHECKED = ("float32", "bfloat16", "float16")


def kernels_stage(context: Context, seconds: float, report: Report) -> Result:
    """The kernels' tests and, beside them, every operation checked in each type."""
    junit = context.scratch / "pytest.xml"
    tests, shares = _processes(len(os.sched_getaffinity(0)))
    xdist = installed_version("pytest-xdist", [str(context.target), *sys.path])
    parallel = ("-n", str(tests)) if xdist else ()
    pytest = python(
        *("-m", "pytest", str(CHECKOUT / "tests" / "kernels"), "-q", "--tb=short", *parallel),
        *("-c", str(CHECKOUT / "pyproject.toml"), "-p", "no:cacheprovider", f"--junitxml={junit}"),
    )
    commands = {"pytest": ["env", "OMP_NUM_THREADS=1", *pytest]} | {
        f"check-{dtype}-{share}": worker("check", dtype, str(share), str(shares))
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
        output = "".join(o.output[-TAIL:] for n, o in outcomes.items() if o.complaint(n))
        return final | failed("; ".join([*problems, summary]), output)
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


# --- graph ---------------------------------------------------------------------------------------

_GRAPHS = ("digits", "MNIST", "CIFAR-10")


def graph_stage(context: Context, seconds: float, report: Report) -> Result:
    """The hybrid step as a CUDA graph: what gpu_graph.py checks, a process for each data set and one
    for whole runs."""
    commands = {f"graph-{data}": worker("graph", data) for data in _GRAPHS}
    commands["graph-run"] = worker("graph-run", str(context.scratch / "graph-run"))

    def rows(outcomes: Mapping[str, Outcome]) -> list[Result]:
        return [row for outcome in outcomes.values() for row in outcome.rows]

    def progress(outcomes: Mapping[str, Outcome]) -> None:
        report({"rows": rows(outcomes)})

    outcomes = run_commands(commands, context, seconds, progress)
    found = rows(outcomes)
    wrong = [row for row in found if not row["passed"]]
    problems = [p for name, outcome in outcomes.items() if (p := outcome.complaint(name))]
    problems += [f"{_kind(row)}: {'; '.join(row['problems'])}" for row in wrong]
    summary = f"{len(found) - len(wrong)} of {len(found)} checks passed"
    if problems or not found:
        output = "".join(o.output[-TAIL:] for n, o in outcomes.items() if o.complaint(n))
        return {"rows": found} | failed("; ".join([summary, *problems]), output)
    return {"rows": found, "status": "passed", "summary": summary}


def _kind(row: Mapping[str, Any]) -> str:
    names = ("data", "precision", "variant", "check")
    return " ".join(row[name] for name in names if name in row)


# --- sanitizer ------------------------------------------------------------------------------------

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
        command = [program, "--tool", tool, *worker("exercise")]
        bound = (deadline - time.monotonic()) / (len(_TOOLS) - i)
        outcome = run_commands({tool: command}, context, bound)[tool]
        finished = any(row.get("exercised") for row in outcome.rows)
        errors[tool] = sanitizer_errors(outcome.output) if finished else None
        output += outcome.output[-TAIL:] if errors[tool] != 0 else ""
        report({"errors": errors})
    counts = (f"{tool} {'no result' if n is None else f'{n} errors'}" for tool, n in errors.items())
    summary = ", ".join(counts)
    if output:
        return {"errors": errors} | failed(summary, output)
    return {"errors": errors, "status": "passed", "summary": summary}


def sanitizer_errors(output: str) -> int | None:
    """The count in compute-sanitizer's last line, race hazards included; None without that line."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return max(int(n) for pair in found for n in pair if n) if found else None


# --- op -------------------------------------------------------------------------------------------

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
        measured = (
            json.loads(context.rows("kernels").read_text())
            if context.rows("kernels").exists()
            else {}
        )
        result |= suites_result(measured)
        report(result)
        problems += result["problems"]
        if not any(result["rows"].values()):
            problems.append(outcome.complaint("the run of the suites") or "no row was measured")
        output += outcome.output[-TAIL:] if problems else ""
    command = {"autotune": worker("autotune")}
    outcome = run_commands(command, context, deadline - time.monotonic())["autotune"]
    result["autotune"] = speedups(outcome.rows)
    problems += [f"max-autotune's rows: {p}" for row in outcome.rows for p in row["problems"]]
    if outcome.status:  # out of time is no fault here
        problems.append(outcome.complaint("max-autotune"))
        output += outcome.output[-TAIL:]
    words = [*suites_summary(result), f"max-autotune: {len(outcome.rows)} rows"]
    summary = "; ".join([*words, *([f"without {', '.join(missing)}"] if missing else [])])
    if problems:
        return result | failed("; ".join([*problems, summary]), output)
    return result | {"status": "passed", "summary": summary}


_MEASURED_WITH = ("pytest-benchmark", "normflows", "nflows", "zuko", "FrEIA")


def _run_suites(context: Context, seconds: float) -> Outcome:
    """`python -m benchmarks.kernels`, which stops in time to write what it has."""
    context.rows("kernels").unlink(missing_ok=True)  # of an earlier run
    command = python(
        *("-m", "benchmarks.kernels", "--device", "cuda"),
        *("--minutes", _closing_minutes(seconds), "--out", str(context.rows("kernels"))),
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


# --- train ----------------------------------------------------------------------------------------

_STEPS, _LOG_EVERY, _COMPARED = 500, 10, 50
_FILES = {
    "mnist": tuple(
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
    "cifar10": (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}

# Over the first steps the two runs differ by rounding only; later ones may drift apart.
_LARGEST_FIRST_DIFFERENCE = 0.02


def train_stage(context: Context, seconds: float, report: Report) -> Result:
    """A short training, unfused and fused from the same seed: speed, accuracies, losses."""
    deadline = time.monotonic() + seconds
    preset = "mnist" if has_data(context.data_dir, "mnist") else "digits"
    result: Result = {"preset": preset, "steps": _STEPS}
    if preset == "digits":
        result["note"] = f"no MNIST files in --data-dir ({context.data_dir}): trained on digits"
    runs = {"unfused": [], "fused": ["--fused"]}
    for i, (name, options) in enumerate(runs.items()):
        folder = context.scratch / f"run-{name}"
        bound = (deadline - time.monotonic()) / (len(runs) - i)
        command = worker(
            *("train", "--preset", preset, "--labels", "100", "--steps", str(_STEPS)),
            *("--device", "cuda", "--seed", "0", "--log-every", str(_LOG_EVERY)),
            *("--minutes", f"{max(0.5 * bound, 1) / 60:.3f}", "--out", str(folder), *options),
            *(("--data-dir", str(context.data_dir)) if preset == "mnist" else ()),
        )
        outcome = run_commands({name: command}, context, bound)[name]
        if problem := outcome.complaint(f"the {name} run"):
            return result | failed(problem, outcome.output)
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
        return result | failed(f"the losses of the two runs differ from the start; {summary}")
    return result | {"status": "passed", "summary": summary}


def has_data(data_dir: Path | None, dataset: str) -> bool:
    """Whether the files of a data set are in the folder or in its folder of that name."""
    if data_dir is None:
        return False
    folders = (data_dir / dataset, data_dir)
    return any(all((folder / name).is_file() for name in _FILES[dataset]) for folder in folders)


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


# --- whole steps ---------------------------------------------------------------------------------

_PRECISIONS = ("bf16", "fp32")
_GRAPHED = "fused + graph"
_AIMS_MS = {"MNIST": 0.85, "SVHN": 4.0, "CIFAR-10": 3.0}


def step_stage(context: Context, seconds: float, report: Report) -> Result:
    """Whole training steps, bf16 and then fp32: a graph of the fused one beside eager and
    torch.compile."""
    deadline = time.monotonic() + seconds
    result: Result = {"steps": []}
    problems, output = [], ""
    for i, precision in enumerate(_PRECISIONS):
        name, table = f"step-{precision}", context.rows(f"step-{precision}")
        table.unlink(missing_ok=True)  # of an earlier call
        bound = (deadline - time.monotonic()) / (len(_PRECISIONS) - i)
        command = python(
            *("-m", "benchmarks.step", "--device", "cuda", "--data", *_AIMS_MS),
            *("--compile", "max-autotune-no-cudagraphs", "default", "--precision", precision),
            *("--minutes", _closing_minutes(bound), "--out", str(table)),
        )
        outcome = run_commands({name: command}, context, bound)[name]
        rows = json.loads(table.read_text())["rows"] if table.exists() else []
        result["steps"] += compared_steps(rows, precision)
        report(result)
        problems += [f"{_step_name(row)}: {p}" for row in rows for p in row["problems"]]
        if outcome.status or not rows:  # out of time is no fault if there are rows
            problems.append(outcome.complaint(name) or f"{name}: no step was measured")
            output += outcome.output[-TAIL:]
    summary = "; ".join(map(_step_words, result["steps"]))
    if problems:
        return result | failed("; ".join([*problems[:_SHOWN], summary]), output)
    return result | {"status": "passed", "summary": summary}


def compared_steps(rows: Sequence[Result], precision: str) -> list[Result]:
    """For each data set the time of the graph of the fused step, the aim, and how many times faster
    it is than eager and than the best compiled step; of right variants only."""
    steps: dict[str, dict[str, Result]] = {}
    for row in rows:
        if not row["problems"]:
            steps.setdefault(row["data"], {})[row["variant"]] = row
    compared = []
    for data, variants in steps.items():
        if _GRAPHED in variants:
            medians = {name: row["us"][1] for name, row in variants.items()}
            us = medians[_GRAPHED]
            baselines = {"eager": medians.get("eager")}
            compiled = [m for name, m in medians.items() if name.startswith("compile")]
            baselines["compile"] = min(compiled, default=None)
            compared.append(
                {"data": data, "precision": precision, "ms": round(us / 1e3, 3)}
                | {"aim_ms": _AIMS_MS.get(data)}
                | {"over": {name: round(m / us, 2) for name, m in baselines.items() if m}}
            )
    return compared


def _step_name(row: Mapping[str, Any]) -> str:
    return f"{row['data']} {row['variant']}"


def _step_words(step: Mapping[str, Any]) -> str:
    over = ", ".join(f"{factor}x over {name}" for name, factor in step["over"].items())
    words = f"{step['data']} {step['precision']} {step['ms']} ms (aim {step['aim_ms']})"
    return f"{words}, {over}" if over else words


def _closing_minutes(seconds: float) -> str:
    """Minutes for a benchmark that stops in time to write what it has."""
    return f"{max(1.0, seconds - _CLOSING) / 60:.3f}"


def scaling_stage(context: Context, seconds: float, report: Report) -> Result:
    """Steps at other batch sizes and widths: `benchmarks.scaling`."""
    return _benchmark("scaling", context, seconds, "--minutes", _closing_minutes(seconds))


def startup_stage(context: Context, seconds: float, report: Report) -> Result:
    """Time from the command to the first steps: `benchmarks.startup`."""
    return _benchmark("startup", context, seconds)


def _benchmark(name: str, context: Context, seconds: float, *options: str) -> Result:
    """A benchmark with a results file of its own; its last line is the summary."""
    table = context.rows(name)
    table.unlink(missing_ok=True)  # of an earlier call
    module = ("-m", f"benchmarks.{name}", "--device", "cuda")
    command = python(*module, *options, "--out", str(table))
    outcome = run_commands({name: command}, context, seconds)[name]
    problem = outcome.complaint(f"benchmarks.{name}")
    if problem or not table.exists():
        return failed(problem or f"benchmarks.{name} wrote no results", outcome.output)
    last = outcome.output.strip().splitlines()[-1:]
    return {"table": table.name, "status": "passed", "summary": "".join(last)[:300]}


# --- training runs over several calls ------------------------------------------------------------

_RUNS = {
    "run-mnist-100": ("mnist", "100", "mnist"),
    "run-mnist-100-best": ("mnist", "100", "mnist-best"),
    "run-cifar10-4000-best": ("cifar10", "4000", "cifar10-best"),
    "run-cifar10-4000": ("cifar10", "4000", "cifar10"),
    "run-svhn-1000-best": ("svhn", "1000", "svhn-best"),
}
"""Folder: data set, labels, preset; longest wanted first."""
_OF_RUN = 45.0  # seconds of a call that a run needs besides its steps: start, test images, pictures


def runs_stage(context: Context, seconds: float, report: Report) -> Result:
    """The recipes on the data sets that are there, each continued from call to call until it is done."""
    deadline = time.monotonic() + seconds
    found = {n: run for n, run in _RUNS.items() if has_data(context.data_dir, run[0])}
    if not found:
        return {"status": "absent", "summary": f"no data files in --data-dir ({context.data_dir})"}
    result: Result = {"runs": {name: run_so_far(context.kept / name) for name in found}}
    for name, (_, labels, preset) in found.items():
        if is_done(result["runs"][name]):
            continue
        left = deadline - time.monotonic()
        if left < _OF_RUN:
            break
        outcome = _continue(context, name, ("--preset", preset, "--labels", labels), left)
        before, result["runs"][name] = result["runs"][name], run_so_far(context.kept / name)
        report(result)
        problem, stuck = outcome.complaint(name), steps_of(result["runs"][name]) <= steps_of(before)
        if problem and (outcome.status or stuck):
            return result | failed(f"{problem}; {_in_words(result['runs'])}", outcome.output)
    done = all(map(is_done, result["runs"].values()))
    status = "passed" if done else "unfinished"
    return result | {"status": status, "summary": _in_words(result["runs"])}


def _continue(context: Context, name: str, recipe: Sequence[str], seconds: float) -> Outcome:
    """Train one run for so long."""
    folder = context.kept / name
    before = run_so_far(folder)
    minutes = (before.get("seconds", 0.0) + max(1.0, seconds - _OF_RUN)) / 60
    if before:
        how: Sequence[str] = ("--resume", str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        how = (*recipe, "--fused", "--precision", "bf16", "--seed", "0", "--out", str(folder))
    options = ("--device", "cuda", "--data-dir", str(context.data_dir))
    command = worker("train", *how, *options, "--minutes", f"{minutes:.3f}")
    return run_commands({name: command}, context, seconds)[name]


def steps_of(run: Result) -> int:
    """Steps that a run has done."""
    return run.get("step", 0)


def is_done(run: Result) -> bool:
    """Whether a run's last step is done."""
    return bool(run) and steps_of(run) >= run["steps"]


def _in_words(runs: Mapping[str, Result]) -> str:
    said = []
    for name, run in runs.items():
        words = [f"{n} {value:.2%}" for n, value in run.items() if n.endswith("accuracy")]
        if run:
            said.append(", ".join([f"{name}: step {run['step']} of {run['steps']}", *words]))
    return "; ".join(said) or "no run got to a checkpoint"


def run_so_far(folder: Path) -> Result:
    """Steps done and wanted, seconds, and the last accuracies of a run; empty before its first
    checkpoint. Those on the test images are of the run's last reported step."""
    if not (folder / "checkpoint.safetensors").exists() or not (folder / "metrics.csv").exists():
        return {}
    steps = json.loads((folder / "config.json").read_text())["steps"]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    latest = {name: float(value) for row in rows for name, value in row.items() if value}
    kept = {n: v for n, v in latest.items() if n == "seconds" or n.startswith("validation_")}
    results = folder / "results.json"
    test = json.loads(results.read_text()) if results.exists() else {}
    judged = {f"test_{n}": v for n, v in test.items() if n.endswith(("accuracy", "dim"))}
    return {"step": int(latest.get("step", 0)), "steps": steps} | kept | judged


# --- couplings with their conditioners ------------------------------------------------------------

_BATCHES = (64, 300, 2048)


def couplings_stage(context: Context, seconds: float, report: Report) -> Result:
    """Couplings of the presets with the conditioner as one op and layer by layer, bf16 and fp32."""
    deadline = time.monotonic() + seconds
    table = context.rows("choices")
    table.unlink(missing_ok=True)  # of an earlier run
    result: Result = {"table": table.name, "faster": {}}
    problems, output, words = [], "", []
    types = ("bfloat16", "float32")
    for i, name in enumerate(types):
        command = python(
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
            output += outcome.output[-TAIL:]
        wins = sum(row["faster"].get("300", 0) >= 1 for row in rows.values())
        words.append(f"{name}: one op faster in {wins} of {len(rows)} couplings of 300 images")
    summary = "; ".join(words)
    if problems:
        return result | failed("; ".join([*problems, summary]), output)
    return result | {"status": "passed", "summary": summary}


def rows_of_type(table: Path, name: str) -> dict[str, Any]:
    """Rows of the table's section for this type, named by the conditioner's sizes."""
    sections = json.loads(table.read_text()) if table.exists() else {}
    rows = [row for key, s in sections.items() if key.endswith(f" {name}") for row in s["rows"]]
    sizes = ("inputs", "hidden", "outputs", "height", "width")
    return {"x".join(str(row[size]) for size in sizes): row for row in rows}


# --- the order -----------------------------------------------------------------------------------

STAGES = (
    Stage("environment", 5, environment_stage),
    Stage("install", 60, install_stage),
    Stage("kernels", 190, kernels_stage),
    Stage("graph", 130, graph_stage),
    Stage("step", 240, step_stage),
    Stage("couplings", 60, couplings_stage),
    Stage("op", 150, op_stage),
    Stage("sanitizer", 70, sanitizer_stage),
    Stage("train", 80, train_stage),
    Stage("scaling", 90, scaling_stage),
    Stage("startup", 60, startup_stage),
    Stage("runs", 100, runs_stage),
)
"""By value; seconds that each wants of a call."""
