"""The GPU queue, as far as a machine without a GPU can tell."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_checks, gpu_graph, gpu_queue, gpu_stages
from benchmarks.cases import Case
from benchmarks.gpu_queue import (
    Context,
    Outcome,
    Results,
    Stage,
    python,
    run_commands,
    run_queue,
    time_bound,
)
from benchmarks.step import build_step
from benchmarks.workloads import FLOWS
from hybridflow import kernels
from hybridflow.config import FlowConfig
from hybridflow.kernels import native

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
_CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context({"name": "a card"}, scratch, tmp_path / "kept", tmp_path / "r.json")


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--minutes"),
        (["--minutes", "soon"], "want a positive number"),
        (["--minutes", "0"], "want a positive number"),
        (["--minutes", "nan"], "want a positive number"),
        (["--minutes", "1", "--wheels", "no/such/folder"], "want an existing folder"),
        (["--minutes", "1", "--data-dir", "no/such/folder"], "want an existing folder"),
        (["--minutes", "1", "--only", "kernels", "lunch"], "lunch"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_without_a_gpu_one_line_and_status_2_from_the_standard_library_alone(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-I", "-S", str(_SCRIPT), "--minutes", "1", "--out", "r.json"]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no NVIDIA GPU") and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_whole_command_writes_its_file_and_the_table_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend_card(tmp_path, monkeypatch)
    out = tmp_path / "new" / "r.json"
    arguments = ["--minutes", "1", "--only", "environment", "sanitizer", "--out", str(out)]
    assert gpu.main(arguments) == 1  # no compute-sanitizer: not every stage passed
    stages = json.loads(out.read_text())["stages"]
    assert stages["environment"]["gpu"]["memory.total"] == "1024 MiB"
    assert stages["sanitizer"]["status"] == "absent"
    assert capsys.readouterr().out.endswith(f"\nresults: {out}\n")
    assert gpu.main([*arguments[:4], "--out", str(out)]) == 0


def _pretend_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    values = {"name": "A Card 9", "memory.total": "1024 MiB"}
    row = ", ".join(values.get(field, "1") for field in gpu_stages._GPU_FIELDS)
    program.write_text(f"#!/bin/sh\necho '{row}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_stopped_it_leaves_what_is_known_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_card(tmp_path, monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = tmp_path / "r.json"
    stages = ("environment", "train")
    command = [sys.executable, str(_SCRIPT), "--minutes", "1", "--out", str(out), "--only", *stages]
    queue = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not out.exists() or "train" not in json.loads(out.read_text())["stages"]:
        assert queue.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    queue.terminate()
    output, _ = queue.communicate(timeout=20)
    assert queue.returncode == 128 + signal.SIGTERM
    assert output.endswith(f"\nresults: {out}\n")
    found = json.loads(out.read_text())["stages"]
    assert {name: found[name]["status"] for name in stages} == {
        "environment": "passed",
        "train": "running",
    }
    assert not any(tmp_path.glob("hybridflow-gpu-*"))


def _count_runs(monkeypatch: pytest.MonkeyPatch, *statuses: str) -> dict[str, int]:
    """Replace the stages by "environment", "install", "a", which ends as `statuses` say in turn, and
    "b"; counts their runs, in the order of the last."""
    runs: dict[str, int] = {}
    endings = iter(statuses)

    def stage(name: str) -> Stage:
        def run(context: Context, seconds: float, report: Any) -> dict[str, Any]:
            runs[name] = runs.pop(name, 0) + 1
            context.target.mkdir(parents=True, exist_ok=True)
            return {"status": next(endings) if name == "a" else "passed", "summary": ""}

        return Stage(name, 1, run)

    names = ("environment", "install", "a", "b")
    monkeypatch.setattr(gpu, "STAGES", [stage(name) for name in names])
    return runs


def test_a_second_call_goes_on_with_what_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_card(tmp_path, monkeypatch)
    runs = _count_runs(monkeypatch, "failed", "passed")
    state = tmp_path / "state"
    arguments = ["--minutes", "1", "--state", str(state)]
    assert [gpu.main(arguments) for _ in range(3)] == [1, 0, 0]
    assert runs == {"environment": 3, "install": 1, "a": 2, "b": 1}
    found = json.loads((state / "results.json").read_text())
    assert [call["minutes"] for call in found["calls"]] == [1.0, 1.0, 1.0]
    calls = {name: result["call"] for name, result in found["stages"].items()}
    assert calls == {"environment": 3, "install": 1, "a": 2, "b": 1}
    (state / "target").rmdir()
    assert gpu.main(arguments) == 0 and runs["install"] == 2
    assert gpu.main([*arguments, "--only", "a"]) == 1 and runs["a"] == 3  # out of endings: failed


def test_what_failed_runs_after_what_did_not_run_but_for_the_installation(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    _count_runs(monkeypatch)
    results = Results(context.out, {})
    for name in ("environment", "install", "a"):
        results.record(name, {"status": "failed"})
    names = [stage.name for stage in gpu._pending(results, context)]
    assert names == ["environment", "install", "b", "a"]


def test_a_state_of_another_checkout_or_card_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend_card(tmp_path, monkeypatch)
    _count_runs(monkeypatch, "passed")
    state = tmp_path / "state"
    arguments = ["--minutes", "1", "--state", str(state)]
    assert gpu.main(arguments) == 0
    before = (state / "results.json").read_text()
    for name, other in (("sources_digest", lambda: "0f"), ("first_gpu", lambda: {"name": "B"})):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, name, other)
            assert gpu.main(arguments) == 2
    sources, card = capsys.readouterr().err.splitlines()
    assert "sources is 0f" in sources and "gpu is B" in card and "A Card 9" in card
    assert (state / "results.json").read_text() == before


def test_the_digest_follows_what_runs_and_not_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
    for name in ("kernels/a.py", "kernels/lib.so", "benchmarks/results/r.json", "runs/r/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = gpu.sources_digest()
    for name in ("kernels/lib.so", "benchmarks/results/r.json", "runs/r/a.json"):
        (tmp_path / name).write_text("new")
    assert gpu.sources_digest() == before
    (tmp_path / "kernels/a.py").write_text("new")
    assert gpu.sources_digest() != before


def test_results_are_named_after_card_and_day() -> None:
    path = gpu.default_out("NVIDIA H100 80GB HBM3", datetime(2026, 3, 4))
    assert path.parent == _SCRIPT.parent / "results"
    assert path.name == "gpu-nvidia-h100-80gb-hbm3-2026-03-04.json"


# --- the queue ------------------------------------------------------------------------------------


def test_the_minutes_are_shared_by_weight() -> None:
    assert time_bound(100, [1, 3]) == 25
    assert time_bound(75, [3]) == 75
    assert time_bound(-1, [1, 1]) == 0
    assert time_bound(100, [1, 3], least=40) == 40
    assert time_bound(30, [1, 3], least=40) == 30


def test_time_left_over_goes_to_the_later_stages(context: Context, tmp_path: Path) -> None:
    bounds = []

    def run(context: Context, seconds: float, report: Any) -> dict[str, Any]:
        bounds.append(seconds)
        return {"status": "passed"}

    stages = [Stage(name, 1, run) for name in "abc"]
    assert run_queue(stages, context, Results(tmp_path / "r.json", {}), 90)
    assert bounds == pytest.approx([30, 45, 90], abs=1)


def test_where_later_calls_go_on_a_stage_gets_what_it_wants_or_waits(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    bounds: dict[str, float] = {}
    monkeypatch.setattr(gpu_queue, "time", SimpleNamespace(monotonic=lambda: now))

    def stage(name: str, wants: float, takes: float) -> Stage:
        def run(context: Context, seconds: float, report: Any) -> dict[str, Any]:
            nonlocal now
            bounds[name] = seconds
            now += takes
            return {"status": "passed"}

        return Stage(name, wants, run)

    stages = [stage("a", 350, 300), stage("long", 240, 1), stage("b", 60, 60), stage("c", 99, 1)]
    results = Results(tmp_path / "r.json", {})
    assert not run_queue(stages, context, results, 500, resumable=True)
    assert bounds == {"a": 350, "b": pytest.approx(200 * 60 / 159), "c": 140}
    assert run_queue([stage("longest", 999, 1)], context, results, 500, resumable=True)
    assert bounds["longest"] == 500


def test_a_failing_stage_is_recorded_and_the_next_one_runs(
    context: Context, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    seen = []

    def look() -> dict[str, Any]:
        return json.loads(path.read_text())["stages"]

    def fails(context: Context, seconds: float, report: Any) -> dict[str, Any]:
        report({"known": 1})
        seen.append(look())
        raise RuntimeError("no luck")

    def passes(context: Context, seconds: float, report: Any) -> dict[str, Any]:
        seen.append(look())
        return {"status": "passed", "summary": "fine"}

    stages = [Stage("first", 1, fails), Stage("second", 1, passes)]
    assert not run_queue(stages, context, Results(path, {"minutes": 1}), 60)
    assert seen[0]["first"] == {"status": "running", "known": 1, "seconds": 0.0, "bound": 30.0}
    assert seen[1]["first"]["status"] == "failed" and seen[1]["first"]["known"] == 1
    assert "no luck" in seen[1]["first"]["summary"] and "Traceback" in seen[1]["first"]["output"]
    assert look()["second"]["status"] == "passed"
    assert list(tmp_path.glob("r.json*")) == [path]


def test_commands_run_side_by_side_within_their_bound(context: Context) -> None:
    talks = "import json; print('noise'); print(json.dumps({'row': 1})); raise SystemExit(3)"
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    began = time.monotonic()
    commands = {name: python("-c", code) for name, code in (("a", talks), ("b", hangs))}
    outcomes = run_commands(commands, context, 1.5)
    assert time.monotonic() - began < 10
    assert outcomes["a"].status == 3 and outcomes["a"].rows == [{"row": 1}]
    assert outcomes["b"].complaint("b") == "b ran out of time"
    with pytest.raises(ProcessLookupError):
        os.kill(int(outcomes["b"].output), 0)


def test_commands_see_the_target_first_and_write_to_scratch(context: Context) -> None:
    code = "import os, sys; print(sys.path[0], os.environ['TRITON_CACHE_DIR'], os.getcwd())"
    output = run_commands({"a": python("-c", code)}, context, 20)["a"].output
    scratch = context.scratch
    assert output.split() == [str(context.target), str(context.kept / "triton"), str(scratch)]


def test_processes_find_the_suites_and_no_checkout(context: Context) -> None:
    gpu_stages.copy_suites(context)
    code = "import benchmarks.gpu as g; print(g.__file__)"
    output = run_commands({"a": python("-c", code)}, context, 20)["a"].output
    assert Path(output.strip()) == context.suites / "benchmarks" / "gpu.py"
    assert not (context.suites / "hybridflow").exists()


def test_the_table_is_short_and_names_every_stage(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {})
    results.record("environment", {"status": "passed", "seconds": 1.0, "summary": "a card"})
    results.record("kernels", {"status": "failed", "seconds": 2.0, "summary": "x" * 9999})
    case = {"op": "actnorm", "shape": [300, 4, 16, 16], "dtype": "float32", "launch": "graph"}
    compared = [case | {"us": [3.0, 3.1, 3.2], "of_copy": 0.8, "over": {"eager": 9.5}}]
    compared.append(case | {"launch": "python", "us": [9.0, 9.1, 9.2], "over": {"eager": 1.5}})
    model = {"library": "zuko", "shape": [9, 2], "launch": "python", "us": [7.0, 7.0, 7.0]}
    compared.append(model | {"over": {"eager": 2.5}})
    op = {"status": "running", "seconds": 3.0, "speedups": compared}
    results.record("op", op | {"autotune": [compared[0] | {"over": {"max-autotune": 1.1}}]})
    table = gpu.summary_table(results)
    lines = table.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["environment", "passed"],
        ["kernels", "failed"],
        ["op", "running"],
    ]
    assert any("300x4x16x16" in line and "eager 9.5x" in line for line in lines)
    assert any("zuko" in line and "eager 2.5x" in line for line in lines)
    assert "max-autotune 1.1x" in table and "eager 1.5x" not in table
    assert len(table) < 12_000


# --- what is missing ------------------------------------------------------------------------------


def test_missing_and_outdated_requirements_are_found(tmp_path: Path) -> None:
    for name, version in (("here", "1.5"), ("with_Dash", "2.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
    asked = [
        "here>=1",
        "with-dash",
        "absent[extra]>=3; python_version > '3'",
        "here>=2",
        "elsewhere; sys_platform == 'other'",
        "optional; extra == 'test'",
    ]
    assert gpu_stages.unmet(asked, [str(tmp_path)]) == ["absent", "here"]


def test_the_projects_requirements_hold_those_of_training_and_of_the_tests() -> None:
    found = gpu_stages.project_requirements(gpu_stages.CHECKOUT / "pyproject.toml")
    assert {"torch", "tyro", "pytest"} <= {gpu_stages._name(requirement) for requirement in found}


def test_packages_without_wheels_fail_the_installation_by_name(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_stages, "project_requirements", lambda path: ["no-such-package-zz", "numpy"]
    )
    monkeypatch.setattr(gpu_stages, "_copy_checkout", lambda context: context.scratch)
    monkeypatch.setattr(gpu_stages, "_pip", lambda *arguments: Outcome(0, ""))
    result = gpu_stages.install_stage(context, 10, lambda result: None)
    assert result["status"] == "failed" and result["lacking"] == ["no-such-package-zz"]
    assert result["summary"].startswith("packages missing, no --wheels folder")
    assert result["summary"].endswith(": no-such-package-zz")


def test_optional_packages_come_from_wheels_or_are_done_without(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pip(context: Context, deadline: float, *arguments: str) -> Any:
        asked.extend(arguments)
        return Outcome(0, "")

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "offered_here-1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(gpu_stages, "_OPTIONAL", ("offered-here", "nowhere-zz"))
    monkeypatch.setattr(gpu_stages, "project_requirements", lambda path: [])
    monkeypatch.setattr(gpu_stages, "_copy_checkout", lambda context: context.scratch)
    monkeypatch.setattr(gpu_stages, "_pip", pip)
    result = gpu_stages.install_stage(replace(context, wheels=wheels), 10, lambda result: None)
    assert result["status"] == "passed" and "offered-here" in asked
    assert result["installed"] == ["offered-here"] and result["optional_lacking"] == ["nowhere-zz"]
    assert "without nowhere-zz" in result["summary"]


# --- the operations against float64 ---------------------------------------------------------------

_SMALL = {dtype: gpu_checks.small_cases(dtype) for dtype in (torch.float32, torch.bfloat16)}
_Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("dtype", _SMALL, ids=str)
@pytest.mark.parametrize("op", sorted({case.op for case in _SMALL[torch.float32]}))
def test_every_operation_passes_on_the_cpu(op: str, dtype: torch.dtype) -> None:
    cases = [case for case in _SMALL[dtype] if case.op == op]
    assert cases or dtype != torch.float32
    for case in cases:
        result = gpu_checks.check(case, _CPU)
        assert result["passed"], result
        assert 0 <= result["error_of_allowed"] <= 1


def test_the_table_holds_every_public_operation_and_every_form() -> None:
    ops = {name for name in kernels.__all__ if name[0].islower()} - {"fuse", "unfuse"}
    cases = gpu_checks.every_case(torch.float32)
    assert {case.op for case in cases} == ops
    forms = {case.options["form"].scale for case in cases if "form" in case.options}
    assert forms == set(gpu_checks.get_args(gpu_checks.Scale))
    assert len({case.id for case in cases}) == len(cases)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_operation_passes_at_a_preset_shape(dtype: torch.dtype) -> None:
    for case in gpu_checks.preset_cases(dtype, [(8, 8, 8), (2,)]):
        result = gpu_checks.check(case, _CPU)
        assert result["passed"], result


def _first(op: str, dtype: torch.dtype = torch.float32, note: str = "") -> Case:
    return next(c for c in _SMALL[dtype] if c.op == op and note in c.note)


def _changed(case: Case, change: _Change, result: int) -> Callable[..., Any]:
    """The operation, but for one of its results."""

    def call(*given: Any, **named: Any) -> Any:
        results = case.function("eager")(*given, **named)
        if isinstance(results, Tensor):
            return change(results)
        return tuple(change(r) if i == result else r for i, r in enumerate(results))

    return call


def _element(by: float) -> _Change:
    def change(y: Tensor) -> Tensor:
        return y + by * torch.nn.functional.one_hot(torch.tensor(1), y.numel()).view_as(y)

    return change


_CYCLE = itertools.cycle(range(7))
_OPS = (
    "actnorm_coupling",
    "actnorm_coupling_inverse",
    "actnorm_inverse",
    "gmm_log_prob",
    "standard_normal_log_prob",
    "logit_transform",
    "boundary_sample",
    "coupling_chain",
)


@pytest.mark.parametrize("op", _OPS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda y: y * 1.0001, "error"),
        (_element(1.0), "error"),
        (_element(float("nan")), "error"),
        (lambda y: y * (1 + 1e-6 * next(_CYCLE)), "second run"),
        (lambda y: 2 * y - y.detach(), "the gradient of"),
        (lambda y: y + torch.empty_like(y) * 0, "error"),
        (lambda y: y.double(), "float64"),
        (lambda y: y[:1] + 0 * y, "error"),
        (lambda y: y.bfloat16().float(), "error"),
    ],
    ids="scaled element nan irregular gradient unwritten type row digits".split(),
)
def test_a_perturbed_operation_fails(op: str, change: _Change, named: str) -> None:
    case = _first(op)
    result = gpu_checks.check(case, _CPU, _changed(case, change, 0))
    assert not result["passed"]
    assert any(named in problem for problem in result["problems"])


def test_a_wrong_log_det_or_its_type_fails() -> None:
    for op in ("actnorm_coupling", "actnorm", "logit_transform"):
        case = _first(op, torch.bfloat16)
        for change in (lambda v: v + 0.01, lambda v: v * (1 + 1e-4), lambda v: v.bfloat16()):
            result = gpu_checks.check(case, _CPU, _changed(case, change, 1))
            assert any(problem.startswith("log_det: ") for problem in result["problems"])


def test_another_form_than_the_one_asked_for_fails() -> None:
    for case in _SMALL[torch.float32]:
        if "form" in case.options and case.op == "actnorm_coupling" and "exp" not in case.note:
            other = kernels.CouplingForm("exp", factor=1.5)
            function = replace(case, options=case.options | {"form": other}).function("eager")
            assert not gpu_checks.check(case, _CPU, function)["passed"], case.id


def test_an_operation_that_writes_to_its_operands_fails() -> None:
    case = _first("actnorm_coupling")

    def call(x: Tensor, params: Tensor, **others: Any) -> Any:
        results = kernels.actnorm_coupling(x, params, **others)
        params.data.add_(1)  # as a kernel would, unseen by autograd
        return results

    assert any("written to" in p for p in gpu_checks.check(case, _CPU, call)["problems"])


class _Graph:
    """A CUDA graph as far as a CPU has one: a replay writes the results where they were."""

    def __init__(self, call: Callable[[], dict[str, Tensor]]) -> None:
        self.call, self.results = call, call()

    def replay(self) -> None:
        for name, value in self.call().items():
            self.results[name].copy_(value)


def _without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call: Any) -> Any:
        graph = _Graph(call)
        return graph, graph.results

    monkeypatch.setattr(gpu_checks, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_replays_are_of_the_operands_written_after_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_a_card(monkeypatch)
    for case in _SMALL[torch.float32]:
        operands, function = case.operands(0, _CPU), case.function("eager")
        want = gpu_checks.results_of(case, function, operands)
        assert not gpu_checks._differing(want, gpu_checks._replayed(case, function, operands))


def test_what_was_computed_during_capture_is_not_taken_for_a_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _without_a_card(monkeypatch)
    case = _first("actnorm_coupling")
    operands = case.operands(0, _CPU)
    seen: list[Tensor] = []

    def stale(x: Tensor, *, log_scale: Tensor, **others: Any) -> Any:
        seen.append(log_scale.detach().clone())
        of_the_first_call = log_scale - log_scale.detach() + seen[0]
        return case.function("eager")(x, log_scale=of_the_first_call, **others)

    want = gpu_checks.results_of(case, case.function("eager"), operands)
    assert gpu_checks._differing(want, gpu_checks._replayed(case, stale, operands))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@pytest.mark.parametrize("note", ("dequantize_logit", "boundary_sample"))
def test_noise_that_does_not_follow_the_seed_or_repeats_without_one_fails(note: str) -> None:
    case = _first(note, note="seed" if note == "dequantize_logit" else "")

    def other_seed(*given: Any, seed: Tensor | None = None, **named: Any) -> Any:
        return case.function("eager")(*given, seed=None if seed is None else seed + 1, **named)

    def frozen(*given: Any, seed: Tensor | None = None, **named: Any) -> Any:
        return case.function("eager")(
            *given, seed=torch.tensor(7) if seed is None else seed, **named
        )

    problems = gpu_checks.check(case, _CPU, other_seed)["problems"]
    assert any(problem.startswith(f"{case.results[0]}: error") for problem in problems)
    assert gpu_checks.check(case, _CPU, frozen)["problems"] == ["two calls draw the same"]


def test_a_16_bit_result_may_err_twice_as_much_as_pytorch_and_no_more() -> None:
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pytorch = exact.bfloat16()
    error = pytorch.double() - exact
    for factor, wrong in ((1.9, False), (2.1, True)):
        ours = exact + factor * error
        assert (gpu_checks.error_of_allowed(ours, pytorch, exact, exact) > 1) == wrong


def test_where_terms_cancel_the_error_may_be_theirs() -> None:
    """1000 + 1 - 1000 in float32: the rounding of 1000 counts."""
    exact, ours = torch.tensor([1.0]).double(), torch.tensor([1 + 6e-5])
    pytorch, nudged = ours, exact + 6e-5
    assert gpu_checks.error_of_allowed(ours, exact, exact, exact) > 1
    assert gpu_checks.error_of_allowed(ours, exact, exact, nudged) < 1
    assert gpu_checks.error_of_allowed(pytorch, pytorch, exact, exact) < 1


# --- what the other stages make of their output ---------------------------------------------------


def _row(variant: str, median: float, **other: Any) -> dict[str, Any]:
    row = {"op": "actnorm", "note": "", "shape": [2, 4], "dtype": "float32", "launch": "graph"}
    row |= {"variant": variant, "us": [1.0, median, 99.0], "of_copy": 0.5, "problems": []}
    return row | other


def test_no_speed_up_is_given_for_a_wrong_variant() -> None:
    wrong = {"problems": ["y is off"]}
    rows = [_row("fused", 2.0), _row("eager", 7.0), _row("compile", 3.0, **wrong)]
    rows += [_row("fused", 2.0, dtype="bfloat16", **wrong), _row("eager", 9.0, dtype="bfloat16")]
    (only,) = gpu_stages.speedups(rows)
    assert only["dtype"] == "float32" and only["over"] == {"eager": 3.5}


def _measured() -> dict[str, Any]:
    memory = {"couplings": 8, "peak_bytes": 100, "us": [1, 1, 1], "shape": [1], "problems": []}
    model = {"library": "zuko", "shape": [4, 2], "us": [1.0, 2.0, 3.0], "problems": []}
    return {
        "ops": [_row("fused", 2.0), _row("eager", 8.0), _row("compile", 3.0)],
        "models": [model | {"variant": "eager"}, model | {"variant": "fused"}],
        "memory": [
            memory | {"variant": "constant memory"},
            memory | {"variant": "constant memory", "couplings": 48, "peak_bytes": 120},
        ],
        "copy": {"gb_s": 4000.0},
        "not_measured": {"a": "skipped: no zuko", "b": "failure: AssertionError: y is off"},
        "stopped": True,
    }


def test_rows_of_the_suites_are_counted_and_compared() -> None:
    result = gpu_stages.suites_result(_measured())
    assert result["rows"] == {"ops": 3, "models": 2, "memory": 2} and result["problems"] == []
    assert result["peak_of_48_couplings_over_8"] == {"constant memory": 1.2}
    assert [row["over"] for row in result["speedups"]] == [
        {"eager": 4.0, "compile": 1.5},
        {"eager": 1.0},
    ]
    rows, over_eager, over_compile = gpu_stages.suites_summary(result)
    assert rows == "rows: 3 ops, 2 models, 2 memory, then out of time"
    assert "eager" in over_eager and "median 4.00" in over_eager and "1.5 to 1.5" in over_compile


def test_wrong_rows_and_broken_tests_of_the_suites_are_problems() -> None:
    measured = _measured()
    measured["ops"][1]["problems"] = ["y is off"]
    measured["not_measured"]["c"] = "error: RuntimeError: out of memory"
    problems = gpu_stages.suites_result(measured)["problems"]
    assert problems == ["1 wrong rows", "c: error: RuntimeError: out of memory"]
    assert gpu_stages.suites_result({})["rows"] == {"ops": 0, "models": 0, "memory": 0}


@pytest.mark.parametrize("written", (True, False))
def test_the_op_stage_takes_what_the_suites_wrote_and_nothing_older(
    context: Context, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    context.rows("kernels").write_text(json.dumps({"ops": [_row("fused", 1.0)]}))

    def run(commands: dict[str, list[str]], context: Context, seconds: float) -> Any:
        ((name, command),) = commands.items()
        if name == "autotune":
            rows = [_row("fused", 2.0), _row("max-autotune", 3.0)]
            return {name: Outcome(None, "\n".join(map(json.dumps, rows)))}
        assert command[command.index("--out") + 1] == str(context.rows("kernels"))
        assert 60 * float(command[command.index("--minutes") + 1]) < seconds - 20
        if written:
            context.rows("kernels").write_text(json.dumps(_measured()))
        return {name: Outcome(1, "said")}

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    monkeypatch.setattr(
        gpu_stages, "installed_version", lambda name, path: name != "nflows" or None
    )
    result = gpu_stages.op_stage(context, 100, lambda result: None)
    assert result["autotune"][0]["over"] == {"max-autotune": 1.5}
    assert result["status"] == ("passed" if written else "failed")
    assert result["summary"].endswith("without nflows")
    assert written or "the run of the suites ended with exit status 1" in result["summary"]


def test_without_pytest_benchmark_the_op_stage_says_so(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(commands: dict[str, list[str]], context: Context, seconds: float) -> Any:
        asked.extend(commands)
        return {name: Outcome(0, json.dumps(_row("fused", 2.0))) for name in commands}

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    monkeypatch.setattr(gpu_stages, "installed_version", lambda name, path: None)
    result = gpu_stages.op_stage(context, 100, lambda result: None)
    assert asked == ["autotune"] and result["status"] == "failed"
    assert result["summary"].startswith("pytest-benchmark is missing")


@pytest.mark.parametrize("measured", (2, 1, 0))
def test_the_couplings_stage_takes_what_its_tables_say(
    context: Context, monkeypatch: pytest.MonkeyPatch, measured: int
) -> None:
    table = context.rows("choices")
    table.write_text("of an earlier run")
    sizes = {"inputs": 2, "hidden": 8, "outputs": 4, "height": 4, "width": 3}
    asked: list[str] = []

    def run(commands: dict[str, list[str]], context: Context, seconds: float) -> Any:
        ((name, command),) = commands.items()
        asked.append(command[command.index("--type") + 1])
        assert command[command.index("--out") + 1] == str(table)
        sections = json.loads(table.read_text()) if table.exists() else {}
        if len(asked) <= measured:
            row = sizes | {"faster": {"300": 2.0 if asked[-1] == "bfloat16" else 0.5}}
            table.write_text(json.dumps(sections | {f"sm_90 {asked[-1]}": {"rows": [row]}}))
        return {name: Outcome(None, "said")}  # out of time

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    result = gpu_stages.couplings_stage(context, 100, lambda result: None)
    assert asked == ["bfloat16", "float32"]
    assert result["status"] == ("passed" if measured == 2 else "failed")
    want = {"bfloat16": {"300": 2.0}, "float32": {"300": 0.5}}
    for i, name in enumerate(asked):
        assert result["faster"][name] == ({"2x8x4x4x3": want[name]} if i < measured else {})
    if measured == 2:
        assert "bfloat16: one op faster in 1 of 1" in result["summary"]
        assert "float32: one op faster in 0 of 1" in result["summary"]


def _condensed_row(op: str, passed: bool) -> dict[str, Any]:
    return {"op": op, "dtype": "float32", "passed": passed, "error_of_allowed": 0.5}


def test_failed_checks_of_every_operation_are_kept() -> None:
    rows = [_condensed_row("a", i > 9) for i in range(12)] + [_condensed_row("b", False)]
    condensed = gpu_stages._condensed(rows)
    assert (condensed["run"], condensed["passed"]) == (13, 2)
    assert [row["op"] for row in condensed["failed"]] == ["a", "a", "a", "b"]
    assert condensed["passed_by_op"] == {"a": 2}


def test_failed_tests_are_named_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "pytest.xml"
    assert gpu_stages._tests(path) == ({}, [])
    failed = '<testcase name="t"><failure message="off by&#10;one"/></testcase>'
    counts = 'tests="2" failures="1" errors="0" skipped="0"'
    passed = '<testcase name="u"/>'
    path.write_text(f"<testsuites><testsuite {counts}>{failed}{passed}</testsuite></testsuites>")
    assert gpu_stages._tests(path)[0]["failures"] == 1
    assert gpu_stages._tests(path)[1] == ["t: off by one"]


@pytest.mark.parametrize("cores", (1, 2, 8, 16))
def test_processes_do_not_outnumber_the_cores_by_much(cores: int) -> None:
    tests, shares = gpu_stages._processes(cores)
    assert tests >= 1 and shares >= 1 and tests + 3 * shares <= max(cores, 4)


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2),
        ("========= Error: Device not supported", None),
    ],
)
def test_the_sanitizers_errors_are_counted(output: str, errors: int | None) -> None:
    assert gpu_stages.sanitizer_errors(output) == errors


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"flow_accuracy": 0.5, "commit": null}')
    (tmp_path / "config.json").write_text('{"batch_labelled": 100, "batch_unlabelled": 200}')
    rows = [f"{10 * i},{2 + i},{1 / i},{2 / i}" for i in range(1, 6)]
    (tmp_path / "metrics.csv").write_text("step,seconds,loss_d,loss_g\n" + "\n".join(rows) + "\n")
    run = gpu_stages.read_run(tmp_path)
    assert run["flow_accuracy"] == 0.5 and "commit" not in run
    assert run["steady_images_per_second"] == 300 * 30 / 3
    assert run["loss_g"] == [2.0, 1.0, pytest.approx(2 / 3), 0.5, 0.4]


def test_losses_are_compared_relative_to_their_size() -> None:
    difference = gpu_stages.relative_difference([1.0, -3.0], [1.1, -3.0])
    assert difference == {"first": 0.05, "mean": 0.025, "largest": 0.05}


def test_mnist_is_at_hand_only_whole(tmp_path: Path) -> None:
    assert not gpu_stages.has_data(None, "mnist")
    (tmp_path / "mnist").mkdir()
    for name in gpu_stages._FILES["mnist"]:
        assert not gpu_stages.has_data(tmp_path, "mnist")
        (tmp_path / "mnist" / name).touch()
    assert gpu_stages.has_data(tmp_path, "mnist") and gpu_stages.has_data(
        tmp_path / "mnist", "mnist"
    )


# --- the captured step ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_step() -> Any:
    workload = next(w for w in FLOWS if w.data == "digits")
    return build_step(workload, _CPU)


def _first_result(function: Any) -> Any:
    kept: list[Any] = []

    def call() -> Any:
        kept.append(function())
        return kept[0]

    return call


def _other_noise(function: Any) -> Any:
    def call() -> Any:
        torch.rand(1)
        return function()

    return call


def _without_the_last_update(function: Any) -> Any:
    step = function

    def call() -> Any:
        result = step()
        next(step.model.parameters()).data.add_(1e-6)
        return result

    return call


@pytest.mark.parametrize(
    ("capture", "differing"),
    [
        (lambda function: function, None),
        (_first_result, "losses"),
        (_other_noise, "losses"),
        (_without_the_last_update, "model"),
    ],
    ids="equal stale noise weights".split(),
)
def test_captured_steps_are_compared_bit_for_bit(
    digits_step: Any, capture: Any, differing: str | None
) -> None:
    row = gpu_graph.compare(digits_step, capture, steps=2)
    assert row["passed"] == (differing is None)
    if differing is not None:
        assert any(problem.startswith(differing) for problem in row["problems"])
        assert row["of_two_uncaptured_runs"] == {"losses": 0.0, "state": 0.0}
        assert max(row["largest_difference"].values()) > 0


def test_waiting_for_the_device_is_found_and_the_mode_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    assert gpu_graph.waits(wait) == ["called a synchronizing CUDA operation"]
    assert gpu_graph.waits(lambda: None) == []
    assert modes == ["error", "default"] * 2


@pytest.mark.parametrize("refuses", (True, False))
def test_a_step_that_reads_a_loss_has_to_be_refused(
    monkeypatch: pytest.MonkeyPatch, digits_step: Any, refuses: bool
) -> None:
    class Captured:
        def __init__(self, function: Any, device: torch.device) -> None:
            self.function = function

        def __call__(self) -> Any:
            if refuses and (found := gpu_graph.trace(self.function).obstacles):
                raise RuntimeError("; ".join(found))
            return self.function()

    monkeypatch.setattr(gpu_graph, "CapturedStep", Captured)
    monkeypatch.setattr(gpu_graph, "build_step", lambda *arguments, **options: digits_step)
    row = gpu_graph.check_refusal(_CPU)
    assert row["passed"] == refuses
    assert refuses or row["problems"] == ["a step that reads a loss was captured"]


def test_a_resumed_run_is_compared_with_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FlowConfig(scales=2, couplings=1, hidden=4, last_hidden=4)
    config = replace(gpu_graph._RUN, steps=4, eval_every=2, save_every=3, flow=small)
    monkeypatch.setattr(gpu_graph, "_RUN", config)
    row = gpu_graph.check_resumed(tmp_path / "same", "fp32", _CPU)
    assert row["passed"], row
    restore = gpu_graph.Trainer.restore

    def restore_and_draw(trainer: Any) -> None:
        restore(trainer)
        torch.rand(1)

    monkeypatch.setattr(gpu_graph.Trainer, "restore", restore_and_draw)
    assert not gpu_graph.check_resumed(tmp_path / "other", "fp32", _CPU)["passed"]


def _check(check: str, problems: list[str]) -> str:
    row = {"data": "MNIST", "precision": "bf16", "variant": "unfused", "check": check}
    return json.dumps(row | {"passed": not problems, "problems": problems})


@pytest.mark.parametrize("wrong", ([], ["losses: differs"]))
def test_the_graph_stage_passes_if_every_check_does(
    context: Context, monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    def run(commands: dict[str, list[str]], *others: Any) -> Any:
        assert list(commands) == ["graph-digits", "graph-MNIST", "graph-CIFAR-10", "graph-run"]
        outcomes = {name: Outcome(0, _check("trace", [])) for name in commands}
        return outcomes | {"graph-MNIST": Outcome(0, _check("captured", wrong))}

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    result = gpu_stages.graph_stage(context, 100, lambda result: None)
    assert result["status"] == ("failed" if wrong else "passed")
    want = "3 of 4 checks passed; MNIST bf16 unfused captured: losses: differs"
    assert result["summary"] == (want if wrong else "4 of 4 checks passed")


def test_a_graph_stage_without_a_row_or_with_a_broken_worker_fails(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for outcome in (Outcome(0, ""), Outcome(None, _check("trace", []))):
        monkeypatch.setattr(
            gpu_stages, "run_commands", lambda commands, *_, o=outcome: dict.fromkeys(commands, o)
        )
        result = gpu_stages.graph_stage(context, 100, lambda result: None)
        assert result["status"] == "failed"
    assert "graph-run ran out of time" in result["summary"]


# --- whole steps, and a run over several calls ----------------------------------------------------


def _steps(data: str, **ms: float) -> list[dict[str, Any]]:
    names = {"graph": "fused + graph", "default": "compile", "tuned": "compile, max-autotune"}
    return [
        {"data": data, "variant": names.get(name, name), "us": [1.0, 1e3 * value, 9e9]}
        | {"problems": []}
        for name, value in ms.items()
    ]


def test_a_step_is_compared_with_eager_and_with_the_best_compiled_one() -> None:
    rows = _steps("MNIST", eager=20, default=9, tuned=6, fused=5, graph=0.8)
    rows += _steps("SVHN", eager=20, graph=4)
    rows += _steps("CIFAR-10", eager=20, graph=4)
    rows[-1]["problems"] = ["loss_g is off"]
    mnist, svhn = gpu_stages.compared_steps(rows, "bf16")
    assert mnist["ms"] == 0.8 and mnist["aim_ms"] == 0.85
    assert mnist["over"] == {"eager": 25.0, "compile": 7.5}
    assert svhn["over"] == {"eager": 5.0}


@pytest.mark.parametrize("written", (True, False))
def test_the_step_stage_measures_bf16_then_fp32(
    context: Context, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    asked: list[str] = []

    def run(commands: dict[str, list[str]], context: Context, seconds: float) -> Any:
        ((name, command),) = commands.items()
        asked.append(command[command.index("--precision") + 1])
        assert 60 * float(command[command.index("--minutes") + 1]) < seconds - 20
        if written:
            table = Path(command[command.index("--out") + 1])
            table.write_text(json.dumps({"rows": _steps("SVHN", eager=20, graph=4)}))
        return {name: Outcome(None, "said")}  # out of time

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    context.rows("step-bf16").write_text(json.dumps({"rows": _steps("SVHN", graph=1)}))
    result = gpu_stages.step_stage(context, 200, lambda result: None)
    assert asked == ["bf16", "fp32"]
    assert result["status"] == ("passed" if written else "failed")
    if written:
        assert result["summary"].startswith(
            "SVHN bf16 4.0 ms (aim 4.0), 5.0x over eager; SVHN fp32"
        )


@pytest.mark.parametrize("name", ("scaling", "startup"))
def test_a_benchmark_with_a_file_of_its_own_has_to_write_it(
    context: Context, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def run(commands: dict[str, list[str]], context: Context, seconds: float) -> Any:
        (command,) = commands.values()
        assert f"benchmarks.{name}" in command and ("--minutes" in command) == (name == "scaling")
        if writes:
            Path(command[command.index("--out") + 1]).write_text("{}")
        return {name: Outcome(0, "noise\n7 rows\n")}

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    stage = next(stage for stage in gpu_stages.STAGES if stage.name == name)
    for writes in (True, False):
        result = stage.run(context, 100, lambda result: None)
        assert result["status"] == ("passed" if writes else "failed")
        assert result["summary"] == ("7 rows" if writes else f"benchmarks.{name} wrote no results")


def _save_run(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"steps": 900}')
    (folder / "checkpoint.safetensors").touch()
    rows = f"step,seconds,validation_flow_accuracy\n{step - 1},2.5,0.75\n{step},{step / 2},\n"
    (folder / "metrics.csv").write_text(rows)


def test_a_long_run_goes_on_from_call_to_call_until_it_is_done(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = context.kept / "run-mnist-100"
    ends = {"at": 0, "status": 0}
    commands: list[list[str]] = []

    def run(asked: dict[str, list[str]], context: Context, seconds: float) -> Any:
        ((name, command),) = asked.items()
        commands.append(command)
        if ends["at"]:
            _save_run(context.kept / name, ends["at"])
        return {name: Outcome(ends["status"], "said")}

    def minutes() -> float:
        return float(commands[-1][commands[-1].index("--minutes") + 1])

    def stage(seconds: float) -> dict[str, Any]:
        now = time.monotonic()
        monkeypatch.setattr(gpu_stages.time, "monotonic", lambda: now)
        return gpu_stages.runs_stage(context, seconds, lambda result: None)

    monkeypatch.setattr(gpu_stages, "run_commands", run)
    assert stage(105)["status"] == "absent"
    monkeypatch.setattr(gpu_stages, "has_data", lambda folder, dataset: dataset == "mnist")
    folder.mkdir(parents=True)
    (folder / "config.json").touch()  # of a run that was stopped before its first checkpoint
    ends["at"] = 600
    assert stage(40)["status"] == "unfinished" and not commands  # too short for anything
    result = stage(105)
    assert result["status"] == "unfinished" and not (folder / "config.json").read_text() == ""
    assert result["summary"].startswith(
        "run-mnist-100: step 600 of 900, validation_flow_accuracy 75.00%; run-mnist-100-best: step 600"
    )
    assert [c[c.index("--preset") + 1] for c in commands] == ["mnist", "mnist-best"]
    assert commands[0][commands[0].index("--out") + 1] == str(folder) and minutes() == 1
    ends["at"] = 900
    result = stage(105)
    assert result["status"] == "passed" and len(commands) == 4
    assert commands[2][commands[2].index("--resume") + 1] == str(folder) and minutes() == 6
    assert stage(105)["status"] == "passed" and len(commands) == 4  # nothing is left to do
    shutil.rmtree(folder)
    ends |= {"at": 0, "status": 1}
    assert stage(105)["status"] == "failed"
