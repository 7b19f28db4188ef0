"""The README's tables say what the results files say."""

import json
from pathlib import Path

import pytest

from benchmarks import kernel_tables, pictures, report, run_tables, step_tables, training

PLACES = "".join(
    f"<!-- {n} -->\n<!-- /{n} -->\n" for n in ("digits-ablation", "small-runs", "published")
)


def record(objective: str, seed: int, accuracy: float) -> dict:
    return {
        "arguments": ["--objective", objective, "--seed", str(seed)],
        "threads": 2,
        "processor": "Some CPU",
        "results": {
            "dataset": "digits",
            "labels": 100,
            "seed": seed,
            "objective": objective,
            "steps": 10,
            "seconds": 60.0,
            "images_per_second": 1000.0,
            "flow_accuracy": accuracy,
            "discriminator_accuracy": accuracy / 2,
            "bits_per_dim": 2.0,
            "versions": {"torch": "2.13.0"},
        },
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [record(row, seed, 0.9 + 0.02 * seed) for row in training.ROWS for seed in range(2)]
    (tmp_path / "digits-ablation.json").write_text(json.dumps(rows))
    for name in "mnist-small", "fashion-mnist-small", "cifar10-small":
        (tmp_path / f"{name}.json").write_text(json.dumps([record("full", 0, 0.5)]))
    return tmp_path


def test_tables_hold_means_and_deviations(results: Path):
    readme = "before\n<!-- digits-ablation -->\nold\n<!-- /digits-ablation -->\n"
    readme += (
        "<!-- small-runs -->\n<!-- /small-runs -->\n<!-- published -->\n<!-- /published -->\nafter"
    )
    new = report.render(readme, results)
    assert "| supervised only | 91.0 ± 1.4 | 45.5 ± 0.7 | 2.00 ± 0.00 |" in new
    assert "over 2 seeds; 1.0 minutes a run. Some CPU, 2 threads, torch 2.13.0." in new
    assert "| digits, 100 | 0 | 10 | 1.0 | 50.0 | 25.0 | 2.00 | 1000 |" in new
    assert new.startswith("before\n") and new.endswith("\nafter") and "old" not in new
    assert report.render(new, results) == new


def test_a_table_is_made_of_those_of_its_files_that_exist(results: Path):
    (results / "cifar10-small.json").unlink()
    assert report.render(PLACES, results).count("| digits, 100 | 0 | 10 |") == 2


def test_measured_and_cited_figures_are_told_apart(results: Path):
    runs = [record("full", 0, 0.5), record("full", 2, 0.6)]
    runs[1]["threads"] = 1
    (results / "mnist-small.json").write_text(json.dumps(runs))
    table = report.render(PLACES, results)
    two = "1 minutes on 2 processors (split of seed 0)"
    told = f"measured, no GPU: {two}, 1 minutes on 1 processor (split of seed 2)"
    assert f"| 55.0 ± 7.1 / 27.5 ± 3.5 | not yet measured | not yet measured | {told} |" in table
    assert table.count("| cited; other splits |") == 7


def test_results_of_other_runs_are_refused_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = tmp_path / "mnist-small.json"
    path.write_text(text := json.dumps([record("full", 0, 0.5)]))
    monkeypatch.setattr("sys.argv", ["training", "mnist-small", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    assert stopped.value.code == 2 and path.read_text() == text
    assert "not of this experiment: --objective full --seed 0" in capsys.readouterr().err


def test_the_best_recipe_is_shown_by_labels_and_without_each_part():
    runs = training.EXPERIMENTS["digits-best"]
    records = []
    for arguments in runs:
        new = record("full", int(arguments[-1]), 0.9 if "--shift" in arguments else 0.98)
        new["results"]["labels"] = 50 if "50" in arguments else 100
        records.append(new | {"arguments": arguments})
    table = run_tables.best(records)
    assert "| best | 100 | 98.0 ± 0.0 | 49.0 ± 0.0 | 2.00 ± 0.00 |\n| best | 50 | 98.0" in table
    assert "| no shifts | 50 | 90.0 ± 0.0 |" in table
    assert len(table.split("\n\n")[0].splitlines()) == 2 + 2 + len(training.BEST) - 1


def test_a_sweep_has_a_row_per_value():
    records = []
    for name in "digits-beta", "digits-nll":
        for arguments in training.EXPERIMENTS[name]:
            accuracy = 0.9 + 0.01 * int(arguments[-1])
            records.append(record("full", int(arguments[-1]), accuracy) | {"arguments": arguments})
    table = run_tables.sweeps(records)
    assert "| `--terms.beta` | 0.625 | 91.0 ± 1.0 | 45.5 ± 0.5 | 2.00 ± 0.00 |" in table
    assert table.count("`--terms.w-nll`") == 5 and "over 3 seeds" in table
    assert "| `--terms.beta` | 0.5 | 90.0 | 45.0 | 2.00 |" in run_tables.sweeps(records[:1])


def test_a_readme_without_a_place_for_a_table_is_refused(results: Path):
    with pytest.raises(SystemExit, match="no place for the table digits-ablation"):
        report.render("nothing here", results)


def test_a_place_for_a_table_without_results_is_refused(results: Path):
    with pytest.raises(SystemExit, match="no results for the table kernels-cpu"):
        report.render(PLACES + "<!-- kernels-cpu -->\n<!-- /kernels-cpu -->\n", results)


def test_the_readme_is_up_to_date():
    readme = (report.ROOT / "README.md").read_text()
    assert report.render(readme, report.RESULTS) == readme
    assert report.outdated_pictures(report.RESULTS) == {}


def test_texts_of_a_png_are_read():
    chunk = b"Source\0abc"
    png = b"\x89PNG\r\n\x1a\n" + len(chunk).to_bytes(4, "big") + b"tEXt" + chunk + bytes(4)
    assert report.png_text(png) == {"Source": "abc"}


def bridges(objective: str, seed: int, mass: float) -> dict:
    found = {
        "mass_between_arms": mass,
        "mass_between_arms_at_boundary": 2 * mass,
        "mass_between_arms_of_data": 0.001,
    }
    samples = ["0.5 1 -0.5 1", "0 0 0.1 0.1"] * 2 + ["1 1 2 2"]
    planar = record(objective, seed, 0.9)
    planar["results"]["dataset"] = "pinwheel"
    return planar | {"bridges": found, "samples": samples, "boundary_samples": "0 1 2 2"}


def test_bridges_have_a_row_per_objective_beside_the_data(tmp_path: Path):
    records = [bridges("nll", seed, 0.1 + 0.02 * seed) for seed in range(2)]
    records += [bridges("nll+adversarial", seed, 0.05) for seed in range(2)]
    lines = run_tables.bridges(records).splitlines()
    assert lines[2].startswith("| + likelihood | 22.0 ± 2.8 | 11.0 ± 1.4 | 90.0 ± 0.0 |")
    assert lines[3].startswith("| + likelihood, adversarial | 10.0 ± 0.0 | 5.0 ± 0.0 |")
    assert lines[4] == "| new data | | 0.1 | | |"
    pictures.bridges(records, tmp_path / "bridges.png", "digest")
    assert report.png_text((tmp_path / "bridges.png").read_bytes())["Source"] == "digest"


def test_every_experiment_of_the_ablation_is_made_once():
    runs = training.EXPERIMENTS["digits-ablation"]
    assert len(runs) == len({tuple(r) for r in runs}) == 5 * len(training.ROWS)


# --- the training step ---------------------------------------------------------------------------

MACHINE = {"processor": "Some CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
HEADER = {"commit": "0123456789abc", "machine": MACHINE}
MS = {
    "eager": 100.0,
    "eager, channels-last": 80.0,
    "compile, default": 60.0,
    "fused, elementwise only": 50.0,
    "fused": 20.0,
    "fused + graph": 10.0,
}


def step_rows(data: str, variants: tuple[str, ...], wrong: str | None = None) -> list[dict]:
    rows = []
    for variant in variants:
        ms = MS[variant]
        row = {"data": data, "batch": 300, "variant": variant, "peak_bytes": 5_000_000}
        row |= {"us": [900 * ms, 1000 * ms, 1100 * ms], "images_per_second": 300_000 / ms}
        row |= {"problems": ["losses are off"] if variant == wrong else []}
        row |= {"phases_ms": {"flow": ms / 4, "backward of the flow": 3 * ms / 4}}
        if variant.startswith("compile"):
            row |= {"mode": "default", "compile_seconds": 33.3}
        rows.append(row | {"kernels": 3000, "busy": 0.25})
    return rows


def step_results(*rows: list[dict]) -> dict:
    return HEADER | {
        "precision": "fp32",
        "not_measured": [],
        "rows": [r for rs in rows for r in rs],
    }


def test_steps_are_compared_with_the_better_eager_and_the_best_compiled():
    lines = step_tables.steps(step_results(step_rows("MNIST", tuple(MS)[:5]))).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        *("MNIST, 300", "80", "60", "50", "20"),
        *("4.00", "3.00", "3750", "15000", "5", "5", "33"),
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_a_graph_adds_what_only_a_gpu_has():
    results = step_results(step_rows("MNIST", tuple(MS)), step_rows("SVHN", tuple(MS)[:2]))
    lines = step_tables.steps(results).splitlines()
    assert "| 10 | 8.00 | 6.00 |" in lines[2] and "| 3000 | 3000 | 25 % | 25 % |" in lines[2]
    assert len({line.count("|") for line in lines[:4]}) == 1  # also where variants are missing


def test_a_wrong_variant_has_no_ratio():
    results = step_results(step_rows("MNIST", tuple(MS)[:5], wrong="fused"))
    assert "| wrong | wrong |" in step_tables.steps(results)


def test_phases_have_times_and_shares_before_and_after():
    table = step_tables.phases(step_results(step_rows("MNIST", tuple(MS)[:5])))
    assert "| ms of a step | MNIST: eager | MNIST: fused |" in table
    assert "| flow | 20 (25 %) | 5 (25 %) |" in table and "| **sum** | **80** | **20** |" in table


def test_each_technique_is_a_stage_if_it_was_measured():
    def stages(*variants: str) -> list[str]:
        return list(step_tables.stages({r["variant"]: r for r in step_rows("MNIST", variants)}))

    assert stages("eager", "fused") == ["eager", "conditioner kernels"]
    assert stages(*MS) == [
        *("eager", "channels-last", "elementwise kernels", "conditioner kernels", "CUDA graph")
    ]


def test_pictures_carry_the_digest_of_all_their_files(tmp_path: Path):
    rows = [step_rows("MNIST", tuple(MS)), step_rows("digits", tuple(MS)[:5], wrong="fused")]
    (tmp_path / "step-cpu.json").write_text(json.dumps(step_results(*rows)))
    rate = {"us": [1e5, 1e5, 1e5], "problems": [], "matmul_gflop_s": 100.0, "gflop_s": 20.0}
    shape = {"data": "MNIST", "batch": 300, "channels": 4, "size": 16, "hidden": 128}
    variants = [{"variant": "eager"}, {"variant": "fused"}]
    flows = [shape | rate | v | {"task": "likelihood"} for v in variants]
    conditioners = [shape | rate | v for v in variants]
    (tmp_path / "flows-cpu.json").write_text(json.dumps(HEADER | {"rows": flows}))
    (tmp_path / "conditioners-cpu.json").write_text(json.dumps(HEADER | {"rows": conditioners}))
    assert [p.name for p in report.outdated_pictures(tmp_path)] == ["step-cpu.png"]
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(HEADER | {"copy": {"gb_s": 20.0}}))
    found = report.outdated_pictures(tmp_path)
    del found[tmp_path / "kernels-cpu.png"]
    assert [p.name for p in found] == ["step-cpu.png", "roofline-cpu.png"]
    for picture, digest in found.items():
        report.draw(picture, digest)
    assert [p.name for p in report.outdated_pictures(tmp_path)] == ["kernels-cpu.png"]
    (tmp_path / "flows-cpu.json").write_text(json.dumps(HEADER | {"rows": flows[:1]}))
    assert tmp_path / "roofline-cpu.png" in report.outdated_pictures(tmp_path)


def test_narrow_products_have_columns_where_they_were_measured():
    rate = {"problems": [], "matmul_gflop_s": 100.0, "gflop_s": 20.0}
    shape = {"data": "MNIST", "batch": 300, "channels": 4, "size": 16, "hidden": 128}
    us = {"eager": 4e3, "eager, channels-last": 3e3, "compile": 3e3, "fused": 1e3}
    us |= {"fused, high": 750.0}
    us |= {"eager, bf16": 2e3, "eager, channels-last, bf16": 1e3, "fused, bf16": 500.0}
    rows = [shape | rate | {"variant": v, "us": [t] * 3} for v, t in us.items()]
    table = kernel_tables.conditioners(HEADER | {"rows": rows})
    cells = "3 | 3 | 1 | 3.00 | 3.00 | 20 | 20 % | 0.75 | 4.00 | 4.00 | 1 | 0.5 | 2.00 |"
    assert f"| MNIST | 300×4×16², 128 | {cells}" in table and "by AMX" in table
    table = kernel_tables.conditioners(HEADER | {"rows": rows[:4]})
    assert "| 20 | 20 % |\n" in table and "bf16" not in table and "AMX" not in table
    flow = [row | {"task": "sampling", "mode": "default"} for row in rows[:5]]
    table = kernel_tables.flows(HEADER | {"rows": flow})
    assert (
        "| MNIST, 300 | sampling | 3 | 3 | 1 | 3.00 | 3.00 | 0.75 | 4.00 | 4.00 | 20 % |" in table
    )
    table = kernel_tables.flows(HEADER | {"rows": flow[:4]})
    assert "| 1 | 3.00 | 3.00 | 20 % |" in table and "high" not in table


# --- time to accuracy ----------------------------------------------------------------------------


def timed_record(fused: bool, seed: int, reached: float) -> dict:
    new = record("full", seed, 0.9)
    new["results"] |= {"fused": fused, "images_per_second": 3000.0 if fused else 1000.0}
    curve = ((1.0, 0.5), (reached, 0.91), (100.0, 0.96))
    names = ("validation_flow_accuracy", "validation_discriminator_accuracy")
    return new | {"curve": [{"step_seconds": s} | dict.fromkeys(names, a) for s, a in curve]}


def test_time_to_accuracy_is_the_first_time_of_each_run():
    runs = [(fused, seed) for seed in range(3) for fused in (False, True)]
    records = [timed_record(f, s, (10.0 if f else 30.0) + s) for f, s in runs]
    table = run_tables.time_to_accuracy(records)
    assert "| PyTorch | 31.0 (30.0–32.0) | 100.0 (100.0–100.0) | 1000 |" in table
    assert "| fused | 11.0 (10.0–12.0) | 100.0 (100.0–100.0) | 3000 |" in table
    assert "| faster | ×2.82 | ×1.00 | ×3.00 |" in table and "3 seeds" in table


def test_a_run_that_never_got_there_leaves_no_ratio():
    records = [timed_record(f, s, 10.0) for s in range(3) for f in (False, True)]
    records[1]["curve"] = records[1]["curve"][:1]
    table = run_tables.time_to_accuracy(records)
    assert "| fused | not in 1 of 3 runs |" in table and "| faster | – | – | ×3.00 |" in table


def test_plain_and_fused_runs_take_turns():
    runs = training.EXPERIMENTS["time-to-accuracy"]
    assert ["--fused" in run for run in runs] == 3 * [False, True]


def test_seconds_in_steps_follow_from_the_rate():
    row = {"step": "10", "seconds": "99", "images_per_second": "1500"}
    assert training._step_seconds(row, 300) == 2.0
