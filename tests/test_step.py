"""The step trains what it should, keeps to the device, and continues exactly from its state."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch

from hybridflow.capture import trace
from hybridflow.config import FlowConfig, Objective, ObjectiveConfig, OptimiserConfig
from hybridflow.data import Batches
from hybridflow.discriminator import DenseDiscriminator
from hybridflow.errors import InputError
from hybridflow.kernels import fuse
from hybridflow.networks import build_model
from hybridflow.objective import terms_of
from hybridflow.optimiser import Optimiser
from hybridflow.step import HybridStep

SHAPE = torch.Size((1, 8, 8))
FLOW = FlowConfig(scales=2, couplings=2, hidden=8, last_hidden=8)


def make_step(
    objective="full", seed=0, optimiser=None, total_steps=30, precision="fp32", **terms
) -> HybridStep:
    torch.manual_seed(0)
    x = torch.randint(0, 17, (60, *SHAPE), dtype=torch.uint8)
    y = torch.arange(60) % 3
    torch.manual_seed(seed)
    model = build_model(FLOW, SHAPE, 3)
    return HybridStep(
        model,
        DenseDiscriminator(64, 3, (16,)),
        Batches(x[:30], y[:30], 10, device="cpu"),
        Batches(x, None, 20, device="cpu"),
        levels=17,
        terms=terms_of(objective, ObjectiveConfig(**terms)),
        optimiser=optimiser or OptimiserConfig(),
        total_steps=total_steps,
        precision=precision,
    )


def weights(network) -> dict[str, torch.Tensor]:
    return copy.deepcopy(network.state_dict())


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


TAUGHT = {"w_con_d": 1.0, "w_con_g": 0.5, "teacher": "averaged", "confidence": 0.2}


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_reads_nothing_on_the_host_and_is_the_same_each_time(objective: str, fused: bool):
    step = make_step(objective, threshold=0.9, curriculum=True, **TAUGHT)
    if fused:
        fuse(step.model)
    step()
    first, second = trace(step), trace(step)
    assert first.obstacles == []
    assert first.operations == second.operations
    assert len(first.operations) > 100


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("supervised", {"sup_d", "sup_g"}),
        ("nll", {"sup_d", "sup_g", "nll"}),
        ("nll+adversarial", {"sup_d", "sup_g", "nll", "adv_d", "adv_g"}),
        ("full", {"sup_d", "sup_g", "nll", "adv_d", "adv_g", "pl_d", "pl_g"}),
        ("flowgmm", {"sup_d", "joint"}),
        ("flowgmm+consistency", {"sup_d", "joint", "joint_con"}),
        ("fm-gan", {"sup_d", "adv_d", "fm_g"}),
    ],
)
def test_each_objective_computes_its_terms_and_trains_both_networks(objective, names):
    step = make_step(objective)
    model, discriminator = weights(step.model), weights(step.discriminator)
    terms = step()
    assert set(terms) == names | {"loss_d", "loss_g"}
    assert all(value.isfinite() and value.shape == () for value in terms.values())
    assert not same(model, step.model.state_dict())
    assert not same(discriminator, step.discriminator.state_dict())


@pytest.mark.parametrize("names", [{"con_d"}, {"con_g"}, {"con_d", "con_g"}])
@pytest.mark.parametrize("teacher", ["current", "averaged"])
def test_consistency_is_a_term_of_each_network_that_weighs_it(names, teacher):
    on = {f"w_{name}": 0.5 for name in names}
    terms = make_step(**on, teacher=teacher, confidence=0.0)()
    assert set(terms) - set(make_step()()) == names
    assert all(terms[name] > 0 for name in names)


def test_no_image_is_confident_enough_for_a_probability_of_one():
    terms = make_step(**TAUGHT | {"confidence": 1.0})()
    assert terms["con_d"] == terms["con_g"] == 0


def test_a_curriculum_goes_by_the_running_shares_of_certain_images(
    monkeypatch: pytest.MonkeyPatch,
):
    judged = torch.tensor([[0.95, 0.05, 0]] * 8 + [[0, 0.9, 0.1]] * 4 + [[0.3, 0.4, 0.3]] * 8)
    step = make_step(**TAUGHT | {"confidence": 0.9, "curriculum": True})
    monkeypatch.setattr(step, "_judged", lambda x, logits: judged)
    shares = torch.zeros(3)
    for _ in range(3):
        step()
        shares = 0.99 * shares + 0.01 * torch.tensor([0.4, 0.2, 0])
        assert torch.allclose(step.certain, shares)


def test_with_a_curriculum_no_image_is_left_out_at_first():
    on = {"w_con_d": 1.0, "w_con_g": 1.0, "confidence": 1.0}
    assert make_step(**on)()["con_d"] == 0
    terms, everything = make_step(**on, curriculum=True)(), make_step(**on | {"confidence": 0.0})()
    assert all(torch.equal(terms[name], everything[name]) for name in ("con_d", "con_g"))


def test_the_averaged_teacher_has_no_noise_and_leaves_the_discriminator_in_training():
    step = make_step(**TAUGHT)
    step.discriminator.initialise(torch.rand(50, 64))
    step.start_averages()
    x, logits = torch.rand(20, *SHAPE), torch.zeros(20, 3)
    judged = step._judged(x, logits)
    assert torch.equal(judged, step._judged(x, logits)) and step.discriminator.training
    assert torch.allclose(judged, step.discriminator.eval()(x).softmax(1))
    step.discriminator.train()
    step()
    moved = step.discriminator.eval()(x).softmax(1)
    assert not torch.allclose(step._judged(x, logits), moved)


def test_losses_are_the_weighted_sums_of_their_terms():
    weight = {"w_sup_g": 0.5, "w_nll": 0.3, "w_adv_g": 0.2, "w_pl_g": 0.1}
    terms = make_step(**weight)()
    expected = sum(w * terms[name.removeprefix("w_")] for name, w in weight.items())
    assert torch.allclose(terms["loss_g"], expected)


def test_the_discriminators_update_does_not_move_the_flow():
    zero = {"w_sup_g": 0.0, "w_nll": 0.0, "w_adv_g": 0.0, "w_pl_g": 1e-30}
    step = make_step(optimiser=OptimiserConfig(lr_g=1e-30), **zero)
    before, discriminator = weights(step.model), weights(step.discriminator)
    step()
    assert same(before, step.model.state_dict())
    assert not same(discriminator, step.discriminator.state_dict())


def test_learning_rates_are_constant_then_fall_linearly_to_zero():
    step = make_step(optimiser=OptimiserConfig(lr_g=0.01, decay_from=0.5), total_steps=8)
    rates = []
    for _ in range(8):
        rates.append(step.optimiser_g.lr.item())
        step()
    expected = [0.01] * 5 + [0.0075, 0.005, 0.0025]
    assert rates == pytest.approx(expected)
    assert step.optimiser_g.lr.item() == 0


def test_averages_follow_the_warmed_up_decay():
    step = make_step(optimiser=OptimiserConfig(ema_decay=0.15))
    name = "prior.means"
    average = step.model.prior.means.detach().clone()
    for decay in (0.1, 0.15, 0.15):  # (1 + t) / (10 + t) = 0.1, 0.18, …, limited to 0.15
        step()
        average = decay * average + (1 - decay) * step.model.prior.means.detach()
        assert torch.allclose(step.optimiser_g.average[name], average, atol=1e-6)
    assert torch.equal(step.averaged_states()[0][name], step.optimiser_g.average[name])


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_restored_step_continues_bit_for_bit(curriculum: bool):
    terms = TAUGHT | {"curriculum": curriculum}
    step = make_step(**terms)
    for _ in range(3):
        step()
    state, random = step.state_dict(), torch.get_rng_state()
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    expected = [step() for _ in range(3)]
    other = make_step(seed=1, **terms)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    assert all(same(terms, other()) for terms in expected)
    assert same(step.state_dict(), other.state_dict())


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_state_of_another_architecture_is_refused(damage: str):
    step = make_step()
    state = step.state_dict()
    if damage == "missing":
        del state["model.prior.means"]
    else:
        state["model.prior.means"] = torch.zeros(3, 5)
    with pytest.raises(InputError, match=r"state: model\.prior\.means"):
        step.load_state_dict(state)


def test_bf16_keeps_weights_and_losses_in_fp32():
    step = make_step()
    step.precision = "bf16"
    terms = step()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(p.dtype == torch.float32 for p in step.model.parameters())


def test_high_precision_holds_for_the_step_alone(monkeypatch: pytest.MonkeyPatch):
    seen = []
    step = make_step(precision="high")
    forward = step.discriminator.forward

    def spied(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return forward(x)

    monkeypatch.setattr(step.discriminator, "forward", spied)
    step()
    assert set(seen) == {"high"} and torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(step.discriminator, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step()
    assert torch.get_float32_matmul_precision() == "highest"


def test_gradients_are_clipped():
    config = OptimiserConfig(clip=1e-3)
    step = make_step(optimiser=replace(config, lr_g=1e-3))
    step()
    norms = [optimiser.weights.grad.norm() for optimiser in (step.optimiser_g, step.optimiser_d)]
    assert all(0.999e-3 <= norm <= 1.001e-3 for norm in norms)


def test_in_bf16_gradients_are_taken_as_in_fp32_and_no_old_cast_of_a_weight_is_used():
    step = make_step()
    step.precision = "bf16"
    optimiser, z = step.optimiser_g, torch.randn(50, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step.model.prior.component_log_prob(z[:, :32]).square().mean()
        gradient = optimiser.gradient(loss)
    exact = step.model.prior.component_log_prob(z[:, :32]).square().mean()
    error = (gradient - optimiser.gradient(exact)).norm() / gradient.norm()
    assert error < 1e-5

    layer = torch.nn.Linear(3, 2)
    own = Optimiser(layer, 0.1, 0.9, OptimiserConfig())
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(torch.ones(1, 3))
        own.step(own.gradient(before.sum()))
        after = layer(torch.ones(1, 3))
    assert (after - before).abs().min() > 0.2
