"""The benchmarks of whole flows and of training curves measure what they say, and notice what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import curve, flows, kernel_tables
from hybridflow.kernels import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_missing())

# So many images that their activations take more than the gradients of the weights.
SMALL = flows.Workload("digits", "digits", 64, (1, 8, 8))


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_hold_every_variant_and_task_and_make_a_table(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(flows, "FLOWS", (SMALL,))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # the real one takes minutes
    path = tmp_path / "flows.json"
    arguments = ["--out", str(path), "--seconds", "0.001", "--compile", "default"]
    with native.load().using_tiles("emulated"):
        assert flows.main([*arguments, "--precision", precision]) == 0
    results = json.loads(path.read_text())
    assert str(path) not in results["command"] and "--compile" in results["command"]
    high = ["fused, high"] * (precision == "fp32")
    variants = ["eager", "eager, channels-last", "fused", *high]
    found = {(r["task"], r["variant"]): r for r in results["rows"]}
    assert [*found] == [
        *(("likelihood", v) for v in (*variants, "fused, constant memory", "compile")),
        *(("sampling", v) for v in (*variants, "compile")),
        *(("sampling with backward", v) for v in variants),
        *(("training step", v) for v in ("eager", "fused", *high)),
    ]
    for row in results["rows"]:
        low, middle, top = row["us"]
        assert 0 < low <= middle <= top and not row["problems"]
        narrow = row["variant"].endswith("high") or precision == "bf16"
        assert row["error"] < (0.1 if narrow else 1e-4)
    peaks = [found["likelihood", v]["peak_bytes"] for v in ("eager", "fused, constant memory")]
    assert peaks[1] < peaks[0]
    table = kernel_tables.flows(results)
    assert "| digits, 64 | likelihood |" in table and "mode='default'" in table


def test_flops_are_those_of_the_convolutions():
    one = replace(SMALL, batch=1)
    layers = [m for m in flows._flow(one).modules() if isinstance(m, nn.Conv2d)]
    pixels = {2: 16, 4: 4, 16: 1}  # by a step's inputs: 4x4, 2x2, then the last coupling
    want = sum(
        2 * 9 * pixels[a.in_channels] * a.out_channels * (a.in_channels + b.out_channels)
        for a, b in zip(layers[::2], layers[1::2], strict=True)
    )
    assert one.flops("sampling") == want and one.flops("likelihood") == 3 * want
    assert SMALL.flops("sampling") == 64 * want


def test_traffic_is_that_of_inputs_outputs_and_weights():
    elements = 4 * 64 + 4 * 32 + 32  # 8x8, then half of it, then the last coupling
    weights = sum(
        m.weight.numel() for m in flows._flow(SMALL).modules() if isinstance(m, nn.Conv2d)
    )
    assert SMALL.traffic("sampling") == 4 * (2 * 64 * elements + weights)
    assert SMALL.traffic("likelihood") == 4 * (5 * 64 * elements + 3 * weights)


@needs_native
def test_a_wrong_variant_is_named(monkeypatch):
    class WrongIfFused(flows._Pass):
        def __call__(self):
            outputs, grads = super().__call__()
            modules = self._flow.modules()
            fused = any(type(m).__module__.startswith("hybridflow.kernels") for m in modules)
            return tuple(t * (1.001 if fused else 1) for t in outputs), grads

    monkeypatch.setattr(flows, "_Pass", WrongIfFused)
    with native.load().using_tiles(None):
        rows = flows.measure_flow(SMALL, "sampling", None, 0.001, "fp32")
    wrong_rows = [row["variant"] for row in rows if row["problems"]]
    assert wrong_rows == ["fused"]


def test_differences_are_relative_and_nan_is_never_right():
    assert curve.largest_difference([1.0, -2.0], [1.0, -2.002]) == pytest.approx(1e-3)
    assert curve.largest_difference([1.0], [float("nan")]) == float("inf")


@needs_native
def test_a_curve_is_written_with_its_difference(tmp_path):
    path = tmp_path / "curve.json"
    assert (
        curve.main(["--preset", "digits", "--steps", "2", "--free", "1", "--out", str(path)]) == 0
    )
    results = json.loads(path.read_text())
    for name, values in results["losses"]["eager"].items():
        fused = results["losses"]["fused"][name]
        assert len(values) == len(fused) == 2
        found = curve.largest_difference(values, fused)
        assert results["largest_difference"][name] == pytest.approx(found, rel=0.1)
        assert found < 1e-4
    assert {n: len(v["loss_g"]) for n, v in results["free"].items()} == {"fused": 1, "moved": 1}
