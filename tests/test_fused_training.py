"""Training with the fused kernels follows training without them.

The likelihood's training is stable: run freely, both give one loss curve. With the discriminator the
training is chaotic: plain runs whose weights differ by one rounding part by 1e-2 within tens of steps,
the discriminator's terms first. So there each step starts from the same state.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridflow.config import PRESETS
from hybridflow.data import load_dataset, make_split
from hybridflow.kernels import native
from hybridflow.run import RunFolder
from hybridflow.trainer import Trainer

STEPS = 200
pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")
Start = Callable[[bool, str], Trainer]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """The default run at its start, fused or not, for an objective."""
    dataset = load_dataset("digits")

    def trainer(fused: bool, objective: str) -> Trainer:
        config = replace(PRESETS["digits"], fused=fused, objective=objective, device="cpu")
        split = make_split(
            dataset.train_y,
            classes=dataset.classes,
            num_labels=config.labels,
            num_validation=config.validation,
            seed=config.seed,
        )
        made = Trainer(config, RunFolder(tmp_path), dataset, split)
        made.initialise()
        return made

    return trainer


def losses(trainer: Trainer) -> dict[str, float]:
    trainer._one_step()
    return trainer._read_sums()


def test_likelihood_training_gives_the_same_loss_curve(start: Start):
    curves = []
    for fused in False, True:
        trainer = start(fused, "nll")
        curves.append([losses(trainer) for _ in range(STEPS)])
    for step, (plain, fused) in enumerate(zip(*curves, strict=True)):
        for name in "loss_g", "nll":
            assert fused[name] == pytest.approx(plain[name], rel=1e-3), (step, name)


def test_every_term_agrees_along_the_path_of_the_full_objective(start: Start):
    plain, fused = start(False, "full"), start(True, "full")
    for step in range(STEPS):
        fused.step.load_state_dict(plain.step.state_dict())
        random = torch.get_rng_state()
        expected = losses(plain)
        torch.set_rng_state(random)
        assert losses(fused) == pytest.approx(expected, rel=1e-3, abs=1e-6), step
