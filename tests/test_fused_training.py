"""Training with the fused kernels follows training without them."""

from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.config import PRESETS
from hybridflow.data import load_dataset, make_split
from hybridflow.kernels import native
from hybridflow.run import RunFolder
from hybridflow.trainer import Trainer

STEPS = 200


@pytest.fixture
def losses(tmp_path: Path):
    """The losses of the first steps of the default run, at every step."""
    dataset = load_dataset("digits")

    def of(fused: bool) -> list[dict[str, float]]:
        config = replace(PRESETS["digits"], fused=fused, device="cpu")
        split = make_split(
            dataset.train_y,
            classes=dataset.classes,
            num_labels=config.labels,
            num_validation=config.validation,
            seed=config.seed,
        )
        trainer = Trainer(config, RunFolder(tmp_path), dataset, split)
        trainer.initialise()
        history = []
        for _ in range(STEPS):
            trainer._one_step()
            history.append(trainer._read_sums())
        return history

    return of


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_losses_of_200_steps_agree_within_a_thousandth(losses):
    for step, (plain, fused) in enumerate(zip(losses(False), losses(True), strict=True)):
        for name in "loss_d", "loss_g":
            assert fused[name] == pytest.approx(plain[name], rel=1e-3), (step, name)
