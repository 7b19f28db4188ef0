"""Evaluate a trained run: `python -m hybridflow.evaluate RUN`."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from hybridflow.checkpoint import atomic_write_text
from hybridflow.classifier import CLASSIFIER_STEPS, sample_accuracy, train_classifier
from hybridflow.cli import command
from hybridflow.config import DatasetName
from hybridflow.data import PLANAR, Dataset, fresh_points, load_dataset, load_split
from hybridflow.errors import InputError
from hybridflow.flow import MixtureFlow, dequantise
from hybridflow.metrics import (
    ReliabilityBins,
    accuracy,
    class_accuracy,
    expected_calibration_error,
    fit_temperature,
    mass_between_arms,
    negative_log_likelihood,
    reliability_bins,
)
from hybridflow.ood import SCORES, check_comparable, ood_aurocs
from hybridflow.pictures import confusion_picture, reliability_picture
from hybridflow.prediction import Prediction, predict
from hybridflow.run import RunFolder, TrainedRun
from hybridflow.sample import draw_boundary_samples, draw_samples
from hybridflow.tables import text_table

__all__ = ["bridges", "calibration", "inversion_error", "summary"]

_HEADS = ("flow", "discriminator")


@command
def main() -> None:
    """Command line."""
    tyro.cli(_evaluate, prog="python -m hybridflow.evaluate")


def _evaluate(
    run: tyro.conf.Positional[Path],
    part: Literal["test", "validation"] = "test",
    against: DatasetName | None = None,
    samples: int = 0,
    classifier_steps: int = CLASSIFIER_STEPS,
    device: str = "auto",
    data_dir: Path | None = None,
) -> None:
    """Evaluate both heads of a trained run and its density, at its newest checkpoint.

    Prints accuracies, likelihoods, calibration before and after one temperature fitted on the
    validation images, the error of the inverse, and for 2-D data the mass between the arms. They are
    written to evaluation-PART.json in the run folder, with confusion matrices and reliability diagrams
    as pictures beside it.

    Args:
        run: The run folder.
        part: Part of the data set: the test images, or the training images held out.
        against: Also detect images of this data set, by their likelihood, typicality and
            discriminator.
        samples: Also draw so many samples of each class, and classify them by a network of its own.
        classifier_steps: Training steps of that network, which learns from all training labels.
        device: cpu, cuda, cuda:N or auto.
        data_dir: Folder of the data files; by default the one the run was trained from.
    """
    if samples < 0:
        raise InputError(f"--samples: got {samples}, want at least 0")
    if classifier_steps < 1:
        raise InputError(f"--classifier-steps: got {classifier_steps}, want at least 1")
    trained, folder = TrainedRun.load(run, device), RunFolder(run)
    files = data_dir or trained.config.data_dir
    dataset, other = load_dataset(trained.config.dataset, files), None
    if against is not None:
        other = load_dataset(against, files)
        check_comparable(dataset, other)
    held_out = load_split(folder.split).validation
    x, y = dataset.train_x[held_out], dataset.train_y[held_out]
    prediction = validation = _predict(trained, x, y)
    if part == "test":
        x, y = dataset.test_x, dataset.test_y
        prediction = _predict(trained, x, y)
    report: dict[str, Any] = {"part": part, "images": len(x), "step": trained.step}
    report |= summary(prediction, validation, dataset)
    report |= inversion_error(trained.model, x, levels=dataset.levels)
    if dataset.name in PLANAR:
        report |= bridges(trained.model, dataset)
    if other is not None:
        report["ood"] = _detect(trained, other, prediction, validation)
    if samples:
        report["samples"] = _judge_samples(trained, dataset, samples, classifier_steps)
    _write(report, prediction, trained, folder)


def _write(
    report: dict[str, Any], prediction: Prediction, trained: TrainedRun, folder: RunFolder
) -> None:
    """Write the report and the pictures into the run folder; print it and where they are."""
    part, matrices = report["part"], prediction.confusion()
    report["confusion"] = {name: matrix.tolist() for name, matrix in matrices.items()}
    confusion, reliability = (
        folder.picture(f"{name}-{part}") for name in ("confusion", "reliability")
    )
    path = folder.path / f"evaluation-{part}.json"
    atomic_write_text(path, json.dumps(report, indent=2) + "\n")
    confusion_picture(matrices, confusion, class_names=trained.class_names)
    reliability_picture(_reliability(prediction, report), reliability)
    print(_text(report, trained), path, confusion, reliability, sep="\n")


def _predict(trained: TrainedRun, x: Tensor, y: Tensor) -> Prediction:
    return predict(trained.model, trained.discriminator, x, y, levels=trained.levels)


def summary(prediction: Prediction, validation: Prediction, dataset: Dataset) -> dict[str, Any]:
    """The figures of both heads and of the density, by the names of evaluation-PART.json.

    Accuracies and calibration errors are fractions, likelihoods in nats but for bits_per_dim.

    Args:
        prediction: of the images that are judged.
        validation: of images held out from training; the temperatures are fitted on them.
        dataset: what both are of.
    """
    figures: dict[str, Any] = prediction.summary()
    figures["bits_per_dim_of"] = _density(prediction, dataset)
    classes = {name: logits.argmax(1) for name, logits in prediction.logits.items()}
    figures["heads_agree"] = accuracy(classes["flow"], classes["discriminator"])
    for name, logits in prediction.logits.items():
        held_out = validation.logits[name], validation.labels
        for key, value in calibration(logits, prediction.labels, *held_out).items():
            figures[f"{name}_{key}"] = value
        by_class = class_accuracy(prediction.confusion()[name]).tolist()
        figures[f"{name}_class_accuracy"] = {
            label: None if math.isnan(value) else value
            for label, value in zip(dataset.class_names, by_class, strict=True)
        }
    return figures


def calibration(
    logits: Tensor, labels: Tensor, validation_logits: Tensor, validation_labels: Tensor
) -> dict[str, float]:
    """The temperature fitted on validation images, and what it does to the images that are judged.

    nll is the mean of -log p(y | x) in nats and ece the calibration error, a fraction;
    nll_calibrated and ece_calibrated are those of softmax(logits / temperature).

    Args:
        logits: (N, K), with `labels` (N,).
        labels: true classes.
        validation_logits: (V, K), with `validation_labels` (V,).
        validation_labels: true classes.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    temperature = fit_temperature(validation_logits, validation_labels)
    calibrated = logits.double() / temperature
    return {
        "nll": negative_log_likelihood(logits, labels),
        "ece": expected_calibration_error(logits.softmax(1), labels),
        "temperature": temperature,
        "nll_calibrated": negative_log_likelihood(calibrated, labels),
        "ece_calibrated": expected_calibration_error(calibrated.softmax(1), labels),
    }


@torch.no_grad()
def inversion_error(
    model: MixtureFlow, x: Tensor, *, levels: int | None, batch_size: int = 500
) -> dict[str, float]:
    """How exactly the flow is inverted in float32: max and mean of |x - G(F(x))| over all values.

    In the units of the data: 1 is the range of an image. Images are dequantised, by the same noise
    in each call; the random state is left as it was.

    Args:
        model: the flow.
        x: (N, …).
        levels: grey levels of x.
        batch_size: images at once.
    """
    device = model.prior.means.device
    largest, total = 0.0, 0.0
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        torch.manual_seed(0)
        for batch in x.split(batch_size):
            start = dequantise(batch.to(device), levels)
            z_k, z_n, _ = model(start)
            error = (start - model.inverse(z_k, z_n)).abs().double()
            largest, total = max(largest, error.max().item()), total + error.sum().item()
    return {"inversion_error_max": largest, "inversion_error_mean": total / x.numel()}


def bridges(model: MixtureFlow, dataset: Dataset) -> dict[str, float]:
    """`mass_between_arms` of the model's class-conditional samples, of samples halfway between two
    classes (β = 0.5), which the adversarial term is about, and, as a baseline, of new data.

    20000 points of each, with 100000 reference points and as many that set the threshold.

    Args:
        model: the flow.
        dataset: a 2-D data set, equally many points of each class.
    """
    samples, _ = draw_samples(model, dataset.classes, 20_000 // dataset.classes)
    boundary = draw_boundary_samples(model, 20_000)
    reference, fresh = (fresh_points(dataset.name, 100_000, seed) for seed in (2, 3))
    data = fresh_points(dataset.name, 20_000, 4)
    return {
        "mass_between_arms": mass_between_arms(samples, reference, fresh),
        "mass_between_arms_at_boundary": mass_between_arms(boundary, reference, fresh),
        "mass_between_arms_of_data": mass_between_arms(data, reference, fresh),
    }


def _detect(
    trained: TrainedRun, other: Dataset, inside: Prediction, validation: Prediction
) -> dict[str, Any]:
    """How well the test images of another data set are told from those inside."""
    x, y = other.test_x, other.test_y
    outside = predict(trained.model, trained.discriminator, x, y, levels=other.levels)
    aurocs = ood_aurocs(inside, outside, validation)
    return {"against": other.name, "images": len(x), "auroc": aurocs}


def _judge_samples(
    trained: TrainedRun, dataset: Dataset, count: int, steps: int
) -> dict[str, float]:
    """Accuracy of an independent classifier on `count` samples of each class, and on test images."""
    x, labels = draw_samples(trained.model, trained.classes, count)
    classifier = train_classifier(dataset, trained.model.prior.means.device, steps=steps)
    return {
        "per_class": count,
        "accuracy": sample_accuracy(classifier, x, labels),
        "classifier_test_accuracy": classifier.test_accuracy,
        "classifier_steps": steps,
    }


def _density(prediction: Prediction, dataset: Dataset) -> str:
    """What bits_per_dim is the figure of."""
    shape = "×".join(map(str, dataset.test_x.shape[1:]))
    if prediction.levels is None:
        return f"density of continuous data, D = {prediction.dims}; no dequantisation"
    padded = ", 28×28 padded with zeros" if "mnist" in dataset.name else ""
    text = (
        f"uniform dequantisation of {prediction.levels} grey levels, one draw an image, seed 0: "
        f"an upper bound; D = {prediction.dims} ({shape}{padded})"
    )
    if dataset.name == "svhn":
        text += "; SVHN's training and test images differ in distribution (arXiv:2312.02168)"
    return text


def _reliability(
    prediction: Prediction, report: dict[str, Any]
) -> dict[str, dict[str, ReliabilityBins]]:
    """By head, the bins of the reliability diagram before and after its temperature."""
    panels = {}
    for head, logits in prediction.logits.items():
        temperature = report[f"{head}_temperature"]
        named = {"as trained": 1.0, f"temperature {temperature:.3g}": temperature}
        panels[head] = {
            name: reliability_bins((logits.double() / t).softmax(1), prediction.labels)
            for name, t in named.items()
        }
    return panels


def _text(report: dict[str, Any], trained: TrainedRun) -> str:
    """The report for the terminal."""
    config = trained.config
    title = (
        f"{config.dataset}, {config.labels} labels, {config.objective}, seed {config.seed}, "
        f"step {report['step']}: {report['images']} {report['part']} images"
    )
    matrices = {name: torch.tensor(report["confusion"][name]) for name in _HEADS}
    classes = text_table(
        ["accuracy by class, %", "images", *_HEADS],
        [
            [name, str(count), *(_percent(report[f"{h}_class_accuracy"][name]) for h in _HEADS)]
            for name, count in zip(
                trained.class_names, matrices["flow"].sum(1).tolist(), strict=True
            )
        ],
    )
    tables = [_heads_table(report), classes, _density_table(report)]
    if "ood" in report:
        tables.append(_ood_table(report["ood"]))
    return "\n\n".join([title, *tables]) + "\n"


def _heads_table(report: dict[str, Any]) -> str:
    rows = [
        ("accuracy, %", "accuracy", _percent),
        ("NLL of the true class, nats", "nll", "{:.4f}".format),
        ("ECE, %", "ece", _percent),
        ("temperature, from validation", "temperature", "{:.4g}".format),
        ("NLL at that temperature, nats", "nll_calibrated", "{:.4f}".format),
        ("ECE at that temperature, %", "ece_calibrated", _percent),
    ]
    table = text_table(
        ["", *_HEADS],
        [[label, *(form(report[f"{h}_{key}"]) for h in _HEADS)] for label, key, form in rows],
    )
    lines = [table, f"the heads agree on {_percent(report['heads_agree'])} % of the images"]
    if any(report[f"{head}_temperature"] == 1 for head in _HEADS):
        lines.append("temperature 1: every validation image is right, which leaves nothing to fit")
    if report["part"] == "validation":
        lines.append("the temperature was fitted on these same images")
    return "\n".join(lines)


def _density_table(report: dict[str, Any]) -> str:
    rows = [
        f"bits/dim                {report['bits_per_dim']:.4f}",
        f"                        {report['bits_per_dim_of']}",
        f"inversion error         max {report['inversion_error_max']:.3g}, "
        f"mean {report['inversion_error_mean']:.3g} (|x - G(F(x))|, float32)",
    ]
    if "mass_between_arms" in report:
        rows.append(
            f"mass between the arms   {_percent(report['mass_between_arms'])} % of the samples, "
            f"{_percent(report['mass_between_arms_at_boundary'])} % of those between two classes, "
            f"{_percent(report['mass_between_arms_of_data'])} % of new data"
        )
    if judged := report.get("samples"):
        rows.append(
            f"samples                 {_percent(judged['accuracy'])} % of {judged['per_class']} per class "
            f"are of their class, says a classifier right on "
            f"{_percent(judged['classifier_test_accuracy'])} % of the test images"
        )
    return "\n".join(rows)


def _ood_table(ood: dict[str, Any]) -> str:
    names = dict(zip(SCORES, ("log p(x)", "typicality", "discriminator's LSE"), strict=True))
    header = [f"AUROC against {ood['against']} ({ood['images']} images)", ""]
    return text_table(header, [[names[k], f"{ood['auroc'][k]:.4f}"] for k in SCORES])


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f}"


if __name__ == "__main__":
    main()
