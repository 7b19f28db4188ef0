"""A library's own tests, run plain and fused, in a suite made for the purpose."""

import json
import sys

import pytest

from benchmarks import peer_suites
from hybridflow.kernels import native

SUITE = """
import torch
from nflows.transforms import ActNorm, AdditiveCouplingTransform

def module():
    return type(ActNorm(3)).__module__

def test_passes():
    assert ActNorm(3).eval()(torch.ones(2, 3))[0].sum() == 6

def test_fails():
    AdditiveCouplingTransform([0, 1], lambda i, o: torch.nn.Linear(i, o))
    raise LookupError

def test_knows_the_original():
    assert module() == "nflows.transforms.normalization"

def test_knows_the_fused():
    assert module() == "hybridflow.kernels.swap.nflows"
"""


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_counts_layers_and_differences_are_those_of_the_two_runs(tmp_path):
    pytest.importorskip("nflows", reason="nflows is not installed")
    (tmp_path / "test_suite.py").write_text(SUITE)
    record = peer_suites.compare("nflows", tmp_path, "reference")
    assert record["plain"] == record["fused"] == {"passed": 2, "failed": 2, "skipped": 0}
    assert record["fused_layers"] == {"nflows.transforms.normalization.ActNorm": 3}
    assert list(record["left_layers"].values()) == [1]
    assert record["failing_plain"] == [
        f"test_suite.py::test_{n}" for n in ("fails", "knows_the_fused")
    ]
    assert record["differing"] == [
        {"test": "test_suite.py::test_knows_the_fused", "plain": "failed", "fused": "passed"},
        {"test": "test_suite.py::test_knows_the_original", "plain": "passed", "fused": "failed"},
    ]
    assert record["broken"] == 1


@pytest.mark.parametrize(
    ("broken", "layers", "status"), ((0, {"a": 2}, 0), (1, {"a": 2}, 1), (0, {}, 1))
)
def test_the_command_fails_if_a_test_broke_or_nothing_was_fused(
    tmp_path, monkeypatch, capsys, broken, layers, status
):
    counts = {"passed": 3, "failed": 0, "skipped": 1}
    record = {"library": "some", "version": "1", "plain": counts, "fused": counts}
    record |= {"fused_layers": layers, "differing": [], "broken": broken}
    monkeypatch.setattr(peer_suites, "compare", lambda *_: record)
    out = tmp_path / "results" / "out.json"
    monkeypatch.setattr(sys, "argv", ["", "--suite", "some=/a/folder", "--out", str(out)])
    assert peer_suites.main() == status
    written = json.loads(out.read_text())
    assert written["suites"] == [record]
    assert written["command"].endswith("--suite some=PATH")
    assert "3/0/1 plain" in capsys.readouterr().out
