"""The measurement of the operations, end to end on tiny shapes, and what its results may claim."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_tables, kernels, measuring, plain, report
from benchmarks.cases import CASES, QUICK_CASES, Case, Operands, step
from hybridflow.kernels import native

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing())


def case_of(op: str, note: str = "", dtype: torch.dtype = torch.float32) -> Case:
    return next(c for c in QUICK_CASES if (c.op, c.note, c.dtype) == (op, note, dtype))


def results_of(case: Case, variant: str) -> tuple[Operands, dict[str, torch.Tensor]]:
    operands = case.operands(0, CPU)
    function = None if variant in case.peers else case.function(variant)
    return operands, case.named(*step(case.bind(variant, operands, function), operands.incoming))


def row(variant: str, us: tuple[float, float, float], problems: tuple[str, ...] = ()) -> dict:
    return {
        "op": "actnorm",
        "note": "",
        "shape": [2, 4, 3],
        "dtype": "float32",
        "direction": "forward + backward",
        "variant": variant,
        "launch": "python",
        "us": list(us),
        "of_copy": 0.5,
        "problems": list(problems),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny row of an operation with every variant, made by the command."""
    out = tmp_path_factory.mktemp("results") / "kernels-cpu.json"
    only = ["--quick", "--only", "standard_normal_log_prob or test_copy", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.kernels", *only]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return json.loads(out.read_text())


# --- the command ---------------------------------------------------------------------------------


@needs_library
def test_the_command_measures_every_variant(measured: dict[str, Any]):
    assert [r["variant"] for r in measured["ops"]] == ["eager", "compile", "fused"]
    for r in measured["ops"]:
        low, middle, high = r["us"]
        assert 0 < low <= middle <= high
        assert r["rounds"] >= 6 and len(r["turns_us"]) == 2
        assert r["gb_s"] == pytest.approx(r["bytes"] / middle / 1e3, abs=0.01)
        assert r["of_copy"] == pytest.approx(r["gb_s"] / measured["copy"]["gb_s"], abs=1e-3)
        assert r["problems"] == [] and r["error"] < 1e-5
    assert measured["ops"][2]["implementation"] == "native"
    assert measured["quick"] and not measured["not_measured"]


@needs_library
def test_results_say_where_and_with_what_they_were_made(measured: dict[str, Any]):
    machine = measured["machine"]
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine["processor"] and machine["cores"] >= 1 and machine["threads"] >= 1
    assert measured["commit"] is None or len(measured["commit"].split("-")[0]) == 40
    assert set(measured["load"]) == {"before", "others"}


@needs_library
def test_a_table_and_a_picture_are_made_of_them(measured: dict[str, Any], tmp_path: Path):
    table = kernel_tables.operations(measured)
    assert "| `standard_normal_log_prob` | 8×64 |" in table
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(measured))
    ((picture, digest),) = report.outdated_pictures(tmp_path).items()
    kernel_tables.picture(measured, picture, digest)
    assert report.outdated_pictures(tmp_path) == {}
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(measured, indent=1))
    assert list(report.outdated_pictures(tmp_path)) == [picture]


@pytest.mark.parametrize("partial", (["--quick"], ["--only", "actnorm"]))
def test_partial_results_do_not_replace_the_full_ones(partial: list[str]):
    with pytest.raises(SystemExit):
        kernels.main(partial)


# --- honesty -------------------------------------------------------------------------------------


def test_a_wrong_variant_gets_no_speed_up():
    right, wrong = row("fused", (1, 2, 3)), row("fused", (1, 2, 3), ("y is off",))
    eager = row("eager", (6, 8, 9))
    assert kernels.speed_up(right, eager) == [2, 4, 9]
    assert kernels.speed_up(wrong, eager) is None
    assert kernels.speed_up(right, row("eager", (6, 8, 9), ("y is off",))) is None
    assert kernels.speed_up(right, None) is None


def test_the_table_says_wrong_where_a_variant_is(measured_none: dict[str, Any]):
    table = kernel_tables.operations(measured_none)
    assert table.splitlines()[2].split(" | ")[5:7] == ["wrong", "wrong"]
    assert "4.00" not in table


@pytest.fixture
def measured_none() -> dict[str, Any]:
    ops = [row("eager", (6, 8, 9)), row("compile", (6, 8, 9)), row("fused", (1, 2, 3), ("off",))]
    machine = {"processor": "Some CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
    return {
        "ops": ops,
        "copy": {"gb_s": 10.0, "bytes": 10**8},
        "machine": machine,
        "load": {"before": 0.0, "others": 0.0},
        "commit": None,
    }


@pytest.mark.parametrize("case", [c for c in QUICK_CASES if c.check is None], ids=lambda c: c.id)
def test_plain_pytorch_is_right_and_a_perturbed_result_is_not(case: Case):
    operands, got = results_of(case, "eager")
    exact = case.exact(operands)
    of_eager = measuring.relative_errors(got, exact)
    assert measuring.verdict(of_eager, case.dtype, None) == []
    for name, value in got.items():
        changed = value.clone()
        changed.view(-1)[0] += 0.5 * value.abs().max()
        errors = measuring.relative_errors(got | {name: changed}, exact)
        (problem,) = measuring.verdict(errors, case.dtype, of_eager)
        assert problem.startswith(f"{name} is off")


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_not_a_number_is_wrong(value: float):
    want = {"y": torch.ones(3)}
    errors = measuring.relative_errors({"y": torch.tensor([1.0, value, 1.0])}, want)
    assert measuring.verdict(errors, torch.float32, None)


def test_16_bit_variants_may_err_twice_as_much_as_eager():
    """In the root mean square over draws; in a single element four times."""
    for error, wrong in ((0.019, 0), (0.021, 1)):
        assert len(measuring.verdict_16_bit({"y": error}, torch.bfloat16, {"y": 0.01})) == wrong
    for error, wrong in ((0.039, 0), (0.041, 1)):
        assert len(measuring.verdict({"y": error}, torch.bfloat16, {"y": 0.01})) == wrong


def test_typical_errors_are_the_root_mean_square_over_draws():
    want = [{"y": torch.tensor([3.0, 4.0])}] * 2
    got = [{"y": torch.tensor([3.0, 4.5])}, {"y": torch.tensor([3.0, 4.0])}]
    assert measuring.typical_errors(got, want) == {"y": pytest.approx(0.1 / math.sqrt(2))}


def larger(case_name: str, shape: tuple[int, ...]) -> Case:
    """A case with enough samples for its statistics."""
    return next(c for c in CASES if c.op == case_name and c.shape == shape)


def judged(case: Case, **changed: Any) -> list[str]:
    assert case.check is not None
    torch.manual_seed(0)
    operands, got = results_of(case, "eager")
    errors, problems = case.check(case, operands, got | {k: f(got[k]) for k, f in changed.items()})
    return [*problems, *measuring.verdict(errors, torch.float32, None)]


def test_the_check_of_dequantisation_sees_wrong_noise_and_wrong_log_dets():
    case = larger("dequantize_logit", (300, 4, 16, 16))
    assert judged(case) == []
    assert any("log_det" in problem for problem in judged(case, log_det=lambda v: v * 1.1))
    assert any("noise" in problem for problem in judged(case, y=lambda y: y + 1e-2))
    assert any("noise" in problem for problem in judged(case, y=torch.zeros_like))


def test_the_check_of_boundary_samples_sees_wrong_noise_labels_and_gradients():
    case = larger("boundary_sample", (4096, 64))
    gradient = "the gradient of means"
    assert judged(case) == []
    assert any("labels" in problem for problem in judged(case, labels=lambda v: v.roll(1, 0)))
    assert any(gradient in problem for problem in judged(case, **{gradient: lambda v: 1.1 * v}))
    assert any("z:" in problem for problem in judged(case, z=lambda z: z + 0.1))
    assert any("pairs" in problem for problem in judged(case, z=lambda z: z[:1].expand_as(z)))


# --- cases ---------------------------------------------------------------------------------------


def test_every_case_is_another_row():
    assert len({case.id for case in CASES}) == len(CASES)
    ops = {case.op for case in CASES}
    assert len(ops) == 10
    assert all(sum(c.op == op and not c.note for c in CASES) >= 3 for op in ops)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.note.startswith("as in")], ids=lambda c: c.note
)
def test_couplings_of_other_libraries_are_what_their_form_says(case: Case):
    """plain.py against the kernels' specification, both in float64."""
    from hybridflow.kernels.actnorm_coupling import reference

    small = (6, *case.shape[1:])
    given = {k: v.double() if v.is_floating_point() else v for k, v in _made(case, small).items()}
    x = given["y" if "y" in given else "x"]
    inverse = case.op.endswith("inverse")
    missing = (None, None, None)
    want = reference.map(
        *(x, given["params"], *missing, given["log_det"], given.get("index")),
        *(case.fused_options["form"], False, inverse),
    )
    for got, expected in zip(case.plain(**given), want, strict=True):
        torch.testing.assert_close(got, expected)


def _made(case: Case, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return case.make(shape, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("peer", ("FlowGMM", "normflows", "zuko"))
def test_other_libraries_mixtures_are_the_same_density(peer: str):
    if peer != "FlowGMM":
        pytest.importorskip(peer)
    case = case_of("gmm_log_prob", "log_prob alone")
    operands, got = results_of(case, peer)
    errors = measuring.relative_errors(got, case.exact(operands))
    assert set(errors) == {"log_prob", "the gradient of z", "the gradient of means"}
    assert max(errors.values()) < 1e-4


def test_dequantisation_with_given_noise_is_the_logit_of_grey_levels():
    case = case_of("dequantize_logit")
    given = _made(case, (3, 5))
    noise = torch.rand(3, 5)
    y, log_det = plain.dequantize_logit(**given, levels=256, alpha=0.05, noise=noise)
    unit = (given["x"] + noise) / 256
    torch.testing.assert_close(y, (0.05 + 0.9 * unit).logit())
    jacobian = 0.9 / ((0.05 + 0.9 * unit) * (0.95 - 0.9 * unit))
    torch.testing.assert_close(log_det, given["log_det"] + jacobian.log().sum(1))


# --- measuring -----------------------------------------------------------------------------------


def test_peak_memory_counts_what_lives_at_once():
    """Two of these tensors live at once, and a third that was there before does not count."""
    before = torch.ones(1000)
    size = 4 * 100_000

    def call() -> None:
        a = before.new_ones(100_000)
        b = a.exp()
        del a
        b.add(1)

    peak = measuring.peak_bytes(call, CPU)
    assert 2 * size <= peak < 2.1 * size


def test_peak_memory_counts_the_backward():
    x = torch.ones(100_000, requires_grad=True)
    size = 4 * 100_000
    x.grad = torch.zeros_like(x)

    def call() -> None:
        x.exp().exp().exp().sum().backward()

    # Three saved results, the gradient that comes in and the one that goes out.
    assert 4 * size <= measuring.peak_bytes(call, CPU) < 5.1 * size


def test_quantiles_are_of_the_sorted_times():
    assert measuring.quantiles([5, 1, 4, 2, 3, 0]) == [1, 2, 4]
    assert measuring.quantiles([7]) == [7, 7, 7]


def test_calls_take_turns():
    seen: list[int] = []
    turn = measuring.calls_in_turn([lambda i=i: seen.append(i) for i in range(3)], CPU)
    for _ in range(4):
        turn()
    assert seen == [0, 1, 2, 0]


def test_turns_of_one_variant_are_joined():
    def turn(variant: str, block: int, seconds: list[float]) -> dict:
        extra = {k: v for k, v in row(variant, (0, 0, 0)).items() if k not in ("us", "of_copy")}
        extra |= {"suite": "ops", "block": block, "bytes": 4000, "errors": {"y": 1e-7}}
        return {"extra_info": extra, "stats": {"data": seconds}}

    copy = {"suite": "copy", "bytes": 8000, "block": 0}
    raw = {
        "machine_info": {"hybridflow": {}},
        "benchmarks": [
            {"extra_info": copy, "stats": {"data": [1e-6]}},
            turn("eager", 0, [2e-6, 3e-6]),
            turn("fused", 0, [1e-6, 1e-6]),
            turn("eager", 1, [4e-6]),
        ],
    }
    eager, fused = kernels.condense(raw)["ops"]
    assert eager["us"] == [2, 3, 4] and eager["rounds"] == 3 and eager["turns_us"] == [2.5, 4]
    assert fused["gb_s"] == 4 and fused["of_copy"] == 0.5
    assert fused["error"] == 1e-7 and fused["worst"] == "y"
