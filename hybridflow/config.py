"""Configuration: dataclasses, and the presets, which are instances of them.

A default lives here and nowhere else; the command line is generated from these classes.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from hybridflow.errors import InputError

__all__ = [
    "PRESETS",
    "Config",
    "DiscriminatorConfig",
    "FlowConfig",
    "ObjectiveConfig",
    "OptimiserConfig",
    "Precision",
    "StrongConfig",
    "config_from_json",
    "config_to_json",
    "validated",
]

DatasetName = Literal[
    "digits", "pinwheel", "two-moons", "mnist", "fashion-mnist", "svhn", "cifar10"
]
Precision = Literal["fp32", "high", "bf16"]
Objective = Literal[
    "supervised", "nll", "nll+adversarial", "full", "flowgmm", "flowgmm+consistency", "fm-gan"
]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class FlowConfig:
    """The flow. 2-D data use `couplings` and `hidden` only."""

    scales: PositiveInt = 3
    """Scales; half of the channels is factored out between two of them."""
    couplings: PositiveInt = 8
    """Steps (actnorm and coupling) per scale."""
    hidden: PositiveInt = 128
    """Hidden channels of a coupling's conditioner."""
    last_hidden: PositiveInt = 512
    """Hidden channels of the last, wide coupling."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator: dense for small grey images and vectors, convolutional for colour images."""

    kind: Literal["dense", "conv"] = "dense"
    """Network."""
    widths: tuple[PositiveInt, ...] = (1000, 500, 250, 250, 250)
    """Dense: hidden layers. Conv: channels of each block."""
    input_noise: NonNegativeFloat = 0.3
    """Standard deviation of the Gaussian noise added to the input while training."""
    hidden_noise: NonNegativeFloat = 0.5
    """Dense: the same before each later layer."""
    input_dropout: Fraction = 0.2
    """Conv: dropout on the input."""
    block_dropout: Fraction = 0.5
    """Conv: dropout after each block."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms (Tables 4.1 and 4.2, Appendix B) and of the boundary-aware samples."""

    w_sup_d: NonNegativeFloat = 1.0
    """Discriminator: cross-entropy on labelled images."""
    w_adv_d: NonNegativeFloat = 1.0
    """Discriminator: real against generated."""
    w_pl_d: NonNegativeFloat = 0.01
    """Discriminator: agreement with the flow on unlabelled images."""
    w_sup_g: NonNegativeFloat = 1.0
    """Flow: supervised likelihood -log p(y|x)."""
    w_nll: NonNegativeFloat = 0.01
    """Flow: negative log-likelihood in nats per dimension."""
    w_joint: NonNegativeFloat = 1.0
    """Flow, objectives flowgmm only: -log p(x,y) and -log p(x), in nats per dimension."""
    w_joint_con: NonNegativeFloat = 1.0
    """Flow, objective flowgmm+consistency only: -log p(x'',y) for the class y of another view x'."""
    w_fm_g: NonNegativeFloat = 1.0
    """Flow, objective fm-gan only: its samples' mean features should be those of images."""
    w_adv_g: NonNegativeFloat = 0.01
    """Flow: its samples should pass as real and of their class."""
    w_pl_g: NonNegativeFloat = 1.0
    """Flow: agreement with the discriminator on unlabelled images."""
    w_con_d: NonNegativeFloat = 0.0
    """Discriminator: strong views of unlabelled images should be of the class it gives the images."""
    w_con_g: NonNegativeFloat = 0.0
    """Flow: the same, also with the class that the discriminator gives."""
    confidence: Fraction = 0.95
    """Consistency asks this probability of a class, and leaves other images out."""
    curriculum: bool = False
    """Ask less of the classes that fewer images reach the confidence in, and little of any at first.
    For classes of about equal size."""
    teacher: Literal["current", "averaged"] = "current"
    """Weights of the discriminator that judge unlabelled images for the flow and for consistency:
    those in training, with their noise, or the averaged ones, without."""
    smoothing: Fraction = 0.0
    """Label smoothing in both supervised terms."""
    beta: Fraction = 0.5
    """Interpolation between two classes' latents; 1 is plain class-conditional sampling."""
    threshold: Fraction | None = None
    """Leave labelled images out of the flow's supervised term once p(y|x) exceeds this."""


@dataclass(frozen=True)
class StrongConfig:
    """Ranges of the strong views that consistency compares images with; each is drawn from -r to r."""

    rotate: NonNegativeFloat = 30.0
    """Rotation, in degrees."""
    zoom: NonNegativeFloat = 0.2
    """Logarithm of the factors by which width and height change."""
    shear: NonNegativeFloat = 0.2
    """Shear."""
    shift: Fraction = 0.1
    """Shift, as a share of the image's side."""
    contrast: Fraction = 0.3
    """Change of the contrast, as a share of it."""
    brightness: Fraction = 0.1
    """Change of the brightness, of a range of 1."""
    cutout: Fraction = 0.0
    """Side of the square that is covered, as a share of the image's side."""


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam for both networks."""

    lr_g: PositiveFloat = 1e-3
    """Learning rate of the flow."""
    lr_d: PositiveFloat = 3e-3
    """Learning rate of the discriminator."""
    beta1_g: Fraction = 0.9
    """Adam's β1, flow."""
    beta1_d: Fraction = 0.5
    """Adam's β1, discriminator."""
    decay_from: Annotated[float, Field(ge=0, lt=1)] = 2 / 3
    """Fraction of the run after which both learning rates fall linearly to 0."""
    clip: PositiveFloat = 10.0
    """Largest gradient norm, flow and discriminator each."""
    ema_decay: Fraction = 0.9999
    """Weight averaging: limit of the decay, which rises as (1 + t) / (10 + t)."""


@dataclass(frozen=True)
class Config:
    """One run."""

    dataset: DatasetName = "digits"
    """Data set; also chooses the preset unless --preset is given."""
    labels: PositiveInt = 100
    """Number of labelled images, balanced over the classes."""
    validation: PositiveInt = 200
    """Number of training images held out for every choice."""
    seed: NonNegativeInt = 0
    """Seed of the label split, the initial weights and the training."""
    objective: Objective = "full"
    """A row of the ablation, or a baseline: flowgmm, with or without consistency, or fm-gan."""
    fused: bool = False
    """Swap in the fused kernels."""
    graphs: bool = True
    """With --fused on a GPU: replay the step as one CUDA graph."""
    profile: bool = False
    """Time each phase of the run, and trace three of its steps."""
    steps: PositiveInt = 1000
    """Training steps."""
    epochs: PositiveFloat | None = None
    """Passes over the unlabelled images; given, it sets the number of steps."""
    minutes: PositiveFloat | None = None
    """Stop after so many minutes of training, at the last step done by then."""
    batch_labelled: PositiveInt = 100
    """Labelled images per step."""
    batch_unlabelled: PositiveInt = 200
    """Unlabelled images per step; as many are generated."""
    shift: NonNegativeInt = 0
    """Augmentation: largest random shift, in pixels."""
    mirror: bool = False
    """Augmentation: random horizontal flip (never for digits)."""
    precision: Precision = "fp32"
    """Arithmetic of the networks while training: fp32; high, whose products are of float32 with some
    16 bits, of TF32 on a GPU and by AMX on a CPU; or bf16. Likelihoods and log-determinants stay fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where there is one."""
    data_dir: Path | None = None
    """Folder of the data files; by default a cache folder of the user's."""
    out: Path | None = None
    """Run folder; by default one under runs/, named after the run."""
    log_every: PositiveInt = 50
    """Steps between rows of metrics.csv."""
    eval_every: PositiveInt = 250
    """Steps between evaluations on the validation images."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    terms: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    strong: StrongConfig = field(default_factory=StrongConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


_ADAPTER = TypeAdapter(Config)


def validated(config: Config) -> Config:
    """The same configuration, each value checked against its type and range.

    Raises:
        InputError: naming each argument that is wrong, the value given and the one wanted.
    """
    return _checked(_ADAPTER.dump_python(config))


def config_to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    return _ADAPTER.dump_python(config, mode="json")


def config_from_json(values: dict[str, Any]) -> Config:
    """The inverse of `config_to_json`; raises InputError as `validated` does."""
    return _checked(values)


def _checked(values: dict[str, Any]) -> Config:
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        wrong = (
            f"{'.'.join(str(part) for part in e['loc'])}: got {e['input']!r}, {e['msg'].lower()}"
            for e in error.errors()
        )
        raise InputError("; ".join(wrong)) from None


_IMAGE_CONV = DiscriminatorConfig(kind="conv", widths=(64, 128), input_noise=0.05)
_COLOUR_OPTIMISER = OptimiserConfig(lr_d=3e-4)
_SHORT_RUN = ObjectiveConfig(w_nll=1.0, w_pl_g=10.0)
_TAUGHT = replace(_SHORT_RUN, w_con_d=1.0, w_con_g=1.0, teacher="averaged")
_DIGITS = Config(
    steps=1500,
    flow=FlowConfig(scales=2, couplings=4, hidden=32, last_hidden=64),
    discriminator=DiscriminatorConfig(widths=(256, 256, 128), input_noise=0.2, hidden_noise=0.3),
    terms=_SHORT_RUN,
)
_TWO_DIMENSIONAL = replace(
    _DIGITS,
    labels=10,
    flow=FlowConfig(couplings=8, hidden=64),
    discriminator=DiscriminatorConfig(widths=(128, 128), input_noise=0.05, hidden_noise=0.0),
)
_MNIST = Config(dataset="mnist", validation=5000, steps=330_000, eval_every=1000)
_MNIST_BEST = replace(
    _MNIST,
    steps=100_000,
    shift=2,
    discriminator=replace(_IMAGE_CONV, block_dropout=0.2, input_dropout=0.0),
    optimiser=OptimiserConfig(lr_d=2e-3, beta1_d=0.9),
    terms=replace(_TAUGHT, confidence=0.99),
    strong=StrongConfig(rotate=20.0, zoom=0.15, shear=0.15, contrast=0.2, brightness=0.0),
)
_GREY_SMALL = replace(
    _MNIST_BEST,
    steps=8000,
    eval_every=500,
    batch_labelled=30,
    batch_unlabelled=100,
    flow=FlowConfig(couplings=4, hidden=32, last_hidden=64),
    discriminator=replace(_MNIST_BEST.discriminator, widths=(8, 16, 32)),
)
_MNIST_SMALL = replace(
    _GREY_SMALL,
    steps=6000,
    flow=FlowConfig(couplings=8, hidden=64, last_hidden=256),
    discriminator=replace(_GREY_SMALL.discriminator, widths=(16, 32, 64)),
    terms=replace(_GREY_SMALL.terms, confidence=0.95, curriculum=True),
    strong=replace(_GREY_SMALL.strong, cutout=0.4),
)
_CIFAR10 = Config(
    dataset="cifar10",
    labels=4000,
    validation=5000,
    steps=270_000,
    eval_every=1000,
    flow=FlowConfig(couplings=16, hidden=128, last_hidden=1024),
    discriminator=replace(_IMAGE_CONV, widths=(96, 192)),
    optimiser=_COLOUR_OPTIMISER,
)
_SVHN = replace(
    _CIFAR10,
    dataset="svhn",
    labels=1000,
    steps=410_400,
    flow=FlowConfig(couplings=8, hidden=512, last_hidden=512),
    discriminator=_IMAGE_CONV,
)
_SVHN_BEST, _CIFAR10_BEST = (
    replace(
        config,
        shift=4,
        terms=replace(_TAUGHT, w_sup_g=0.1),
        strong=StrongConfig(rotate=15.0, cutout=0.5),
    )
    for config in (_SVHN, _CIFAR10)
)

PRESETS: dict[str, Config] = {
    "digits": _DIGITS,
    "digits-best": replace(
        _DIGITS,
        steps=3000,
        shift=1,
        terms=_TAUGHT,
        strong=StrongConfig(rotate=15.0, zoom=0.1, shear=0.1, shift=0.06),
    ),
    "pinwheel": replace(_TWO_DIMENSIONAL, dataset="pinwheel"),
    "two-moons": replace(_TWO_DIMENSIONAL, dataset="two-moons"),
    "mnist": _MNIST,
    "mnist-best": replace(_MNIST_BEST, terms=replace(_MNIST_BEST.terms, curriculum=True)),
    "mnist-small": _MNIST_SMALL,
    "fashion-mnist": replace(_MNIST, dataset="fashion-mnist", labels=1000),
    "fashion-mnist-best": replace(_MNIST_BEST, dataset="fashion-mnist", labels=1000, mirror=True),
    "fashion-mnist-small": replace(_GREY_SMALL, dataset="fashion-mnist", labels=1000, mirror=True),
    "svhn": _SVHN,
    "svhn-best": _SVHN_BEST,
    "cifar10": _CIFAR10,
    "cifar10-best": replace(_CIFAR10_BEST, mirror=True),
    "cifar10-small": replace(
        _CIFAR10_BEST,
        steps=2000,
        eval_every=250,
        mirror=True,
        batch_labelled=32,
        batch_unlabelled=64,
        flow=FlowConfig(couplings=4, hidden=32, last_hidden=64),
        discriminator=replace(_IMAGE_CONV, widths=(32, 64), input_dropout=0.0, block_dropout=0.2),
        optimiser=OptimiserConfig(lr_d=1e-3, beta1_d=0.9),
        # Untrained, -log p(y|x) in 768 dimensions is some 170 nats: at full weight it drowns the rest.
        terms=replace(_TAUGHT, w_sup_g=0.01, w_con_g=0.01),
    ),
}
"""Presets by name.

One named after a data set carries, for mnist, svhn and cifar10, Tables A.1–A.3, the weights of Appendix B and
the 1200 epochs of the thesis. Those for small data sets, and all others, are ours: -best adds augmentation
and consistency, with labels from the discriminator's averaged weights (only that of the digits has been
measured yet); -small is for CPUs, runs of thousands of steps, which learn a density only if it weighs more.
"""
