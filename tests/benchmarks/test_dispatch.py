"""The benchmark of Python and dispatch measures steps of two images."""

import json
from dataclasses import replace

import pytest

from benchmarks import dispatch, step_tables
from benchmarks.workloads import FLOWS, Workload
from hybridflow.config import PRESETS, DiscriminatorConfig, FlowConfig
from hybridflow.kernels import native


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_a_row_for_eager_and_fused_and_their_table(tmp_path, monkeypatch):
    tiny = replace(
        PRESETS["digits"],
        flow=FlowConfig(scales=2, couplings=2, hidden=8, last_hidden=8),
        discriminator=DiscriminatorConfig(widths=(16,)),
    )
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setattr(dispatch, "FLOWS", (Workload("digits", "tiny", 24, (1, 8, 8)),))
    out = tmp_path / "dispatch.json"
    assert dispatch.main(["--data", "digits", "--seconds", "0.001", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [(r["variant"], r["batch"]) for r in results["rows"]] == [("eager", 2), ("fused", 2)]
    for row in results["rows"]:
        assert 0 < row["us"][0] <= row["us"][2] and row["phases_ms"]["optimisers"] > 0
    assert "| digits: eager | digits: fused |" in step_tables.dispatch(results)


def test_a_workload_takes_as_many_images_as_it_is_told():
    config = replace(FLOWS[0], images=(3, 4)).config
    assert (config.batch_labelled, config.batch_unlabelled) == (3, 4)
    assert replace(config, batch_labelled=100, batch_unlabelled=200) == PRESETS["mnist"]
