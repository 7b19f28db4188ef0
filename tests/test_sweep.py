"""A sweep: its plan, what it refuses before it trains, its table, and how it is stopped and continued."""

import csv
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import mean, stdev

import pytest

from hybridflow import checkpoint, sweep
from hybridflow.errors import InputError
from hybridflow.kernels import native
from hybridflow.launch import locked, terminated_as_interrupted, threads_per_run
from hybridflow.run import RunFolder
from hybridflow.sweep import plan
from hybridflow.sweep_table import seconds_to_target, summarise, swept_number
from hybridflow.tables import markdown_table, text_table

TINY = (
    "--steps 40 --validation 50 --batch-labelled 10 --batch-unlabelled 10 "
    "--log-every 10 --eval-every 20 --save-every 20 --flow.couplings 2 --flow.hidden 8"
).split()


def swept(*arguments: str | Path) -> int:
    """The exit status of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["sweep", *map(str, arguments)])
        sweep.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def arguments(out: Path, *settings: str, seeds: str = "0", common: list[str] = TINY) -> list[str]:
    own = ["--out", str(out), "--presets", "two-moons", "--devices", "cpu", "--target", "0.4"]
    own += ["--seeds", *seeds.split(), *(word for s in settings for word in ("--set", s))]
    return [*own, "--", *common]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep of two learning rates, one of which diverges, and two seeds.

    The first run was killed before its first checkpoint.
    """
    out = tmp_path_factory.mktemp("sweeps") / "rates"
    first = plan(["two-moons"], [0], ["optimiser.lr_g=0.001"], TINY)[0]
    first.job(out).folder.create(first.config)
    status = swept("--jobs", 2, *arguments(out, "optimiser.lr_g=0.001,1e30", seeds="0 1"))
    assert status == 1
    return out


def content(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


class TestPlan:
    def test_it_holds_every_combination_once_with_the_seeds_together(self):
        settings = ["terms.beta=0,0.5,1", "objective=full,nll"]
        runs = plan(["digits", "two-moons"], [3, 4], settings, ["--fused"])
        assert len(runs) == len({run.name for run in runs}) == 2 * 3 * 2 * 2
        assert [run.seed for run in runs[:4]] == [3, 4, 3, 4]
        assert runs[0].name == "digits,terms.beta=0,objective=full,seed=3"
        last = runs[-1].config
        assert (last.dataset, last.terms.beta, last.objective, last.seed) == (
            "two-moons",
            1,
            "nll",
            4,
        )
        assert all(run.config.fused for run in runs)

    def test_values_may_be_words_switches_and_none(self):
        settings = ["discriminator.widths=8 9,7", "fused=true,false", "terms.threshold=None,0.9"]
        configs = [run.config for run in plan(["digits"], [0], settings, [])]
        assert {c.discriminator.widths for c in configs} == {(8, 9), (7,)}
        assert {c.fused for c in configs} == {True, False}
        assert {c.terms.threshold for c in configs} == {None, 0.9}

    def test_a_setting_prevails_over_what_every_run_is_given(self):
        common = ["--terms.beta", "0.3", "--fused"]
        (run,) = plan(["digits"], [0], ["terms.beta=0.7", "fused=false"], common)
        assert run.config.terms.beta == 0.7 and not run.config.fused


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "common", "message"),
        [
            (["terms.betta=1"], [], "--set: got terms.betta, want an option"),
            (["terms=1"], [], "--set: got terms, want one of its options: w_sup_d"),
            (["terms.beta"], [], "--set: got 'terms.beta', want NAME=VALUE"),
            (["terms.beta=1,,2"], [], "--set: got 'terms.beta=1,,2', want NAME=VALUE"),
            (["terms.beta=0.5,1.5"], [], r"terms\.beta: got 1\.5"),
            (["terms.beta=1", "terms.beta=0"], [], "--set: .*want each option once"),
            (["terms.beta=1,1.0"], [], "repeats two-moons,terms.beta=1,seed=0"),
            (["fused=maybe"], [], "--set: got fused=maybe, want true or false"),
            (["seed=1,2"], [], "--set: got seed, which the sweep sets by --seeds"),
            (["labels=4,5001"], [], "two-moons,labels=5001,seed=0: num_labels.*5001"),
            (["discriminator.kind=dense,conv"], [], "two-moons.*: discriminator.kind: got conv"),
            (["shift=0,2"], [], "two-moons,shift=2,seed=0: shift, flip: got 2"),
            ([], ["--seed", "1"], "--seed: the sweep sets it; want --seeds"),
            ([], ["--out=there"], "--out: the sweep sets it"),
            ([], ["--resume", "x"], "--resume: the same sweep"),
        ],
    )
    def test_a_bad_configuration_before_anything_is_made(
        self, settings: list[str], common: list[str], message: str, tmp_path: Path, capsys
    ):
        out = tmp_path / "sweep"
        assert swept(*arguments(out, *settings, common=common)) == 2
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            (["--presets", "nonsense"], "--preset: got 'nonsense'"),
            (["--seeds"], "--presets, --seeds: got none"),
            (["--seeds", "1", "1"], "seed=1 repeats"),
            (["--seeds", "-1"], "seed: got -1"),
            (["--devices", "cpu", "cpu"], "--devices: got cpu cpu, want each device once"),
            (["--devices", "quantum"], "--device: got 'quantum'"),
            (["--jobs", "0"], "--jobs: got 0"),
            (["--target", "90"], "--target: got 90"),
        ],
    )
    def test_bad_options_of_its_own(self, own: list[str], message: str, tmp_path: Path, capsys):
        assert swept("--out", tmp_path / "sweep", *own) == 2
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "sweep").exists()

    def test_an_option_that_train_does_not_have(self, tmp_path: Path, capsys):
        assert swept(*arguments(tmp_path / "sweep", common=["--nonsense", "1"])) == 2
        assert "nonsense" in capsys.readouterr().err
        assert not (tmp_path / "sweep").exists()

    def test_fused_without_the_native_library(self, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(native, "_open", lambda: "the native CPU library is missing")
        assert swept(*arguments(tmp_path / "sweep", "fused=false,true")) == 2
        assert "fused=true,seed=0: --fused: the native CPU library" in capsys.readouterr().err
        assert not (tmp_path / "sweep").exists()

    def test_a_folder_at_work(self, tmp_path: Path, capsys):
        with locked(tmp_path), pytest.raises(InputError, match="--out: runs are at work"):
            locked(tmp_path).__enter__()
        assert swept(*arguments(Path("/proc/sweep"))) == 2
        assert "--out: cannot write in /proc/sweep" in capsys.readouterr().err

    def test_runs_of_another_configuration_are_left_alone(self, folder: Path, capsys):
        before = (folder / "sweep.json").read_bytes()
        other = [*TINY, "--steps", "41", "--terms.beta", "0.3"]
        assert swept(*arguments(folder, "optimiser.lr_g=0.001", common=other)) == 2
        assert "was made with other steps, terms; want the same" in capsys.readouterr().err
        assert (folder / "sweep.json").read_bytes() == before


class TestResults:
    def test_what_diverged_is_reported_and_the_others_go_on(self, folder: Path):
        runs = content(folder)["runs"]
        assert [run["status"] for run in runs] == ["finished", "finished", "failed", "failed"]
        assert all("diverged by step 10" in run["failure"] for run in runs[2:])
        assert [run["options"] for run in runs[1:3]] == [
            {"optimiser.lr_g": "0.001"},
            {"optimiser.lr_g": "1e30"},
        ]

    def test_the_table_is_over_the_results_of_the_runs(self, folder: Path):
        results = [run["results"] for run in content(folder)["runs"][:2]]
        good, bad = content(folder)["table"]
        assert (good["runs"], good["finished"], bad["finished"]) == (2, 2, 0)
        for metric in "flow_accuracy", "bits_per_dim", "seconds":
            values = [result[metric] for result in results]
            assert good["metrics"][metric]["mean"] == pytest.approx(mean(values))
            assert good["metrics"][metric]["std"] == pytest.approx(stdev(values))
        made = RunFolder(folder / "runs" / content(folder)["runs"][0]["name"])
        own = json.loads(made.results.read_text())
        assert own.items() <= results[0].items()

    def test_csv_and_markdown_hold_a_row_for_each_configuration(self, folder: Path):
        with (folder / "sweep.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["optimiser.lr_g"] for row in rows] == ["0.001", "1e30"]
        metrics = content(folder)["table"][0]["metrics"]
        assert float(rows[0]["flow_accuracy_mean"]) == metrics["flow_accuracy"]["mean"]
        assert rows[1]["flow_accuracy_mean"] == ""
        lines = (folder / "sweep.md").read_text().splitlines()
        assert lines[0].startswith("| preset | optimiser.lr_g | runs | flow, % |")
        assert lines[3].startswith("| two-moons | 1e30 | 0 of 2 | – |")

    def test_finished_runs_are_not_made_again_and_others_are_resumed(self, folder: Path, capsys):
        kept, again = (RunFolder(folder / "runs" / r["name"]) for r in content(folder)["runs"][:2])
        before, old = kept.results.stat().st_mtime_ns, json.loads(again.results.read_text())
        again.results.unlink()
        assert swept(*arguments(folder, "optimiser.lr_g=0.001", seeds="0 1")) == 0
        assert kept.results.stat().st_mtime_ns == before
        new = json.loads(again.results.read_text())
        # A run made anew would have spent other seconds.
        assert new["seconds"] == old["seconds"] and new["flow_accuracy"] == old["flow_accuracy"]
        assert re.search(r"two-moons +0\.001 +2 +\d", capsys.readouterr().out)

    def test_statistics_by_hand(self):
        def record(beta: str, seed: int, **results: float | None) -> dict:
            run = {"preset": "p", "options": {"beta": beta}, "seed": seed}
            return run | ({"results": results} if results else {})

        first, second = summarise(
            [
                record("0", 0, flow_accuracy=0.8, flow_seconds_to_target=None),
                record("1", 0, flow_accuracy=0.5, flow_seconds_to_target=None),
                record("0", 1, flow_accuracy=0.9, flow_seconds_to_target=3.0),
                record("0", 2),
            ]
        )
        assert (first["options"], first["runs"], first["finished"]) == ({"beta": "0"}, 3, 2)
        accuracy = first["metrics"]["flow_accuracy"]
        assert accuracy["mean"] == pytest.approx(0.85)
        assert accuracy["std"] == pytest.approx(0.1 / 2**0.5)
        assert first["metrics"]["flow_seconds_to_target"] == {"mean": 3.0, "std": None, "n": 1}
        assert second["metrics"]["flow_accuracy"] == {"mean": 0.5, "std": None, "n": 1}
        assert second["metrics"]["flow_seconds_to_target"] == {"mean": None, "std": None, "n": 0}

    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            ([{}], None),
            ([{"a": "1"}], None),
            ([{"a": "1"}, {"a": "1e-3"}], "a"),
            ([{"a": "1", "b": "full"}, {"a": "2", "b": "nll"}], "a"),
            ([{"a": "1", "b": "3"}, {"a": "2", "b": "3"}], "a"),
            ([{"a": "1", "b": "3"}, {"a": "2", "b": "4"}], None),
            ([{"a": "None"}, {"a": "2"}], None),
            ([{"a": "8 9"}, {"a": "2"}], None),
            ([{"a": "inf"}, {"a": "2"}], None),
        ],
    )
    def test_a_number_is_swept_if_it_alone_varies(self, options: list[dict], wanted: str | None):
        assert swept_number([{"options": row} for row in options]) == wanted

    def test_a_swept_number_has_a_picture(self, folder: Path, tmp_path: Path, capsys):
        assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
        common = [*TINY, "--steps", "2"]
        assert swept(*arguments(tmp_path, "objective=nll,full", common=common)) == 0
        assert not (tmp_path / "sweep.png").exists()
        assert "sweep.png" not in capsys.readouterr().out

    def test_time_to_target_is_that_of_the_first_evaluation_that_reaches_it(self):
        rows = [
            {"seconds": "1", "accuracy": ""},
            {"seconds": "2", "accuracy": "0.8"},
            {"seconds": "3", "accuracy": "0.9"},
            {"seconds": "4", "accuracy": "0.7"},
            {"seconds": "5", "accuracy": "0.95"},
        ]
        assert seconds_to_target(rows, "accuracy", 0.9) == 3
        assert seconds_to_target(rows, "accuracy", 0.96) is None
        assert seconds_to_target(rows, "absent", 0.1) is None


def test_a_stopped_sweep_saves_its_runs_and_continues(tmp_path: Path, capsys):
    common = [*TINY, "--steps", "100000", "--minutes", "0.05", "--save-every", "100000"]
    run = RunFolder(tmp_path / "runs" / "two-moons,seed=0")

    def interrupt() -> None:
        while not run.metrics.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    threading.Thread(target=interrupt, daemon=True).start()
    assert swept(*arguments(tmp_path, common=common)) == 130
    signal.signal(signal.SIGINT, before)
    assert "stopped: 0 of 1 runs are finished" in capsys.readouterr().out
    stopped = checkpoint.load(run.checkpoint)[1]["step"]
    assert stopped > 0 and not run.results.exists()
    assert content(tmp_path)["runs"][0]["status"] == "unfinished"
    assert swept(*arguments(tmp_path, common=common)) == 0
    assert json.loads(run.results.read_text())["steps"] > stopped
    log = (tmp_path / "logs" / "two-moons,seed=0.txt").read_text()
    assert f"stopped at step {stopped}; saved" in log


def test_sigterm_interrupts_as_control_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_at_once_share_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [threads_per_run(n) for n in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_per_run(1) == len(os.sched_getaffinity(0))


def test_tables_are_aligned_and_refuse_rows_of_another_width():
    rows = [["a", "1"], ["longer", "20"]]
    assert text_table(["name", "n"], rows) == "name     n\n------  --\na        1\nlonger  20"
    assert markdown_table(["name", "n"], rows).splitlines()[1] == "|---|---:|"
    for table in text_table, markdown_table:
        with pytest.raises(InputError, match="got one of 1 cells, want 2"):
            table(["name", "n"], [["a"]])
