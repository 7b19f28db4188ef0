"""The GPU queue, as far as a machine without a GPU can tell."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridflow.kernels import actnorm_coupling, actnorm_coupling_inverse

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
    return gpu.Context({"name": "a card"}, scratch, tmp_path / "target")


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


def test_the_table_is_short_and_names_every_stage(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "r.json", {})
    results.record("environment", {"status": "passed", "seconds": 1.0, "summary": "a card"})
    results.record("kernels", {"status": "failed", "seconds": 2.0, "summary": "x" * 9999})
    row = {"shape": [300, 4, 16, 16], "dtype": "float32", "pass": "forward", "of_copy": 0.8}
    compared = [row | {"us": [3.0, 3.1, 3.2], "over": {"eager": 9.5}}]
    results.record("op", {"status": "running", "seconds": 3.0, "speedups": compared})
    table = gpu.summary_table(results)
    lines = table.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["environment", "passed"],
        ["kernels", "failed"],
        ["op", "running"],
    ]
    assert any("300x4x16x16" in line and "eager 9.5x" in line for line in lines)
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


# --- the op against float64 -----------------------------------------------------------------------

_Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 4, 8, 8), (300, 2)])
def test_the_op_passes_on_the_cpu(
    direction: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for flip in (False, True):
        result = gpu.check_op(direction, shape, dtype, flip, _CPU)
        assert result["passed"], result
        assert 0 <= result["error_of_allowed"] <= 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda y, log_det: (y * 1.0001, log_det), "out"),
        (lambda y, log_det: (y, log_det + 0.01), "log_det"),
        (lambda y, log_det: (_one_element(y, 10.0), log_det), "out"),
        (lambda y, log_det: (_one_element(y, float("nan")), log_det), "out"),
        (lambda y, log_det: (y + 1e-7 * torch.rand(()), log_det), "second run"),
        (lambda y, log_det: (2 * y - y.detach(), log_det), "grad_x"),
        (lambda y, log_det: (y + torch.empty_like(y) * 0, log_det), "out"),
    ],
    ids=["scaled", "log-det", "one element", "one NaN", "irregular", "gradient", "unwritten"],
)
@pytest.mark.parametrize(
    ("direction", "op"), [("forward", actnorm_coupling), ("inverse", actnorm_coupling_inverse)]
)
def test_a_perturbed_op_fails(direction: str, op: Any, change: _Change, named: str) -> None:
    def perturbed(*operands: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
        return change(*op(*operands, flip=flip))

    result = gpu.check_op(direction, (37, 4, 8, 8), torch.float32, False, _CPU, perturbed)
    assert not result["passed"]
    assert any(named in problem for problem in result["problems"])


def _one_element(y: Tensor, by: float) -> Tensor:
    change = torch.zeros_like(y)
    change[3, 1, 2, 2] = by
    return y + change


def test_a_16_bit_op_may_err_twice_as_much_as_pytorch_and_no_more() -> None:
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pytorch = exact.bfloat16()
    error = pytorch.double() - exact
    assert gpu.error_of_allowed(exact + 1.9 * error, pytorch, exact) < 1
    assert gpu.error_of_allowed(exact + 2.1 * error, pytorch, exact) > 1


# --- what the other stages make of their output ---------------------------------------------------


def test_no_speed_up_is_given_for_a_wrong_variant() -> None:
    def row(variant: str, median: float, correct: bool = True, dtype: str = "float32") -> Any:
        kind = {"shape": [2, 4], "dtype": dtype, "pass": "forward", "variant": variant}
        return kind | {"correct": correct, "us": [1.0, median, 99.0], "of_copy": 0.5}

    rows = [row("fused", 2.0), row("eager", 7.0), row("compile", 3.0, correct=False)]
    rows += [row("fused", 2.0, False, "bfloat16"), row("eager", 9.0, True, "bfloat16")]
    (only,) = gpu.speedups(rows)
    assert only["dtype"] == "float32" and only["over"] == {"eager": 3.5}


def test_bytes_moved_count_each_operand_once() -> None:
    per_channel = 4 * (4 + 4 + 2)
    assert gpu.bytes_moved((3, 4, 2, 2), 2, backward=False) == 3 * 48 * 2 + 3 * 8 + per_channel
    assert gpu.bytes_moved((3, 4, 2, 2), 2, backward=True) == (
        8 * 48 * 2 + 3 * 12 + 3 * per_channel
    )


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
