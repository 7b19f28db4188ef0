"""Calibration, out-of-distribution detection, the judge of samples, and the report they end up in."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridflow import evaluate
from hybridflow.classifier import sample_accuracy, train_classifier
from hybridflow.config import PRESETS, FlowConfig
from hybridflow.data import load_dataset
from hybridflow.errors import InputError
from hybridflow.evaluate import calibration, inversion_error
from hybridflow.flow import MixtureFlow, VectorFlow
from hybridflow.metrics import (
    accuracy,
    auroc,
    class_accuracy,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
)
from hybridflow.ood import ood_aurocs
from hybridflow.pictures import reliability_picture
from hybridflow.prediction import Prediction
from hybridflow.run import RunFolder
from hybridflow.trainer import train

TINY = replace(
    PRESETS["digits"],
    steps=4,
    batch_labelled=20,
    batch_unlabelled=20,
    device="cpu",
    flow=FlowConfig(scales=2, couplings=2, hidden=4, last_hidden=4),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    assert train(TINY, folder) == 0
    return folder.path


@pytest.fixture(scope="module")
def planar_run(tmp_path_factory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "planar")
    config = replace(PRESETS["two-moons"], steps=5, device="cpu", flow=FlowConfig(couplings=2))
    assert train(config, folder) == 0
    return folder.path


def evaluated(monkeypatch, run: Path, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "--device", "cpu", *arguments])
    evaluate.main()
    part = "validation" if "validation" in arguments else "test"
    return json.loads((run / f"evaluation-{part}.json").read_text())


def overconfident(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits five times too large for the labels, which are drawn from softmax(logits / 5)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    return 5 * logits, labels


def prediction(log_prob: torch.Tensor, logits: torch.Tensor) -> Prediction:
    return Prediction(
        flow_log_probs=logits.log_softmax(1),
        discriminator_logits=logits,
        log_prob=log_prob,
        latents=torch.zeros(len(log_prob), 2),
        labels=torch.zeros(len(log_prob), dtype=torch.long),
        dims=2,
        levels=None,
    )


class TestTemperature:
    def test_it_finds_the_factor_by_which_the_logits_are_too_large(self):
        assert fit_temperature(*overconfident(20_000, 0)) == pytest.approx(5, rel=0.03)

    @pytest.mark.parametrize("factor", [0.01, 1.0, 200.0])
    def test_no_other_temperature_has_a_lower_nll(self, factor: float):
        logits, labels = overconfident(300, 1)
        logits = factor * logits
        temperature = fit_temperature(logits, labels)
        least = negative_log_likelihood(logits.double() / temperature, labels)
        for other in (1, 0.9 * temperature, 1.1 * temperature):
            assert least < negative_log_likelihood(logits.double() / other, labels)

    def test_it_scales_with_the_logits(self):
        logits, labels = overconfident(300, 1)
        temperature = fit_temperature(logits, labels)
        assert fit_temperature(1000 * logits, labels) == pytest.approx(1000 * temperature, rel=1e-4)

    def test_it_lowers_nll_and_ece_of_other_images_and_leaves_every_class(self):
        logits, labels = overconfident(2000, 2)
        figures = calibration(logits, labels, *overconfident(2000, 3))
        assert figures["nll_calibrated"] < figures["nll"]
        assert figures["ece_calibrated"] < 0.05 < 0.2 < figures["ece"]
        assert torch.equal((logits / figures["temperature"]).argmax(1), logits.argmax(1))

    def test_without_an_error_there_is_nothing_to_fit(self):
        logits = torch.eye(3)
        assert fit_temperature(logits, torch.arange(3)) == 1

    def test_before_and_after_agree_with_a_calculation_by_hand(self):
        # Two classes, logits (a, 0), class 0 right in 3 of 4: the best temperature makes the confidence 3/4.
        logits = torch.tensor([[math.log(9), 0.0]]).repeat(4, 1)
        labels = torch.tensor([0, 0, 0, 1])
        figures = calibration(logits, labels, logits, labels)
        assert figures["temperature"] == pytest.approx(math.log(9) / math.log(3), rel=1e-4)
        assert figures["ece"] == pytest.approx(0.9 - 0.75, abs=1e-6)
        assert figures["ece_calibrated"] == pytest.approx(0, abs=1e-4)
        assert figures["nll"] == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4, abs=1e-6)
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert figures["nll_calibrated"] == pytest.approx(entropy, abs=1e-6)


class TestMetrics:
    def test_class_accuracies_weighted_by_their_shares_sum_to_the_accuracy(self):
        generator = torch.Generator().manual_seed(0)
        predictions, targets = torch.randint(0, 7, (2, 500), generator=generator)
        by_class = class_accuracy(confusion_matrix(predictions, targets, 7))
        shares = targets.bincount(minlength=7) / 500
        assert (by_class * shares).sum().item() == pytest.approx(accuracy(predictions, targets))
        assert by_class[3] == accuracy(predictions[targets == 3], targets[targets == 3])

    def test_a_class_without_images_has_no_accuracy(self):
        assert class_accuracy(torch.tensor([[0, 0], [1, 3]])).isnan().tolist() == [True, False]

    def test_reliability_bins_have_the_calibration_error_as_their_mean_distance(self):
        logits, labels = overconfident(500, 4)
        probabilities = logits.double().softmax(1)
        bins = reliability_bins(probabilities, labels)
        gaps = (bins.accuracy - bins.confidence).abs() * bins.count / 500
        ece = expected_calibration_error(probabilities, labels)
        assert bins.count.sum() == 500
        assert gaps.sum().item() == pytest.approx(ece, abs=1e-6)

    def test_auroc_of_separable_inseparable_and_reversed_scores(self):
        low, high = torch.arange(0.0, 50), torch.arange(50.0, 90)
        assert auroc(high, low) == 1
        assert auroc(low, high) == 0
        assert auroc(low, low) == 0.5
        assert auroc(torch.zeros(3), torch.zeros(5)) == 0.5

    def test_auroc_counts_pairs_and_takes_infinities(self):
        inside = torch.tensor([3.0, 1.0, math.inf])
        outside = torch.tensor([2.0, 1.0, -math.inf])
        assert auroc(inside, outside) == pytest.approx((3 + 1.5 + 3) / 9)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: auroc(torch.tensor([math.nan]), torch.zeros(1)), "inside: .*NaN"),
            (lambda: auroc(torch.zeros(1), torch.zeros(0)), "outside: .*at least one"),
            (lambda: class_accuracy(torch.zeros(2, 3)), r"confusion: .*\(2, 3\)"),
            (lambda: fit_temperature(torch.zeros(2), torch.zeros(2).long()), "logits: wanted"),
            (lambda: fit_temperature(torch.zeros(1, 2), torch.tensor([2])), "targets: wanted"),
        ],
    )
    def test_wrong_arguments_are_named(self, call, message: str):
        with pytest.raises(InputError, match=message):
            call()


class TestOutOfDistribution:
    def test_typicality_notices_what_is_too_likely_and_the_density_does_not(self):
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(200, generator=generator) for _ in range(3)]
        same = torch.zeros(200, 3)
        inside, reference = prediction(noise[0] - 50, same), prediction(noise[1] - 50, same)
        outside = prediction(noise[2] - 20, same)
        aurocs = ood_aurocs(inside, outside, reference)
        assert aurocs == {"log_prob": 0, "typicality": 1, "discriminator_lse": 0.5}

    def test_the_discriminator_scores_by_its_logit_of_real(self):
        log_prob = torch.zeros(10)
        real, fake = torch.tensor([[4.0, -9.0]]), torch.tensor([[-4.0, -3.0]])
        inside, outside = (prediction(log_prob, logits.repeat(10, 1)) for logits in (real, fake))
        assert ood_aurocs(inside, outside, inside)["discriminator_lse"] == 1


def test_a_flow_that_is_no_bijection_shows_in_the_inversion_error(monkeypatch):
    torch.manual_seed(0)
    model, x = MixtureFlow(VectorFlow(2, 2, 8), 2, logit=False), torch.randn(30, 2)
    exact = inversion_error(model, x, levels=None, batch_size=20)
    assert exact["inversion_error_mean"] <= exact["inversion_error_max"] < 1e-5
    inverse = model.inverse
    monkeypatch.setattr(model, "inverse", lambda *z: inverse(*z) + torch.tensor([0.5, 0.0]))
    wrong = inversion_error(model, x, levels=None, batch_size=20)
    assert wrong["inversion_error_max"] == pytest.approx(0.5, abs=1e-5)
    assert wrong["inversion_error_mean"] == pytest.approx(0.25, abs=1e-5)


class TestClassifier:
    def test_it_learns_the_digits_and_judges_real_images_as_its_test_accuracy_says(self):
        digits = load_dataset("digits")
        classifier = train_classifier(digits, torch.device("cpu"), steps=60)
        assert classifier.test_accuracy > 0.9
        noise = torch.rand(digits.test_x.shape, generator=torch.Generator().manual_seed(0))
        dequantised = (digits.test_x + noise) / 17
        assert sample_accuracy(classifier, dequantised, digits.test_y) == classifier.test_accuracy
        wrong = (digits.test_y + 1) % 10
        assert sample_accuracy(classifier, dequantised, wrong) < 0.1

    def test_it_repeats_by_seed_and_leaves_the_random_state(self):
        moons, cpu = load_dataset("two-moons"), torch.device("cpu")
        state = torch.get_rng_state()
        a, b, c = (train_classifier(moons, cpu, steps=5, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        x = moons.test_x
        assert torch.equal(a.network(x), b.network(x))
        assert not torch.equal(a.network(x), c.network(x))


class TestReport:
    def test_it_holds_every_figure_and_the_earlier_ones_unchanged(self, run, monkeypatch, capsys):
        report = evaluated(monkeypatch, run, "--samples", "3", "--classifier-steps", "20")
        results = json.loads((run / "results.json").read_text())
        for name in "flow_accuracy", "discriminator_accuracy", "bits_per_dim", "flow_ece":
            assert report[name] == pytest.approx(results[name], abs=1e-6)
        for head in "flow", "discriminator":
            matrix = torch.tensor(report["confusion"][head])
            by_class = report[f"{head}_class_accuracy"]
            assert list(by_class) == list("0123456789")
            total = sum(a * n for a, n in zip(by_class.values(), matrix.sum(1), strict=True))
            assert float(total) / 360 == pytest.approx(report[f"{head}_accuracy"])
            assert report[f"{head}_nll"] > 0 and report[f"{head}_temperature"] > 0
            assert 0 <= report[f"{head}_ece_calibrated"] <= 1
        assert 0 <= report["heads_agree"] <= 1
        assert report["inversion_error_mean"] <= report["inversion_error_max"] < 1e-3
        assert "mass_between_arms" not in report
        assert "uniform dequantisation of 17 grey levels" in report["bits_per_dim_of"]
        assert report["samples"]["per_class"] == 3 and 0 <= report["samples"]["accuracy"] <= 1
        assert {"confusion-test.png", "reliability-test.png"} <= {p.name for p in run.iterdir()}
        output = capsys.readouterr().out
        for text in (
            "accuracy, %",
            "ECE at that temperature",
            "inversion error",
            "step 4: 360 test",
        ):
            assert text in output

    def test_a_temperature_never_raises_the_nll_of_the_validation_images(self, run, monkeypatch):
        report = evaluated(monkeypatch, run, "--part", "validation")
        for head in "flow", "discriminator":
            assert report[f"{head}_nll_calibrated"] <= report[f"{head}_nll"] + 1e-9

    def test_points_of_another_set_are_told_apart_and_bridges_are_measured(
        self, planar_run, monkeypatch, capsys
    ):
        report = evaluated(monkeypatch, planar_run, "--against", "pinwheel")
        assert report["ood"]["against"] == "pinwheel" and report["ood"]["images"] == 2000
        assert set(report["ood"]["auroc"]) == {"log_prob", "typicality", "discriminator_lse"}
        output = capsys.readouterr().out
        assert "AUROC against pinwheel (2000 images)" in output
        assert "mass between the arms" in output
        assert report["mass_between_arms_of_data"] == pytest.approx(0.001, abs=0.0005)
        assert report["mass_between_arms_of_data"] < report["mass_between_arms"] <= 1
        assert report["mass_between_arms_of_data"] < report["mass_between_arms_at_boundary"] <= 1
        itself = evaluated(monkeypatch, planar_run, "--against", "two-moons")
        assert itself["ood"]["auroc"]["log_prob"] == 0.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--against", "pinwheel"], r"--against: got pinwheel, of shape \(2,\); .*\(1, 8, 8\)"),
            (["--samples", "-1"], "--samples: got -1, want at least 0"),
            (["--classifier-steps", "0"], "--classifier-steps: got 0"),
        ],
    )
    def test_refusals_are_one_line_and_write_nothing(
        self, arguments: list[str], message: str, run, monkeypatch, capsys
    ):
        before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
        with pytest.raises(SystemExit) as exit_:
            evaluated(monkeypatch, run, *arguments)
        assert exit_.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert before == {p.name: p.stat().st_mtime_ns for p in run.iterdir()}


def test_a_reliability_diagram_needs_a_panel(tmp_path: Path):
    with pytest.raises(InputError, match="panels: wanted at least one"):
        reliability_picture({}, tmp_path / "picture.png")
