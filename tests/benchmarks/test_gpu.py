"""The GPU queue, as far as a machine without a GPU can tell."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_checks
from benchmarks.cases import Case
from hybridflow import kernels
from hybridflow.kernels import native

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
_CPU = torch.device("cpu")


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu = _load()


@pytest.fixture
def context(tmp_path: Path) -> Any:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return gpu.Context({"name": "a card"}, scratch, tmp_path / "target", tmp_path / "rows.json")


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
    row = ", ".join(values.get(field, "1") for field in gpu._GPU_FIELDS)
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


def test_results_are_named_after_card_and_day() -> None:
    path = gpu.default_out("NVIDIA H100 80GB HBM3", datetime(2026, 3, 4))
    assert path.parent == _SCRIPT.parent / "results"
    assert path.name == "gpu-nvidia-h100-80gb-hbm3-2026-03-04.json"


# --- the queue ------------------------------------------------------------------------------------


def test_the_minutes_are_shared_by_weight() -> None:
    assert gpu.time_bound(100, [1, 3]) == 25
    assert gpu.time_bound(75, [3]) == 75
    assert gpu.time_bound(-1, [1, 1]) == 0


def test_time_left_over_goes_to_the_later_stages(context: Any, tmp_path: Path) -> None:
    bounds = []

    def run(context: Any, seconds: float, report: Any) -> dict[str, Any]:
        bounds.append(seconds)
        return {"status": "passed"}

    stages = [gpu.Stage(name, 1, run) for name in "abc"]
    assert gpu.run_queue(stages, context, gpu.Results(tmp_path / "r.json", {}), 90)
    assert bounds == pytest.approx([30, 45, 90], abs=1)


def test_a_failing_stage_is_recorded_and_the_next_one_runs(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    seen = []

    def look() -> dict[str, Any]:
        return json.loads(path.read_text())["stages"]

    def fails(context: Any, seconds: float, report: Any) -> dict[str, Any]:
        report({"known": 1})
        seen.append(look())
        raise RuntimeError("no luck")

    def passes(context: Any, seconds: float, report: Any) -> dict[str, Any]:
        seen.append(look())
        return {"status": "passed", "summary": "fine"}

    stages = [gpu.Stage("first", 1, fails), gpu.Stage("second", 1, passes)]
    assert not gpu.run_queue(stages, context, gpu.Results(path, {"minutes": 1}), 60)
    assert seen[0]["first"] == {"status": "running", "known": 1, "seconds": 0.0, "bound": 30.0}
    assert seen[1]["first"]["status"] == "failed" and seen[1]["first"]["known"] == 1
    assert "no luck" in seen[1]["first"]["summary"] and "Traceback" in seen[1]["first"]["output"]
    assert look()["second"]["status"] == "passed"
    assert list(tmp_path.glob("r.json*")) == [path]


def test_commands_run_side_by_side_within_their_bound(context: Any) -> None:
    talks = "import json; print('noise'); print(json.dumps({'row': 1})); raise SystemExit(3)"
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    began = time.monotonic()
    commands = {name: gpu._python("-c", code) for name, code in (("a", talks), ("b", hangs))}
    outcomes = gpu.run_commands(commands, context, 1.5)
    assert time.monotonic() - began < 10
    assert outcomes["a"].status == 3 and outcomes["a"].rows == [{"row": 1}]
    assert outcomes["b"].complaint("b") == "b ran out of time"
    with pytest.raises(ProcessLookupError):
        os.kill(int(outcomes["b"].output), 0)


def test_commands_see_the_target_first_and_write_to_scratch(context: Any) -> None:
    code = "import os, sys; print(sys.path[0], os.environ['TRITON_CACHE_DIR'], os.getcwd())"
    output = gpu.run_commands({"a": gpu._python("-c", code)}, context, 20)["a"].output
    scratch = context.scratch
    assert output.split() == [str(context.target), str(scratch / "triton"), str(scratch)]


def test_processes_find_the_suites_and_no_checkout(context: Any) -> None:
    gpu._copy_suites(context)
    code = "import benchmarks.gpu as g; print(g.__file__)"
    output = gpu.run_commands({"a": gpu._python("-c", code)}, context, 20)["a"].output
    assert Path(output.strip()) == context.suites / "benchmarks" / "gpu.py"
    assert not (context.suites / "hybridflow").exists()


def test_the_table_is_short_and_names_every_stage(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "r.json", {})
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
    assert gpu.unmet(asked, [str(tmp_path)]) == ["absent", "here"]


def test_the_projects_requirements_hold_those_of_training_and_of_the_tests() -> None:
    found = gpu.project_requirements(gpu.CHECKOUT / "pyproject.toml")
    assert {"torch", "tyro", "pytest"} <= {gpu._name(requirement) for requirement in found}


def test_packages_without_wheels_fail_the_installation_by_name(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "project_requirements", lambda path: ["no-such-package-zz", "numpy"])
    monkeypatch.setattr(gpu, "_copy_checkout", lambda context: context.scratch)
    monkeypatch.setattr(gpu, "_pip", lambda *arguments: gpu.Outcome(0, ""))
    result = gpu.install_stage(context, 10, lambda result: None)
    assert result["status"] == "failed" and result["lacking"] == ["no-such-package-zz"]
    assert result["summary"].startswith("packages missing, no --wheels folder")
    assert result["summary"].endswith(": no-such-package-zz")


def test_optional_packages_come_from_wheels_or_are_done_without(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pip(context: Any, deadline: float, *arguments: str) -> Any:
        asked.extend(arguments)
        return gpu.Outcome(0, "")

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "offered_here-1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(gpu, "_OPTIONAL", ("offered-here", "nowhere-zz"))
    monkeypatch.setattr(gpu, "project_requirements", lambda path: [])
    monkeypatch.setattr(gpu, "_copy_checkout", lambda context: context.scratch)
    monkeypatch.setattr(gpu, "_pip", pip)
    result = gpu.install_stage(replace(context, wheels=wheels), 10, lambda result: None)
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
    (only,) = gpu.speedups(rows)
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
    result = gpu.suites_result(_measured())
    assert result["rows"] == {"ops": 3, "models": 2, "memory": 2} and result["problems"] == []
    assert result["peak_of_48_couplings_over_8"] == {"constant memory": 1.2}
    assert [row["over"] for row in result["speedups"]] == [
        {"eager": 4.0, "compile": 1.5},
        {"eager": 1.0},
    ]
    rows, over_eager, over_compile = gpu.suites_summary(result)
    assert rows == "rows: 3 ops, 2 models, 2 memory, then out of time"
    assert "eager" in over_eager and "median 4.00" in over_eager and "1.5 to 1.5" in over_compile


def test_wrong_rows_and_broken_tests_of_the_suites_are_problems() -> None:
    measured = _measured()
    measured["ops"][1]["problems"] = ["y is off"]
    measured["not_measured"]["c"] = "error: RuntimeError: out of memory"
    problems = gpu.suites_result(measured)["problems"]
    assert problems == ["1 wrong rows", "c: error: RuntimeError: out of memory"]
    assert gpu.suites_result({})["rows"] == {"ops": 0, "models": 0, "memory": 0}


@pytest.mark.parametrize("written", (True, False))
def test_the_op_stage_takes_what_the_suites_wrote_and_nothing_older(
    context: Any, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    context.rows.write_text(json.dumps({"ops": [_row("fused", 1.0)]}))

    def run(commands: dict[str, list[str]], context: Any, seconds: float) -> Any:
        ((name, command),) = commands.items()
        if name == "autotune":
            rows = [_row("fused", 2.0), _row("max-autotune", 3.0)]
            return {name: gpu.Outcome(None, "\n".join(map(json.dumps, rows)))}
        assert command[command.index("--out") + 1] == str(context.rows)
        assert 60 * float(command[command.index("--minutes") + 1]) < seconds - 20
        if written:
            context.rows.write_text(json.dumps(_measured()))
        return {name: gpu.Outcome(1, "said")}

    monkeypatch.setattr(gpu, "run_commands", run)
    monkeypatch.setattr(gpu, "installed_version", lambda name, path: name != "nflows" or None)
    result = gpu.op_stage(context, 100, lambda result: None)
    assert result["autotune"][0]["over"] == {"max-autotune": 1.5}
    assert result["status"] == ("passed" if written else "failed")
    assert result["summary"].endswith("without nflows")
    assert written or "the run of the suites ended with exit status 1" in result["summary"]


def test_without_pytest_benchmark_the_op_stage_says_so(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(commands: dict[str, list[str]], context: Any, seconds: float) -> Any:
        asked.extend(commands)
        return {name: gpu.Outcome(0, json.dumps(_row("fused", 2.0))) for name in commands}

    monkeypatch.setattr(gpu, "run_commands", run)
    monkeypatch.setattr(gpu, "installed_version", lambda name, path: None)
    result = gpu.op_stage(context, 100, lambda result: None)
    assert asked == ["autotune"] and result["status"] == "failed"
    assert result["summary"].startswith("pytest-benchmark is missing")


@pytest.mark.parametrize("measured", (2, 1, 0))
def test_the_couplings_stage_takes_what_its_tables_say(
    context: Any, monkeypatch: pytest.MonkeyPatch, measured: int
) -> None:
    table = context.rows.with_name(f"{context.rows.stem}-choices.json")
    table.write_text("of an earlier run")
    sizes = {"inputs": 2, "hidden": 8, "outputs": 4, "height": 4, "width": 3}
    asked: list[str] = []

    def run(commands: dict[str, list[str]], context: Any, seconds: float) -> Any:
        ((name, command),) = commands.items()
        asked.append(command[command.index("--type") + 1])
        assert command[command.index("--out") + 1] == str(table)
        sections = json.loads(table.read_text()) if table.exists() else {}
        if len(asked) <= measured:
            row = sizes | {"faster": {"300": 2.0 if asked[-1] == "bfloat16" else 0.5}}
            table.write_text(json.dumps(sections | {f"sm_90 {asked[-1]}": {"rows": [row]}}))
        return {name: gpu.Outcome(None, "said")}  # out of time

    monkeypatch.setattr(gpu, "run_commands", run)
    result = gpu.couplings_stage(context, 100, lambda result: None)
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
    condensed = gpu._condensed(rows)
    assert (condensed["run"], condensed["passed"]) == (13, 2)
    assert [row["op"] for row in condensed["failed"]] == ["a", "a", "a", "b"]
    assert condensed["passed_by_op"] == {"a": 2}


def test_failed_tests_are_named_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "pytest.xml"
    assert gpu._tests(path) == ({}, [])
    failed = '<testcase name="t"><failure message="off by&#10;one"/></testcase>'
    counts = 'tests="2" failures="1" errors="0" skipped="0"'
    passed = '<testcase name="u"/>'
    path.write_text(f"<testsuites><testsuite {counts}>{failed}{passed}</testsuite></testsuites>")
    assert gpu._tests(path)[0]["failures"] == 1
    assert gpu._tests(path)[1] == ["t: off by one"]


@pytest.mark.parametrize("cores", (1, 2, 8, 16))
def test_processes_do_not_outnumber_the_cores_by_much(cores: int) -> None:
    tests, shares = gpu._processes(cores)
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
    assert gpu.sanitizer_errors(output) == errors


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"flow_accuracy": 0.5, "commit": null}')
    (tmp_path / "config.json").write_text('{"batch_labelled": 100, "batch_unlabelled": 200}')
    rows = [f"{10 * i},{2 + i},{1 / i},{2 / i}" for i in range(1, 6)]
    (tmp_path / "metrics.csv").write_text("step,seconds,loss_d,loss_g\n" + "\n".join(rows) + "\n")
    run = gpu.read_run(tmp_path)
    assert run["flow_accuracy"] == 0.5 and "commit" not in run
    assert run["steady_images_per_second"] == 300 * 30 / 3
    assert run["loss_g"] == [2.0, 1.0, pytest.approx(2 / 3), 0.5, 0.4]


def test_losses_are_compared_relative_to_their_size() -> None:
    difference = gpu.relative_difference([1.0, -3.0], [1.1, -3.0])
    assert difference == {"first": 0.05, "mean": 0.025, "largest": 0.05}


def test_mnist_is_at_hand_only_whole(tmp_path: Path) -> None:
    assert not gpu.has_mnist(None)
    (tmp_path / "mnist").mkdir()
    for name in gpu._MNIST_FILES:
        assert not gpu.has_mnist(tmp_path)
        (tmp_path / "mnist" / name).touch()
    assert gpu.has_mnist(tmp_path) and gpu.has_mnist(tmp_path / "mnist")
