"""The benchmark of the training step measures what it says, and notices what is wrong."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import step, step_tables
from benchmarks.workloads import Workload
from hybridflow.config import PRESETS, DiscriminatorConfig, FlowConfig
from hybridflow.kernels import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_missing())

CPU = torch.device("cpu")
TINY = replace(
    PRESETS["digits"],
    batch_labelled=8,
    batch_unlabelled=16,
    flow=FlowConfig(scales=2, couplings=2, hidden=8, last_hidden=8),
    discriminator=DiscriminatorConfig(widths=(16,)),
)
SMALL = Workload("digits", "tiny", 24, (1, 8, 8))
PLAIN = ["eager", "eager, channels-last"]
FUSED = ["fused, elementwise only", "fused"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(step, "FLOWS", (SMALL,))


def rows_of(**options: Any) -> dict[str, dict[str, Any]]:
    rows, missing = step.measure(SMALL, CPU, seconds=0.001, **options)
    assert not missing
    return {row["variant"]: row for row in rows}


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_file_holds_every_variant_and_its_phases_and_makes_tables(
    precision, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    out = tmp_path / "step.json"
    arguments = ["--out", str(out), "--seconds", "0.001", "--precision", precision]
    assert step.main([*arguments, "--compile", "default"]) == 0
    results = json.loads(out.read_text())
    assert [r["variant"] for r in results["rows"]] == [*PLAIN, "compile, default", *FUSED]
    for row in results["rows"]:
        low, middle, high = row["us"]
        assert 0 < low <= middle <= high and not row["problems"]
        assert row["images_per_second"] == pytest.approx(24e6 / middle, rel=1e-3)
        assert row["peak_bytes"] > 0 and row["error"] < (1e-5 if precision == "fp32" else 1e-2)
        phases = row["phases_ms"]
        assert {"data", "flow", "sampling", "backward of the flow", "optimisers"} < phases.keys()
        assert all(ms > 0 for ms in phases.values())
    table = step_tables.steps(results)
    assert "| digits, 24 |" in table and "default" in table
    assert "| backward of the flow |" in step_tables.phases(results)


@needs_native
def test_elementwise_only_leaves_the_conditioners_to_pytorch(monkeypatch):
    from hybridflow.kernels.swap import hybridflow as forms

    used = []
    right = forms.prefers_one_op
    monkeypatch.setattr(
        forms, "prefers_one_op", lambda *a: used.append(found := right(*a)) or found
    )
    call = step._variants(SMALL, CPU, (), False)["fused, elementwise only"]()[1]
    call()
    assert used and not any(used)


def test_torch_compile_draws_the_same_numbers():
    options, seen = {}, []
    built = step.build_step(SMALL, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **given: options.update(given) or f)
        patch.setattr(torch.nn.Module, "compile", lambda self, **given: seen.append(given))
        step._compiled(built, "max-autotune")
    assert seen == [options] and options["options"]["fallback_random"]
    assert options["options"]["max_autotune"]


@needs_native
@pytest.mark.parametrize(
    "what", ["losses", "gradients of the model", "updates of the discriminator"]
)
def test_a_wrong_variant_is_named_and_gets_no_ratio(what, monkeypatch):
    right = step._results

    def of_fused(built, before, terms):
        results = right(built, before, terms)
        fused = type(built.model.prior).__module__.startswith("hybridflow.kernels")
        return {**results, what: -results[what]} if fused else results

    monkeypatch.setattr(step, "_results", of_fused)
    rows = rows_of()
    assert [name for name, row in rows.items() if row["problems"]] == FUSED
    assert what in rows["fused"]["problems"][0]
    results = {"rows": list(rows.values()), "not_measured": [], "precision": "fp32"}
    machine = {"processor": "A", "threads": 1, "versions": {"torch": "2"}}
    table = step_tables.steps(results | {"machine": machine, "commit": "abc"})
    assert "| wrong |" in table.splitlines()[2]


@needs_native
def test_a_variant_that_fails_is_recorded_with_the_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(step, "_compiled", fails)
    rows, missing = step.measure(SMALL, CPU, modes=["default"], seconds=0.001)
    assert [row["variant"] for row in rows] == [*PLAIN, *FUSED]
    about = {"data": "digits", "batch": 24, "variant": "compile, default"}
    assert missing == [about | {"reason": "no compiler"}]


def test_data_sets_that_the_time_did_not_allow_are_recorded(tmp_path):
    out = tmp_path / "step.json"
    assert step.main(["--out", str(out), "--minutes", "0"]) == 1
    assert json.loads(out.read_text())["not_measured"][0]["data"] == "digits"


def test_the_work_of_a_gpu_is_the_union_of_its_intervals():
    events = [
        {"cat": "kernel", "ts": 0.0, "dur": 2.0},
        {"cat": "kernel", "ts": 1.0, "dur": 3.0},
        {"cat": "gpu_memcpy", "ts": 10.0, "dur": 1.0},
        {"cat": "cpu_op", "ts": 0.0, "dur": 50.0},
        {"name": "no category"},
    ]
    assert step.device_work(events) == (2, 5.0)
    assert step.device_work([]) == (0, 0.0)
