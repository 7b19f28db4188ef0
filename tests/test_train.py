"""A run end to end: what it leaves behind, how it resumes, and how it refuses."""

import csv
import gzip
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridflow import checkpoint
from hybridflow.cli import parse_config, preset
from hybridflow.config import (
    PRESETS,
    Config,
    FlowConfig,
    config_from_json,
    config_to_json,
    validated,
)
from hybridflow.errors import InputError
from hybridflow.kernels import native
from hybridflow.run import RunFolder, TrainedRun
from hybridflow.trainer import Trainer, resume, train

TINY = replace(
    PRESETS["digits"],
    steps=12,
    batch_labelled=20,
    batch_unlabelled=20,
    log_every=3,
    eval_every=6,
    save_every=4,
    device="cpu",
    flow=FlowConfig(scales=2, couplings=2, hidden=4, last_hidden=4),
)
TINY_ARGUMENTS = (
    "--batch-labelled 20 --batch-unlabelled 20 --log-every 3 --eval-every 6 --save-every 4 "
    "--flow.couplings 2 --flow.hidden 4 --flow.last-hidden 4 --device cpu"
).split()
RESULT_KEYS = (
    "dataset labels seed objective fused device steps seconds images_per_second flow_accuracy "
    "discriminator_accuracy bits_per_dim flow_ece discriminator_ece versions commit"
).split()


def command(module: str, *arguments: str | Path, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"hybridflow.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finished(module: str, *arguments: str | Path, **options) -> tuple[int, str, str]:
    process = command(module, *arguments, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def refusal(module: str, *arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line prints on standard error as it exits with status 2, in this process."""
    main = importlib.import_module(f"hybridflow.{module}").main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        main()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open() as file:
        return list(csv.DictReader(file))


def timeless(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}


def same_state(a: Path, b: Path) -> bool:
    (x, _), (y, _) = checkpoint.load(a), checkpoint.load(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    assert train(TINY, folder) == 0
    return folder


def test_a_run_leaves_its_files(finished_run: RunFolder):
    names = {path.name for path in finished_run.path.iterdir()}
    assert names == {
        "config.json",
        "split.json",
        "checkpoint.safetensors",
        "start.safetensors",
        "metrics.csv",
        "results.json",
        "tensorboard",
        "samples.png",
        "latent.png",
        "confusion.png",
        "curves.png",
    }
    assert any(finished_run.tensorboard.iterdir())


def test_results_hold_what_they_should(finished_run: RunFolder):
    results = json.loads(finished_run.results.read_text())
    assert list(results) == RESULT_KEYS
    assert results["steps"] == 12 and results["fused"] is False
    for name in "flow_accuracy", "discriminator_accuracy", "flow_ece", "discriminator_ece":
        assert 0 <= results[name] <= 1
    assert results["images_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__


def test_metrics_have_a_row_per_log_and_evaluation(finished_run: RunFolder):
    logged = rows(finished_run)
    assert [row["step"] for row in logged] == ["3", "6", "9", "12"]
    assert all(float(row["loss_g"]) and float(row["loss_d"]) for row in logged)
    assert [bool(row["validation_flow_accuracy"]) for row in logged] == [False, True, False, True]


def test_a_profile_tells_the_time_of_every_phase(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = RunFolder(tmp_path / "profiled")
    assert train(replace(TINY, steps=16, profile=True), folder) == 0
    profile = json.loads(folder.profile.read_text())
    phases = profile["phases"]
    calls = {name: row["calls"] for name, row in phases.items()}
    assert profile["steps"] == 16
    assert {calls[n] for n in ("data", "flow", "sampling", "backward of the flow")} == {16}
    assert calls["optimisers"] == 32 and calls["evaluation"] == 3 and calls["checkpoint"] == 4
    assert all(row["seconds"] > 0 for row in phases.values())
    seconds = sum(row["seconds"] for row in phases.values())
    assert seconds == pytest.approx(profile["seconds"], rel=1e-3)
    with gzip.open(folder.trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == "sampling"]
    assert len(named) == 3
    output = capsys.readouterr().out
    assert "ms a call" in output and str(folder.profile) in output


def test_a_profile_changes_no_result(finished_run: RunFolder, tmp_path: Path):
    folder = RunFolder(tmp_path / "profiled")
    assert train(replace(TINY, profile=True), folder) == 0
    assert same_state(folder.checkpoint, finished_run.checkpoint)


def test_runs_with_one_seed_are_equal_and_with_two_are_not(finished_run: RunFolder, tmp_path: Path):
    again, other = RunFolder(tmp_path / "again"), RunFolder(tmp_path / "other")
    assert train(TINY, again) == 0
    assert train(replace(TINY, seed=1), other) == 0
    assert same_state(finished_run.checkpoint, again.checkpoint)
    assert not same_state(finished_run.checkpoint, other.checkpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_resume_and_continues_bit_for_bit(
    finished_run: RunFolder, tmp_path: Path, monkeypatch, capsys, number: signal.Signals
):
    folder = RunFolder(tmp_path / "run")
    one_step = Trainer._one_step

    def stop_at_five(trainer: Trainer) -> None:
        one_step(trainer)
        if trainer.done == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stop_at_five)
        assert train(TINY, folder) == 128 + number
    assert f"python -m hybridflow.train --resume {folder.path}" in capsys.readouterr().out
    assert checkpoint.load(folder.checkpoint)[1]["step"] == 5
    assert not folder.results.exists()
    torch.manual_seed(99)
    assert resume(folder.read_config(), folder) == 0
    assert same_state(folder.checkpoint, finished_run.checkpoint)
    assert [timeless(r) for r in rows(folder)] == [timeless(r) for r in rows(finished_run)]


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path: Path):
    folder, straight = RunFolder(tmp_path / "killed"), RunFolder(tmp_path / "straight")
    arguments = [*TINY_ARGUMENTS, "--steps", "60", "--save-every", "1"]
    process = command("train", *arguments, "--out", folder.path)
    deadline = time.monotonic() + 60
    while not folder.metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    _, data = checkpoint.load(folder.checkpoint)
    assert 0 < data["step"] < 60
    status, _, errors = finished("train", "--resume", folder.path)
    assert status == 0, errors
    assert json.loads(folder.results.read_text())["steps"] == 60
    assert finished("train", *arguments, "--out", straight.path)[0] == 0
    assert same_state(folder.checkpoint, straight.checkpoint)
    assert [timeless(r) for r in rows(folder)] == [timeless(r) for r in rows(straight)]


def test_the_latents_of_the_start_are_kept_as_they_were(finished_run: RunFolder, tmp_path: Path):
    folder = RunFolder(tmp_path / "resumed")
    assert train(replace(TINY, minutes=1e-9), folder) == 0
    start, first = folder.start.read_bytes(), folder.picture("latent").read_bytes()
    latents, means = (checkpoint.load(folder.start)[0][name] for name in ("latents", "means"))
    assert latents.shape == (360, 32) and means.shape == (10, 32)
    assert start == finished_run.start.read_bytes()
    assert resume(replace(folder.read_config(), minutes=None), folder) == 0
    assert folder.start.read_bytes() == start
    both = folder.picture("latent").read_bytes()
    assert both != first and both == finished_run.picture("latent").read_bytes()
    folder.start.unlink()  # as in a run of an earlier version
    assert resume(folder.read_config(), folder) == 0
    assert folder.picture("latent").read_bytes() != both


def test_minutes_end_a_run_early_with_a_report(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert train(replace(TINY, steps=100_000, minutes=0.01), folder) == 0
    results = json.loads(folder.results.read_text())
    assert 0 < results["steps"] < 100_000
    assert results["seconds"] < 30


def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path: Path, capsys):
    folder = RunFolder(tmp_path / "run")
    optimiser = replace(TINY.optimiser, lr_g=1e30)
    assert train(replace(TINY, optimiser=optimiser), folder) == 1
    assert re.search(r"diverged by step 3: .*loss_g = nan", capsys.readouterr().err)
    state, data = checkpoint.load(folder.checkpoint)
    assert data["step"] == 0 and all(t.isfinite().all() for t in state.values())
    assert not folder.results.exists()


def test_epochs_set_the_number_of_steps(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert train(replace(TINY, epochs=0.1), folder) == 0
    steps_per_epoch = -(-(1797 - 360 - TINY.validation) // 20)
    assert json.loads(folder.results.read_text())["steps"] == round(0.1 * steps_per_epoch)


@pytest.mark.parametrize("dataset", ["pinwheel", "two-moons"])
def test_two_dimensional_data_train(dataset: str, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert train(replace(PRESETS[dataset], steps=5, validation=20), folder) == 0
    assert folder.picture("samples").exists()


def test_evaluate_agrees_with_the_results(finished_run: RunFolder):
    status, output, errors = finished("evaluate", finished_run.path)
    assert status == 0, errors
    report = json.loads((finished_run.path / "evaluation-test.json").read_text())
    results = json.loads(finished_run.results.read_text())
    for name in "flow_accuracy", "discriminator_accuracy", "bits_per_dim", "flow_ece":
        assert report[name] == pytest.approx(results[name], abs=1e-6)
    assert sum(map(sum, report["confusion"]["flow"])) == 360
    assert "accuracy, %" in output
    assert finished("evaluate", finished_run.path, "--part", "validation")[0] == 0


def test_sample_writes_a_picture_and_repeats_by_seed(finished_run: RunFolder, tmp_path: Path):
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path, seed in zip(pictures, ("3", "3", "4"), strict=True):
        status, output, errors = finished(
            "sample", finished_run.path, "--count", "2", "--seed", seed, "--out", path
        )
        assert status == 0, errors
        assert str(path) in output
    a, b, c = (path.read_bytes() for path in pictures)
    assert a == b != c


def test_a_trained_run_is_read_back(finished_run: RunFolder):
    run = TrainedRun.load(finished_run.path, "cpu")
    assert (run.step, run.classes, run.levels) == (12, 10, 17)
    assert run.model.log_prob(torch.rand(3, 1, 8, 8)).shape == (3,)


class TestRefusals:
    """One clear line, exit status 2, nothing written or overwritten."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--labels", "5000"], "labels.*5000"),
            (["--labels", "3"], "labels.*3"),
            (["--labels", "-1"], "labels: got -1"),
            (["--validation", "2000"], "validation.*2000"),
            (["--preset", "nonsense"], "--preset: got 'nonsense', want one of digits"),
            (["--device", "quantum"], "--device: got 'quantum'"),
            (["--terms.beta", "1.5"], r"terms\.beta: got 1\.5"),
            (["--flow.scales", "4"], r"flow\.scales: .*8x8"),
            (["--discriminator.kind", "conv"], r"discriminator\.kind: got conv"),
            (["--dataset", "two-moons", "--terms.w-con-g", "1"], r"terms\.w_con.*only images"),
            (["--strong.cutout", "2"], r"strong\.cutout: got 2"),
            (["--dataset", "mnist", "--data-dir", "/nowhere"], "train-images-idx3-ubyte.gz"),
        ],
    )
    def test_bad_arguments(self, arguments: list[str], message: str, tmp_path: Path, capsys):
        out = tmp_path / "run"
        errors = refusal("train", *arguments, "--steps", "1", "--out", out, capsys=capsys)
        assert re.match(f"error: .*{message}", errors, re.DOTALL), errors
        assert not out.exists()

    def test_as_a_program_too(self, tmp_path: Path):
        status, output, errors = finished("train", "--labels", "5000", "--out", tmp_path / "run")
        assert (status, output) == (2, "")
        assert errors.startswith("error: ") and errors.count("\n") == 1

    def test_a_folder_that_holds_something_is_left_alone(self, finished_run: RunFolder):
        before = finished_run.results.read_bytes()
        with pytest.raises(InputError, match=r"--out: .* is not empty.*--resume"):
            train(TINY, finished_run)
        assert finished_run.results.read_bytes() == before

    @pytest.mark.parametrize("kind", ["under a file", "read-only"])
    def test_an_out_that_cannot_be_written(self, kind: str, tmp_path: Path):
        (tmp_path / "file").write_text("mine")
        path = tmp_path / "file" / "run" if kind == "under a file" else Path("/proc/run")
        with pytest.raises(InputError, match="--out: cannot make"):
            train(TINY, RunFolder(path))
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
    @pytest.mark.parametrize("module", ["train", "evaluate", "sample"])
    def test_a_damaged_checkpoint(
        self, damage: str, module: str, finished_run: RunFolder, tmp_path: Path, capsys
    ):
        folder = RunFolder(tmp_path / "run")
        shutil.copytree(finished_run.path, folder.path)
        data = bytearray(folder.checkpoint.read_bytes())
        if damage == "missing":
            folder.checkpoint.unlink()
        else:
            data[-100] ^= 1
            folder.checkpoint.write_bytes(data[:-1000] if damage == "truncated" else data)
        before = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
        arguments = ["--resume", folder.path] if module == "train" else [folder.path]
        errors = refusal(module, *arguments, capsys=capsys)
        assert re.match(rf"error: {folder.checkpoint}: ", errors), errors
        assert before == {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}

    def test_a_resumed_run_keeps_its_architecture(self, finished_run: RunFolder, capsys):
        arguments = ["--resume", finished_run.path, "--flow.hidden", "9"]
        errors = refusal("train", *arguments, capsys=capsys)
        assert "--resume: flow differ" in errors

    def test_fused_without_the_native_library(self, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(native, "_open", lambda: "the native CPU library is missing")
        out = tmp_path / "run"
        errors = refusal("train", "--fused", "--device", "cpu", "--out", out, capsys=capsys)
        assert errors == "error: --fused: the native CPU library is missing\n"
        assert not out.exists()

    def test_no_run_at_all(self, tmp_path: Path, capsys):
        for module in "evaluate", "sample":
            errors = refusal(module, tmp_path, capsys=capsys)
            assert f"error: run: got {tmp_path}, want a run folder" in errors


def test_presets_are_valid_and_survive_json():
    for config in PRESETS.values():
        assert validated(config) == config
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_the_default_command_line_is_the_preset():
    for name, config in PRESETS.items():
        defaults, rest = preset(["--preset", name])
        assert parse_config(defaults, rest, "", "") == config == Config(**vars(config))
