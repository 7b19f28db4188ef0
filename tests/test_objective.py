"""Each term against its definition, and the samples between two classes."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hybridflow.config import ObjectiveConfig
from hybridflow.flow import GaussianMixture
from hybridflow.objective import (
    adversarial_d,
    adversarial_g,
    boundary_sample,
    certain_shares,
    class_thresholds,
    consistency,
    feature_matching,
    joint_nll,
    nll,
    pseudo_label,
    supervised,
    terms_of,
)

LOGITS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def with_generated(logits):
    """Probabilities over K+1 outputs, the last logit being 0."""
    return torch.cat((logits, torch.zeros(len(logits), 1)), dim=1).softmax(1)


def test_supervised_is_the_posterior_not_the_joint():
    shifted = LOGITS + torch.arange(6.0)[:, None]  # log p(x) differs, p(y|x) does not
    assert torch.allclose(supervised(LOGITS, LABELS), supervised(shifted, LABELS))
    assert not torch.allclose(joint_nll(LOGITS, LABELS, 1), joint_nll(shifted, LABELS, 1))


def test_threshold_leaves_out_the_confident():
    logits = torch.tensor([[10.0, 0.0], [0.1, 0.0]])
    labels = torch.tensor([0, 0])
    unsure = supervised(logits[1:], labels[1:])
    assert torch.allclose(supervised(logits, labels, threshold=0.95), unsure / 2)
    assert torch.allclose(supervised(logits, labels, threshold=1.0), supervised(logits, labels))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_smoothing_mixes_the_label_with_all_classes(threshold):
    log_p = LOGITS.log_softmax(1)
    target = 0.8 * torch.eye(4, dtype=torch.float64)[LABELS] + 0.2 / 4
    losses = -(target * log_p).sum(1)
    if threshold:  # of the class, not of the smoothed label
        losses = losses * (log_p.exp()[range(6), LABELS] <= threshold)
    assert torch.allclose(supervised(LOGITS, LABELS, threshold, smoothing=0.2), losses.mean())


def test_consistency_goes_by_confident_classes_alone_and_by_all_at_zero():
    target = torch.tensor(
        [[0.9, 0.1, 0, 0], [0.4, 0.6, 0, 0], [0.0, 0, 0.96, 0.04]], dtype=torch.float64
    )
    losses = -LOGITS[:3].log_softmax(1)[range(3), [0, 1, 2]]
    assert torch.allclose(consistency(LOGITS[:3], target, 0.0), losses.mean())
    assert torch.allclose(consistency(LOGITS[:3], target, 0.9), (losses[0] + losses[2]) / 3)
    assert consistency(LOGITS[:3], target, 0.97) == 0


def test_consistency_asks_of_each_class_its_own_confidence():
    rows = [[0.9, 0.1, 0, 0], [0.4, 0.6, 0, 0], [0.3, 0.7, 0, 0]]
    target = torch.tensor(rows, dtype=torch.float64)
    losses = -LOGITS[:3].log_softmax(1)[range(3), [0, 1, 1]]
    asked = torch.tensor([0.95, 0.65, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(consistency(LOGITS[:3], target, asked), losses[2] / 3)
    asked = torch.tensor([0.9, 0.6, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(consistency(LOGITS[:3], target, asked), losses.mean())


def test_shares_count_the_certain_images_of_each_class():
    target = torch.tensor([[0.9, 0.1, 0], [0.95, 0, 0.05], [0.3, 0.3, 0.4], [0, 1, 0]])
    assert certain_shares(target, 0.9).tolist() == [0.5, 0.25, 0]
    assert certain_shares(target, 0.0).tolist() == [0.5, 0.25, 0.25]
    assert certain_shares(target, 1.0).tolist() == [0, 0.25, 0]


def test_thresholds_are_lower_for_classes_that_fewer_images_are_certain_of():
    assert class_thresholds(torch.zeros(3), 0.95).tolist() == [0, 0, 0]
    # The class with the largest share has the whole confidence, one with half of it a third.
    asked = class_thresholds(torch.tensor([0.4, 0.2, 0.3, 0.1]), 0.9)
    assert torch.allclose(asked, 0.9 * torch.tensor([1, 1 / 3, 0.6, 1 / 7]))
    # While more images are certain of no class, that share is what the others are compared with.
    asked = class_thresholds(torch.tensor([0.3, 0.1]), 0.9)
    assert torch.allclose(asked, 0.9 * torch.tensor([1 / 3, 1 / 11]))


@pytest.mark.parametrize("total", [0.2, 0.9, 1.0, 1 + 1e-6])
def test_thresholds_lie_between_zero_and_the_confidence(total):
    shares = torch.rand(100, 7, generator=torch.Generator().manual_seed(0))
    for s in total * shares / shares.sum(1, keepdim=True):
        asked = class_thresholds(s, 0.8)
        assert (asked >= 0).all() and (asked <= 0.8).all()
        assert torch.equal(asked.argsort(), s.argsort())


def test_consistency_takes_the_target_as_fixed():
    target = LOGITS.softmax(1).requires_grad_()
    logits = LOGITS.flip(0).requires_grad_()
    consistency(logits, target, 0.3).backward()
    assert target.grad is None and logits.grad.abs().sum() > 0


def test_feature_matching_compares_means_and_moves_the_generated_alone():
    generated = LOGITS.clone().requires_grad_()
    real = (LOGITS.flip(0) + torch.arange(4.0)).requires_grad_()
    loss = feature_matching(generated, real)
    assert torch.allclose(loss, torch.tensor(14.0).double() / 4)
    loss.backward()
    assert real.grad is None and generated.grad.abs().sum() > 0


def test_nll_is_the_marginal_per_dimension():
    uniform = torch.full((3, 5), math.log(1 / 5))  # p(x, k) = 1/5 for each k: p(x) = 1
    assert torch.allclose(nll(uniform - 7.0, 7), torch.tensor(1.0))


def test_adversarial_terms_are_cross_entropies_over_k_plus_one():
    real, generated = LOGITS[:3], LOGITS[3:]
    p_real, p_generated = with_generated(real), with_generated(generated)
    expected = -(1 - p_real[:, -1]).log().mean() - p_generated[:, -1].log().mean()
    assert torch.allclose(adversarial_d(real, generated), expected)
    soft = torch.rand(3, 4, dtype=torch.float64).softmax(1)
    expected = -(soft * p_generated[:, :-1].log()).sum(1).mean()
    assert torch.allclose(adversarial_g(generated, soft), expected)


def test_adversarial_terms_stay_finite_for_huge_logits():
    huge = torch.tensor([[1e4, -1e4], [-1e4, -1e4]])
    assert adversarial_d(huge, huge).isfinite()
    assert adversarial_g(huge, torch.tensor([[0.5, 0.5]] * 2)).isfinite()


def test_pseudo_label_takes_the_target_as_fixed():
    logits = LOGITS.clone().requires_grad_()
    target = LOGITS.flip(0).clone().requires_grad_()
    loss = pseudo_label(logits, target.softmax(1))
    difference = LOGITS.softmax(1) - LOGITS.flip(0).softmax(1)
    assert torch.allclose(loss, difference.square().sum(1).mean() / 4)
    loss.backward()
    assert logits.grad is not None and target.grad is None


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_boundary_samples_lie_between_two_different_classes(beta: float):
    prior = GaussianMixture(3, 8)
    prior.initialise(1e4 * torch.eye(3, 8))
    z, soft = boundary_sample(prior, 500, beta)
    assert z.shape == (500, 8) and soft.shape == (500, 3)
    assert torch.allclose(soft.sum(1), torch.ones(500))
    weights = (z / 1e4)[:, :3].sort(descending=True).values
    assert torch.allclose(weights[:, 0], torch.full((500,), max(beta, 1 - beta)), atol=2e-3)
    assert torch.allclose(weights[:, 1], torch.full((500,), min(beta, 1 - beta)), atol=2e-3)
    pairs = {tuple(row) for row in (z[:, :3] > 1e3).long().tolist()}
    assert len(pairs) == 3


def test_boundary_sample_noise_has_the_interpolated_variance():
    prior = GaussianMixture(2, 200)
    prior.initialise(torch.zeros(2, 200))
    z, _ = boundary_sample(prior, 500, 0.5)
    assert abs(z.var() - 0.5) < 0.02


def test_boundary_sample_gradients_reach_the_means_through_both():
    prior = GaussianMixture(3, 2)
    z, soft = boundary_sample(prior, 4, 0.3)
    assert torch.autograd.grad(z.sum(), prior.means, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(soft[:, 0].sum(), prior.means)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        ("supervised", {"w_sup_d", "w_sup_g"}),
        ("nll", {"w_sup_d", "w_sup_g", "w_nll"}),
        ("nll+adversarial", {"w_sup_d", "w_sup_g", "w_nll", "w_adv_d", "w_adv_g"}),
        ("flowgmm", {"w_sup_d", "w_joint"}),
        ("flowgmm+consistency", {"w_sup_d", "w_joint", "w_joint_con"}),
    ],
)
def test_each_ablation_row_keeps_its_terms(objective, kept):
    terms = terms_of(objective, ObjectiveConfig(beta=0.3))
    assert {n for n, v in vars(terms).items() if n.startswith("w_") and v} == kept
    assert terms.beta == 0.3


def test_feature_matching_draws_plain_samples():
    assert terms_of("fm-gan", ObjectiveConfig(beta=0.3)).beta == 1


def test_terms_have_gradients():
    real = LOGITS.clone().requires_grad_()
    soft = LOGITS.softmax(1)
    for term in (
        lambda x: adversarial_d(x, x.flip(0)),
        lambda x: adversarial_g(x, soft),
        lambda x: supervised(x, LABELS),
        lambda x: supervised(x, LABELS, smoothing=0.1),
        lambda x: nll(x, 3) + joint_nll(x, LABELS, 3),
        lambda x: consistency(x, soft.detach(), 0.3),
        lambda x: feature_matching(x, LOGITS.flip(0) + 1),
    ):
        assert gradcheck(term, (real,))
