"""Paths between two classes: where they run, what is said of them, and how they are asked for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridflow.config import PRESETS, FlowConfig
from hybridflow.errors import InputError
from hybridflow.interpolation import find_class, paths_between
from hybridflow.networks import build_discriminator, build_model
from hybridflow.run import RunFolder, TrainedRun
from hybridflow.sample import main
from hybridflow.trainer import train


@pytest.fixture
def run() -> TrainedRun:
    """Untrained networks for digits, four classes with means far apart."""
    torch.manual_seed(0)
    config = replace(
        PRESETS["digits"], flow=FlowConfig(scales=2, couplings=2, hidden=4, last_hidden=4)
    )
    shape = torch.Size((1, 8, 8))
    model = build_model(config.flow, shape, 4)
    model.initialise(torch.rand(50, *shape))
    model.prior.initialise(3 * model.prior.means)
    discriminator = build_discriminator(config.discriminator, shape, 4).eval()
    return TrainedRun(config, 0, model, discriminator, 4, ("0", "1", "2", "3"), 17)


def latents(run: TrainedRun, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        z_k, z_n, _ = run.model(x.flatten(0, 1))
    return z_k.unflatten(0, x.shape[:2]), z_n.unflatten(0, x.shape[:2])


def test_a_path_is_straight_in_z_k_and_stays_in_z_n(run: TrainedRun):
    paths = paths_between(run, 2, 0, 3, steps=5)
    z_k, z_n = latents(run, paths.x)
    assert paths.x.shape == (3, 5, 1, 8, 8) and paths.beta.tolist() == [1, 0.75, 0.5, 0.25, 0]
    ends = z_k[:, :1], z_k[:, -1:]
    torch.testing.assert_close(
        z_k, paths.beta[:, None] * ends[0] + (1 - paths.beta[:, None]) * ends[1], atol=0.02, rtol=0
    )
    torch.testing.assert_close(z_n, z_n[:, :1].expand_as(z_n), atol=0.02, rtol=0)
    assert not torch.allclose(z_n[0], z_n[1], atol=0.1)


def test_without_noise_a_path_leads_from_mean_to_mean(run: TrainedRun):
    paths = paths_between(run, 2, 0, 1, temperature=0)
    z_k, z_n = latents(run, paths.x)
    torch.testing.assert_close(z_k[0, [0, -1]], run.model.prior.means[[2, 0]], atol=0.02, rtol=0)
    torch.testing.assert_close(z_n, torch.zeros_like(z_n), atol=0.02, rtol=0)
    assert paths.flow[0, 0, 0] > 0.99 and paths.flow[0, -1, 1] > 0.99


def test_probabilities_are_those_of_the_heads_at_each_point(run: TrainedRun):
    paths = paths_between(run, 1, 3, 2)
    x = paths.x.flatten(0, 1)
    with torch.no_grad():
        flow = run.model.class_logits(x).softmax(1)[:, [1, 3]]
        logits = run.discriminator(x)
    torch.testing.assert_close(paths.flow.flatten(0, 1), flow, atol=1e-2, rtol=0)
    total = 1 + logits.exp().sum(1)
    of_all = torch.stack([logits[:, 1].exp(), logits[:, 3].exp(), torch.ones(len(x))]) / total
    torch.testing.assert_close(paths.discriminator.flatten(0, 1), of_all.T)


def test_the_seed_decides_and_the_random_state_stays(run: TrainedRun):
    state = torch.get_rng_state()
    a, b, c = (paths_between(run, 0, 1, 2, seed=seed).x for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_are_found_by_name_before_number():
    assert [find_class(text, ("cat", "1", "dog")) for text in ("cat", "dog", "1", "0")] == [
        0,
        2,
        1,
        0,
    ]
    for wrong in ("frog", "3", "-1", "1.0", ""):
        with pytest.raises(
            InputError, match=rf"--interpolate: got '{wrong}', want a class: cat, .*0 to 2"
        ):
            find_class(wrong, ("cat", "1", "dog"))


@pytest.fixture(scope="module", params=["digits", "two-moons"])
def trained(request, tmp_path_factory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / request.param)
    flow = FlowConfig(scales=2, couplings=2, hidden=4, last_hidden=4)
    assert train(replace(PRESETS[request.param], steps=2, device="cpu", flow=flow), folder) == 0
    return folder.path


class TestCommandLine:
    def call(self, monkeypatch, run: Path, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["sample", str(run), "--device", "cpu", *arguments])
        main()

    def test_it_writes_a_picture_named_after_the_classes(self, trained, monkeypatch, capsys):
        name = "upper" if trained.name == "two-moons" else "0"
        self.call(monkeypatch, trained, "--interpolate", name, "1", "--count", "2", "--seed", "5")
        picture = trained / "interpolation-0-1-5.png"
        assert (
            picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (["0", "frog"], "--interpolate: got 'frog', want a class: "),
            (["10", "0"], "--interpolate: got '10', want a class: "),
            (["1", "1"], "--interpolate: got 1 1, want two different classes"),
        ],
    )
    def test_bad_classes_are_refused_in_one_line(
        self, classes: list[str], message: str, trained, monkeypatch, capsys
    ):
        before = sorted(trained.iterdir())
        with pytest.raises(SystemExit) as exit_:
            self.call(monkeypatch, trained, "--interpolate", *classes)
        assert exit_.value.code == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)
        assert sorted(trained.iterdir()) == before
