"""The benchmark of cost against size records every point, and notices what is wrong, slow or too large."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report, scaling
from hybridflow.kernels import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_missing())

CPU = torch.device("cpu")
BASE = scaling.Point(batch=4, couplings=4, size=8, scales=2, hidden=8, last_hidden=8)
VARIANTS = ["eager", "fused", "fused, constant memory"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(scaling, "BASES", {"cpu": BASE})
    monkeypatch.setattr(scaling, "AXES", {"batch": (4, 8), "couplings": (4, 8), "size": (8, 16)})
    monkeypatch.setattr(scaling, "_limit_memory", lambda: None)


@needs_native
def test_every_point_has_its_rows_and_makes_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    out = tmp_path / "scaling-cpu.json"
    arguments = ["--out", str(out), "--seconds", "0.001", "--compile", "default"]
    assert scaling.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    points = {(r["axis"], r["batch"], r["couplings"], r["size"]) for r in rows}
    assert points == {
        ("base", 4, 4, 8),
        ("batch", 8, 4, 8),
        ("couplings", 4, 8, 8),
        ("size", 4, 4, 16),
    }
    assert [r["variant"] for r in rows] == 4 * [*VARIANTS, "compile"]
    for row in rows:
        low, middle, high = row["us"]
        assert 0 < low <= middle <= high and row["problems"] == []
        assert row["images_per_second"] == pytest.approx(1e6 * row["batch"] / middle, rel=1e-3)
        assert row["peak_bytes"] > 0 and row["first_call_seconds"] > 0
    (picture,) = report.outdated_pictures(tmp_path)
    report.draw(picture, "digest")
    assert report.png_text(picture.read_bytes())["Source"] == "digest"


def test_the_couplings_are_those_of_the_point():
    steps = [m for m in BASE.flow().modules() if type(m).__name__ == "FlowStep"]
    assert len(steps) == BASE.couplings + 1


@needs_native
@pytest.mark.parametrize("part", ["outputs", "gradients"])
def test_a_wrong_variant_is_named(part, monkeypatch):
    right = scaling._likelihood

    def of_fused(flow, x, weights):
        results = right(flow, x, weights)
        chosen = slice(len(weights)) if part == "outputs" else slice(len(weights), None)
        if any(type(m).__module__.startswith("hybridflow.kernels") for m in flow.modules()):
            results[chosen] = [1.1 * t for t in results[chosen]]
        return results

    monkeypatch.setattr(scaling, "_likelihood", of_fused)
    rows = {row["variant"]: row for row in scaling.measure(BASE, CPU, seconds=0.001)}
    assert [name for name, row in rows.items() if row["problems"]] == VARIANTS[1:]
    assert rows["fused"]["problems"][0].startswith(part)


@needs_native
def test_too_large_points_are_recorded_and_larger_ones_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "AXES", {"batch": (4, 8, 16)})
    right = scaling._likelihood

    def too_large(flow, x, weights):
        eager = not any(type(m).__module__.startswith("hybridflow.kernels") for m in flow.modules())
        if eager and len(x) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return right(flow, x, weights)

    monkeypatch.setattr(scaling, "_likelihood", too_large)
    out = tmp_path / "scaling-cpu.json"
    assert scaling.main(["--out", str(out), "--seconds", "0.001"]) == 0
    rows = json.loads(out.read_text())["rows"]
    failed = [row.get("failed", "") for row in rows if row["variant"] == "eager"]
    assert failed[0] == "" and failed[1].startswith("out of memory: Default")
    assert failed[2].startswith("not tried, a smaller one was out of memory")
    assert all("us" in row for row in rows if row["variant"] != "eager")


@needs_native
def test_slow_calls_are_recorded_without_times(monkeypatch):
    monkeypatch.setattr(scaling, "_SLOW", 0.0)
    rows = scaling.measure(replace(BASE, batch=2), CPU, seconds=0.001)
    assert all(r["failed"].startswith("too slow") and "us" not in r for r in rows)
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_points_that_the_time_did_not_allow_are_recorded(tmp_path):
    out = tmp_path / "scaling-cpu.json"
    scaling.main(["--out", str(out), "--minutes", "0"])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 and all(row["failed"] == "0 minutes were up" for row in rows)
