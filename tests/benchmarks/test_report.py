"""The README's tables say what the results files say."""

import json
from pathlib import Path

import pytest

from benchmarks import report, training

PLACES = "".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in ("digits-ablation", "small-runs"))


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
    readme += "<!-- small-runs -->\n<!-- /small-runs -->\nafter"
    new = report.render(readme, results)
    assert "| supervised only | 91.0 ± 1.4 | 45.5 ± 0.7 | 2.00 ± 0.00 |" in new
    assert "over 2 seeds; 1.0 minutes a run. Some CPU, 2 threads, torch 2.13.0." in new
    assert "| digits, 100 | 10 | 1.0 | 50.0 | 25.0 | 2.00 | 1000 |" in new
    assert new.startswith("before\n") and new.endswith("\nafter") and "old" not in new
    assert report.render(new, results) == new


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


def test_every_experiment_of_the_ablation_is_made_once():
    runs = training.EXPERIMENTS["digits-ablation"]
    assert len(runs) == len({tuple(r) for r in runs}) == 5 * len(training.ROWS)
