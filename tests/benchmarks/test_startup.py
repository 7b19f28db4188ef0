"""The benchmark of the start tells its stages apart, and reads what Python says of imports."""

import json
from pathlib import Path

import pytest

from benchmarks import startup, step_tables


def test_imports_are_added_up_by_package_without_those_they_import():
    log = """some warning | with a bar
import time: self [us] | cumulative | imported package
import time:       500 |        500 |     torch.nn
import time:      1000 |       1500 |   torch
import time:      2000 |       3500 | hybridflow.train
"""
    assert startup.imports_of(log) == pytest.approx({"hybridflow": 0.002, "torch": 0.0015})


def test_a_run_is_followed_to_its_first_step(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(startup, "_CACHES", ())  # cold it would take much longer
    arguments = ["--preset", "two-moons", "--device", "cpu", "--flow.couplings", "1"]
    stages = startup.start(arguments, tmp_path)
    assert list(stages) == list(startup.STAGES) and all(s > 0 for s in stages.values())


def test_a_run_that_ends_early_says_why(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(startup, "_CACHES", ())
    with pytest.raises(RuntimeError, match="preset"):
        startup.start(["--preset", "no-such"], tmp_path)


def test_the_file_holds_cold_and_warm_starts_and_makes_a_table(tmp_path, monkeypatch):
    given, used = iter(range(1, 100)), set()

    def start(arguments, caches):
        used.add(("--fused" in arguments, caches))
        seconds = next(given) + (100 if "--fused" in arguments else 0)
        return dict.fromkeys(startup.STAGES, float(seconds))

    monkeypatch.setattr(startup, "start", start)
    monkeypatch.setattr(startup, "_imports", lambda: {"seconds": 2.0, "packages": {"torch": 1.5}})
    out = tmp_path / "startup.json"
    assert startup.main(["--out", str(out), "--warm", "3"]) == 0
    assert len(used) == 2  # each variant keeps its own caches from start to start
    results = json.loads(out.read_text())
    rows = {(r["variant"], r["start"]): r for r in results["rows"]}
    assert rows["plain", "cold"]["seconds"] == [3.0, 3.0, 3.0]
    assert rows["plain", "warm"]["seconds"] == [9.0, 15.0, 21.0]
    assert rows["fused", "warm"]["stages"]["first step"] == 106.0
    table = step_tables.startup(results)
    assert "| plain, warm | **15.00** | 5.00 | 5.00 | 5.00 |" in table
    assert "torch 1.50" in table and "the median of 3" in table
