"""Everything that needs an NVIDIA GPU, in one command and one results file; see README.md.

The queue is standard library only, so that it starts on a bare machine: whatever needs torch runs
in processes of its own (`--worker`), each with a time bound, after the install stage has made the
checkout importable.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["main"]

CHECKOUT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]
Report = Callable[[Result], None]

_RESERVE = 8.0  # seconds kept back for stopping processes and writing the results
_TAIL = 4000  # characters of a failed command's output that are kept


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
    """What every stage needs to know. Paths are absolute."""

    gpu: Mapping[str, str]
    scratch: Path
    target: Path
    wheels: Path | None = None
    data_dir: Path | None = None

    def environment(self) -> dict[str, str]:
        """Environment of the processes: the target first on the path, every cache in scratch."""
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(self.target), variables.get("PYTHONPATH", "")]
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
    return _python(str(Path(__file__).resolve()), "--worker", name, *arguments)


# --- stage 1: environment -------------------------------------------------------------------------

_GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem"),
    *("clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu"),
)
_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pytest", "tyro", "pooch")


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


def install_stage(context: Context, seconds: float, report: Report) -> Result:
    """Requirements from wheels, theirs included, then the checkout: all into the target."""
    deadline = time.monotonic() + seconds
    path = [str(context.target), *sys.path]
    wheels = [*context.wheels.glob("*.whl")] if context.wheels else []
    offered = {canonical(wheel.name.split("-")[0]) for wheel in wheels}
    installed: list[str] = []
    lacking: list[str] = []
    problems: list[str] = []
    output = ""
    todo = unmet(project_requirements(CHECKOUT / "pyproject.toml"), path)
    while todo:
        here = [name for name in todo if name in offered]
        lacking += [name for name in todo if name not in offered]
        if here:
            outcome = _pip(context, deadline, "--find-links", str(context.wheels), *here)
            if problem := outcome.complaint(f"pip install of {', '.join(here)}"):
                problems.append(problem)
                output += outcome.output[-_TAIL:]
                break
        installed += here
        found = (importlib.metadata.Distribution.discover(name=n, path=path) for n in here)
        needs = [requirement for ds in found for d in ds for requirement in d.requires or ()]
        todo = sorted({*unmet(needs, path)} - {*installed, *lacking})
    if lacking:
        source = f"not in {context.wheels}" if context.wheels else "no --wheels folder was given"
        problems.append(f"packages missing, {source}: {', '.join(sorted({*lacking}))}")
    outcome = _pip(context, deadline, "--no-build-isolation", str(_copy_checkout(context)))
    if problem := outcome.complaint("pip install of the checkout"):
        problems.append(problem)
        output += outcome.output[-_TAIL:]
    native = any(context.target.glob("hybridflow/kernels/native/lib*"))
    result: Result = {"installed": installed, "lacking": lacking, "native_library": native}
    if problems:
        return result | _failed("; ".join(problems), output)
    brought = ", ".join(installed) or "nothing"
    library = "with" if native else "without"
    summary = f"from wheels: {brought}; hybridflow {library} its CPU library"
    return result | {"status": "passed", "summary": summary}


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


# --- stage 3: kernels -----------------------------------------------------------------------------


def kernels_stage(context: Context, seconds: float, report: Report) -> Result:
    """The kernels' tests and, beside them, the op checked in each type."""
    junit = context.scratch / "pytest.xml"
    parallel = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    pytest = _python(
        *("-m", "pytest", str(CHECKOUT / "tests" / "kernels"), "-q", "--tb=short", *parallel),
        *("-c", str(CHECKOUT / "pyproject.toml"), "-p", "no:cacheprovider", f"--junitxml={junit}"),
    )
    commands = {"pytest": pytest} | {f"check-{name}": _worker("check", name) for name in _CHECKED}

    def result(outcomes: Mapping[str, Outcome]) -> Result:
        checks = [row for name in commands if name != "pytest" for row in outcomes[name].rows]
        return {"checks": _condensed(checks), "pytest": _test_counts(junit)}

    outcomes = run_commands(commands, context, seconds, lambda some: report(result(some)))
    final = result(outcomes)
    checks, counts = final["checks"], final["pytest"]
    problems = [p for name, outcome in outcomes.items() if (p := outcome.complaint(name))]
    if checks["passed"] < checks["run"]:
        problems.append(f"{checks['run'] - checks['passed']} checks of the op failed")
    tests = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no report"
    summary = f"op checks: {checks['passed']} of {checks['run']} passed; tests: {tests}"
    if problems:
        output = "".join(o.output[-_TAIL:] for n, o in outcomes.items() if o.complaint(n))
        return final | _failed("; ".join([*problems, summary]), output)
    return final | {"status": "passed", "summary": summary}


def _condensed(checks: Sequence[Result]) -> Result:
    """How many checks ran and passed, the first failed ones, of the others the largest error."""
    failed = [row for row in checks if not row["passed"]]
    largest: dict[str, float] = {}
    for row in checks:
        if row["passed"]:
            largest[row["dtype"]] = max(largest.get(row["dtype"], 0.0), row["error_of_allowed"])
    return {
        "run": len(checks),
        "passed": len(checks) - len(failed),
        "largest_error_of_allowed": largest,
        "failed": failed[:20],
    }


def _test_counts(junit: Path) -> dict[str, int]:
    """Counts of a junit report; empty if there is none."""
    if not junit.exists():
        return {}
    suite = ET.parse(junit).getroot().find("testsuite")
    counts = {} if suite is None else suite.attrib
    return {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}


# --- the op against float64 (in workers) ----------------------------------------------------------

_CHECKED = ("float32", "bfloat16", "float16")
_SHAPES = (
    *((4, 16, 16), (8, 8, 8), (16, 4, 4), (64, 2, 2)),  # MNIST
    *((12, 16, 16), (24, 8, 8), (48, 4, 4), (192, 2, 2)),  # SVHN and CIFAR-10
    (2,),
)
_BATCHES = (300, 37)
_DIRECTIONS = ("forward", "inverse")
_OUTPUTS = ("out", "log_det", "grad_x", "grad_params", "grad_log_scale", "grad_bias", "grad_gain")

# Sums taken in another order than PyTorch's differ by a few roundings of the accumulating type.
_ROUNDINGS = 32

CouplingOp = Callable[..., tuple["Tensor", "Tensor"]]


@dataclass(frozen=True)
class Operands:
    """Operands of the op, and gradients of its two results."""

    x: Tensor
    params: Tensor
    log_scale: Tensor
    bias: Tensor
    gain: Tensor
    log_det: Tensor
    grad: Tensor
    grad_log_det: Tensor

    def trained(self) -> tuple[Tensor, ...]:
        """The operands that gradients are taken of."""
        return self.x, self.params, self.log_scale, self.bias, self.gain

    def double(self) -> Operands:
        """The same values in float64."""
        return Operands(**{name: value.double() for name, value in vars(self).items()})


def random_operands(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Operands:
    """Random operands: x, params and grad of shape (B, C, *spatial), C even, in `dtype`; those per
    channel and per sample float32, or float64 with it."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def random(*size: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=wide, device=device).to(dtype)

    batch, channels = shape[:2]
    return Operands(
        x=random(*shape, dtype=dtype),
        params=random(*shape, dtype=dtype),
        log_scale=0.3 * random(channels),
        bias=0.5 * random(channels),
        gain=1 + 0.3 * random(channels // 2),
        log_det=10 * random(batch),
        grad=random(*shape, dtype=dtype),
        grad_log_det=random(batch),
    )


def op_outputs(op: CouplingOp, operands: Operands, flip: bool) -> dict[str, Tensor]:
    """Both results of `op` and the gradients of its operands, by autograd."""
    import torch

    leaves = [t.detach().requires_grad_() for t in operands.trained()]
    out, log_det = op(*leaves, operands.log_det, flip=flip)
    grads = torch.autograd.grad((out, log_det), leaves, (operands.grad, operands.grad_log_det))
    return dict(zip(_OUTPUTS, (out.detach(), log_det.detach(), *grads), strict=True))


def reference_outputs(direction: str, operands: Operands, flip: bool) -> dict[str, Tensor]:
    """The same by the specification, whose gradients start from the output, as the kernels' do."""
    from hybridflow.kernels.actnorm_coupling import reference

    forward, backward = {
        "forward": (reference.forward, reference.backward),
        "inverse": (reference.inverse, reference.inverse_backward),
    }[direction]
    out, log_det = forward(*operands.trained(), operands.log_det, flip)
    grads = backward(operands.grad, operands.grad_log_det, out, *operands.trained()[1:], flip)
    return dict(zip(_OUTPUTS, (out, log_det, *grads), strict=True))


def error_of_allowed(ours: Tensor, pytorch: Tensor, exact: Tensor) -> float:
    """The error of `ours` over the one allowed: the larger ratio of 2-norms and of maxima.

    Allowed is twice PyTorch's own error in the same type and a few roundings of the accumulating
    type; errors are relative to `exact`, float64. Above 1, or NaN: wrong.
    """
    import torch

    accumulate = torch.promote_types(ours.dtype, torch.float32)
    floor = _ROUNDINGS * torch.finfo(accumulate).eps
    ratios = []
    for order in (2, math.inf):
        size = torch.linalg.vector_norm(exact, order)
        error = torch.linalg.vector_norm(ours.double() - exact, order) / size
        allowed = 2 * torch.linalg.vector_norm(pytorch.double() - exact, order) / size + floor
        ratios.append(float(error / allowed))
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def wrong_outputs(
    ours: Mapping[str, Tensor], direction: str, operands: Operands, flip: bool
) -> tuple[float, list[str]]:
    """The largest `error_of_allowed` among `ours`, and one line for each output that is wrong."""
    pytorch = reference_outputs(direction, operands, flip)
    exact = reference_outputs(direction, operands.double(), flip)
    ratios = {name: error_of_allowed(ours[name], pytorch[name], exact[name]) for name in _OUTPUTS}
    wrong = [f"{name}: error {r:.3g} of the allowed" for name, r in ratios.items() if not r <= 1]
    for name, value in ours.items():
        if (value.shape, value.dtype) != (pytorch[name].shape, pytorch[name].dtype):
            wrong.append(f"{name}: {value.dtype} {tuple(value.shape)}, not as PyTorch's")
    return max(ratios.values()), wrong


def check_op(
    direction: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    flip: bool,
    device: torch.device,
    op: CouplingOp | None = None,
) -> Result:
    """Check the op, or another in its place, with the gradients of all operands.

    Compared with float64 on memory poisoned with NaN, with a second run (bit-equal) and on a GPU
    with the replay of a CUDA graph (bit-equal).

    Args:
        direction: "forward" or "inverse".
        shape: (B, C, *spatial).
    """
    if op is None:
        from hybridflow.kernels import actnorm_coupling, actnorm_coupling_inverse

        op = actnorm_coupling if direction == "forward" else actnorm_coupling_inverse
    operands = random_operands(shape, dtype, device)
    with _poisoned_memory():
        ours = op_outputs(op, operands, flip)
        again = op_outputs(op, operands, flip)
        replayed = _replayed(op, operands, flip) if device.type == "cuda" else ours
    largest, problems = wrong_outputs(ours, direction, operands, flip)
    problems += [f"{n}: differs in a second run" for n in ours if not ours[n].equal(again[n])]
    problems += [f"{n}: differs in a replay" for n in ours if not ours[n].equal(replayed[n])]
    return {
        "direction": direction,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "flip": flip,
        "passed": not problems,
        "error_of_allowed": float(f"{largest:.3g}") if math.isfinite(largest) else str(largest),
        "problems": problems,
    }


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until written, inside a `with` block."""
    import torch

    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def _capture(call: Callable[[], Any], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call after warm-up on a side stream, and what the call returned."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def _replayed(op: CouplingOp, operands: Operands, flip: bool) -> dict[str, Tensor]:
    """`op_outputs` from the replay of a graph, its outputs and operands rewritten after capture."""
    import torch

    # Captured on zeros, replayed on the operands: nothing computed during capture can be left over.
    static = Operands(**{name: torch.zeros_like(value) for name, value in vars(operands).items()})
    graph, outputs = _capture(lambda: op_outputs(op, static, flip))
    for name, value in vars(operands).items():
        getattr(static, name).copy_(value)
    for value in outputs.values():
        value.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return {name: value.clone() for name, value in outputs.items()}


def check_worker(dtype: str) -> None:
    """Check the op in one type at every shape of the presets; print a row for each check."""
    import torch

    device = torch.device("cuda")
    cases = itertools.product(_DIRECTIONS, _BATCHES, _SHAPES, (False, True))
    for direction, batch, shape, flip in cases:
        case = (direction, (batch, *shape), getattr(torch, dtype), flip)
        try:
            row = check_op(*case, device)
        except Exception as error:  # one shape that does not compile hides no other
            row = {"case": str(case), "dtype": dtype, "passed": False, "problems": [_brief(error)]}
        _print_row(row)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _print_row(row: Mapping[str, Any]) -> None:
    print(json.dumps(row), flush=True)


# --- stage 4: sanitizer ---------------------------------------------------------------------------

_TOOLS = ("memcheck", "racecheck")


def sanitizer_stage(context: Context, seconds: float, report: Report) -> Result:
    """compute-sanitizer's errors over every kernel at the smallest shapes."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"status": "absent", "summary": "compute-sanitizer is not on PATH"}
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


def exercise_worker() -> None:
    """Run every kernel forward and backward at the smallest shapes, without looking at results."""
    # Each tensor an allocation of its own: an access past its end is then seen.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    import torch

    from hybridflow.kernels import actnorm_coupling, actnorm_coupling_inverse, actnorm_identity

    device = torch.device("cuda")
    for shape, dtype, flip in itertools.product(
        ((5, 2), (5, 16, 4, 4), (5, 64, 2, 2)), (torch.float32, torch.bfloat16), (False, True)
    ):
        operands = random_operands(shape, dtype, device)
        for op in (actnorm_coupling, actnorm_coupling_inverse):
            op_outputs(op, operands, flip)
        leaves = [t.requires_grad_() for t in (operands.x, operands.log_scale, operands.bias)]
        a = actnorm_identity(*leaves, flip=flip)
        torch.autograd.grad(a, leaves, torch.ones_like(a))
    torch.cuda.synchronize()
    _print_row({"exercised": True})


# --- stage 5: op ----------------------------------------------------------------------------------

_TIMED_SHAPES = ((300, 4, 16, 16), (2048, 4, 16, 16), (300, 12, 16, 16), (2048, 12, 16, 16))
_TIMED_TYPES = ("float32", "bfloat16")
_PASSES = ("forward", "forward+backward")
_VARIANTS = (("fused", "eager", "compile"), ("max-autotune",))  # the second if the time allows
_REPEATS = 40


def op_stage(context: Context, seconds: float, report: Report) -> Result:
    """Times of the op and of its baselines, and the speed-ups of those that are right."""

    def result(outcomes: Mapping[str, Outcome]) -> Result:
        rows = outcomes["op"].rows
        timings = [row for row in rows if "variant" in row]
        device = next((row for row in rows if "copy_gb_s" in row), {})
        return {"device": device, "speedups": speedups(timings), "timings": timings}

    command = _worker("op", f"{0.9 * seconds:.1f}")
    outcome = run_commands({"op": command}, context, seconds, lambda o: report(result(o)))["op"]
    final = result({"op": outcome})
    timings = final["timings"]
    expected = len(_TIMED_SHAPES) * len(_TIMED_TYPES) * len(_PASSES) * len(_VARIANTS[0])
    problems = [outcome.complaint("the measurement")] if outcome.complaint("") else []
    if wrong := sorted({row["variant"] for row in timings if not row["correct"]}):
        problems.append(f"wrong results, so no speed-up: {', '.join(wrong)}")
    if sum(row["variant"] in _VARIANTS[0] for row in timings) < expected:
        problems.append(f"{len(timings)} timings only, want at least {expected}")
    summary = f"{len(timings)} timings; copy {final['device'].get('copy_gb_s', '?')} GB/s"
    if problems:
        return final | _failed("; ".join([*problems, summary]), outcome.output)
    return final | {"status": "passed", "summary": summary}


def speedups(timings: Sequence[Result]) -> list[Result]:
    """How many times faster the fused op is than each baseline, by median, where both are right."""
    kinds = ("shape", "dtype", "pass")
    cases: dict[str, dict[str, Result]] = {}
    for row in timings:
        if row["correct"]:
            cases.setdefault(str([row[k] for k in kinds]), {})[row["variant"]] = row
    compared = []
    for case in cases.values():
        fused = case.pop("fused", None)
        if fused is not None and case:
            over = {name: round(row["us"][1] / fused["us"][1], 2) for name, row in case.items()}
            compared.append({k: fused[k] for k in (*kinds, "us", "of_copy")} | {"over": over})
    return compared


def bytes_moved(shape: Sequence[int], itemsize: int, backward: bool) -> int:
    """Bytes that the op must move: each operand read once, each result written once.

    Forward: x and params in, y out. Backward: grad_y, y and params in, grad_x and grad_params out.
    Per sample, the log-det in and out and its gradient in; per channel, the float32 parameters and
    their gradients.
    """
    batch, channels = shape[:2]
    elements = math.prod(shape)
    parameters = 4 * (2 * channels + channels // 2)
    forward = 3 * elements * itemsize + 4 * 2 * batch + parameters
    if not backward:
        return forward
    return forward + 5 * elements * itemsize + 4 * batch + 2 * parameters


def op_worker(seconds: str) -> None:
    """Print the card's facts and copy rate, then a row for each variant, pass, type and shape."""
    import torch

    deadline = time.monotonic() + float(seconds)
    card = torch.cuda.get_device_properties(0)
    copy_gb_s = _copy_rate()
    _print_row(
        {
            "name": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "copy_gb_s": round(copy_gb_s, 1),
            "after_copy": first_gpu(),
        }
    )
    for variants in _VARIANTS:
        for shape, dtype in itertools.product(_TIMED_SHAPES, _TIMED_TYPES):
            sets = _rotation(shape, getattr(torch, dtype), 3 * card.L2_cache_size)
            for name in variants:
                if time.monotonic() > deadline:
                    return
                case = {"shape": shape, "dtype": dtype, "variant": name}
                try:
                    for row in _timings(name, sets, copy_gb_s):
                        _print_row(case | row)
                except Exception as error:  # a baseline that does not compile hides no other
                    _print_row(case | {"correct": False, "error": _brief(error)})


def _timings(name: str, sets: Sequence[Operands], copy_gb_s: float) -> Iterator[Result]:
    """A row for each pass: whether the variant is right, its times and its rates."""
    import torch

    torch.compiler.reset()
    op = _variant(name)
    wrong = wrong_outputs(op_outputs(op, sets[0], False), "forward", sets[0], False)[1]
    x = sets[0].x
    for passes in _PASSES:
        backward = passes == "forward+backward"
        times = _time(op, sets, backward)
        gb_s = bytes_moved(x.shape, x.element_size(), backward) / times["us"][1] / 1e3
        rates = {"gb_s": round(gb_s, 1), "of_copy": round(gb_s / copy_gb_s, 3)}
        yield {"pass": passes, "correct": not wrong, "wrong": wrong} | times | rates


def _variant(name: str) -> CouplingOp:
    """The op fused, or the reference as PyTorch runs it.

    The graphs that "max-autotune" would make are left to the measurement, which captures every
    variant alike.
    """
    import torch

    from hybridflow.kernels import actnorm_coupling
    from hybridflow.kernels.actnorm_coupling import reference

    if name == "fused":
        return actnorm_coupling
    if name == "eager":
        return reference.forward
    mode = "max-autotune-no-cudagraphs" if name == "max-autotune" else "default"
    return torch.compile(reference.forward, dynamic=False, mode=mode)


def _rotation(shape: Sequence[int], dtype: torch.dtype, size: int) -> list[Operands]:
    """Sets of random operands, four at least, that take more than `size` bytes together."""
    import torch

    one = 3 * math.prod(shape) * dtype.itemsize
    count = max(4, size // one + 1)
    return [random_operands(shape, dtype, torch.device("cuda"), seed) for seed in range(count)]


def _time(op: CouplingOp, sets: Sequence[Operands], backward: bool) -> dict[str, Any]:
    """Microseconds a call: p20, p50, p80 within a CUDA graph, and p50 as launched from Python.

    A graph holds one call or more on each set, whose results all stay, so that neither operands nor
    results are found in the cache.
    """
    import torch

    calls = list(itertools.islice(itertools.cycle(sets), max(16, len(sets))))

    def call() -> list[Any]:
        if backward:
            return [op_outputs(op, operands, False) for operands in calls]
        with torch.no_grad():
            return [op(*o.trained(), o.log_det, flip=False) for o in calls]

    graph, _kept = _capture(call)
    captured = [t / len(calls) for t in _event_times(graph.replay, _REPEATS)]
    launched = [t / len(calls) for t in _event_times(call, 10)]
    return {
        "us": [round(_quantile(captured, q), 3) for q in (0.2, 0.5, 0.8)],
        "launched_us": round(_quantile(launched, 0.5), 3),
    }


def _event_times(call: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds of each of some calls, between two events on the device."""
    import torch

    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in events]


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def _copy_rate() -> float:
    """GB/s of a copy of 1 GiB on the card, bytes read and bytes written."""
    import torch

    source = torch.randn(2**28, device="cuda")
    copy = torch.empty_like(source)
    microseconds = _quantile(_event_times(lambda: copy.copy_(source), 20), 0.5)
    return 2 * source.nbytes / microseconds / 1e3


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


def train_worker(*arguments: str) -> None:
    """`python -m hybridflow.train`, which then also prints its peak GPU memory."""
    import torch

    sys.argv = ["hybridflow.train", *arguments]
    try:
        runpy.run_module("hybridflow.train", run_name="__main__", alter_sys=True)
    finally:
        _print_row({"peak_memory_bytes": torch.cuda.max_memory_allocated()})


# --- the command ----------------------------------------------------------------------------------

STAGES = (
    Stage("environment", 1, environment_stage),
    Stage("install", 10, install_stage),
    Stage("kernels", 28, kernels_stage),
    Stage("sanitizer", 10, sanitizer_stage),
    Stage("op", 30, op_stage),
    Stage("train", 21, train_stage),
)
_WORKERS: dict[str, Callable[..., None]] = {
    "check": check_worker,
    "exercise": exercise_worker,
    "op": op_worker,
    "train": train_worker,
}


def summary_table(results: Results) -> str:
    """Stages, speed-ups and the results file, as text for the end of the output."""
    lines = [f"{'stage':12} {'status':8} {'seconds':>7}  summary"]
    for name, result in results.stages.items():
        what = str(result.get("summary", ""))[:300]
        lines.append(f"{name:12} {result['status']:8} {result['seconds']:7.1f}  {what}")
    compared = results.stages.get("op", {}).get("speedups", [])
    if compared:
        lines += ["", "fused op, p50 in a CUDA graph; times faster than the baselines"]
    for row in compared:
        over = ", ".join(f"{name} {factor}x" for name, factor in row["over"].items())
        case = f"{'x'.join(map(str, row['shape'])):14} {row['dtype']:9} {row['pass']:17}"
        lines.append(f"{case} {row['us'][1]:8.2f} us {row['of_copy']:4.0%} of copy  {over}")
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
    if argv[:1] == ["--worker"]:
        _WORKERS[argv[1]](*argv[2:])
        return 0
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
    results = Results(args.out or default_out(gpu["name"], now), header)
    stages = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    with tempfile.TemporaryDirectory(
        prefix="hybridflow-gpu-", ignore_cleanup_errors=True
    ) as folder:
        scratch = Path(folder)
        target = args.target or scratch / "target"
        context = Context(gpu, scratch, target, args.wheels, args.data_dir)
        try:
            passed = run_queue(stages, context, results, 60 * args.minutes - _RESERVE)
        finally:
            print(f"\n{summary_table(results)}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
