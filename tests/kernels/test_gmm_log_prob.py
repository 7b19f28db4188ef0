"""Every implementation against the specification, and the specification against calculus."""

import math
import shutil

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from hybridflow.kernels import _backend, native
from hybridflow.kernels.gmm_log_prob import gmm_log_prob

# Samples, dimensions, classes: a tile of columns and more, one class, all classes in a tile of the
# GPU's and not, more samples than a chunk, no sample, one sample.
SHAPES = (
    (5, 4, 3),
    (7, 37, 10),
    (3, 530, 2),
    (21, 2, 1),
    (6, 5, 40),
    (300, 3, 2),
    (0, 4, 3),
    (1, 6, 5),
)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
labelled = pytest.mark.parametrize("labelled", (False, True), ids=("unlabelled", "labelled"))


def make(samples, size, classes, labelled=False, dtype=torch.float32, device="cpu", offset=0.0):
    """z, means, log_prior and labels; close enough that no posterior is 0 or 1."""
    generator = torch.Generator().manual_seed(samples + size + classes)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = 2 / math.sqrt(size)
    values = (
        normal(samples, size) + offset,
        spread * normal(classes, size) + offset,
        normal(classes).log_softmax(0),
    )
    leaves = [v.to(device, dtype).requires_grad_() for v in values]
    labels = torch.randint(-1, classes, (samples,), generator=generator).to(device)
    return [*leaves, labels if labelled else None]


def outputs_and_gradients(operands, weights=None):
    """The three results, and the gradients of z, means and log_prior."""
    leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
    results = gmm_log_prob(*leaves, operands[3])
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(r.shape, generator=generator) for r in results]
    weights = [w.to(r) for w, r in zip(weights, results, strict=True)]
    torch.autograd.backward(results, weights)
    return [*(r.detach() for r in results), *(t.grad for t in leaves)]


def specification(operands, weights=None):
    z, means, log_prior, labels = operands
    doubles = [t.detach().cpu().double() for t in (z, means, log_prior)]
    with _backend.using("reference"):
        return outputs_and_gradients([*doubles, None if labels is None else labels.cpu()], weights)


def assert_close(got, want):
    """Within some roundings of the largest element. The absolute error of the joint, 4 roundings of
    its size, is the relative one of the posterior, and so of gradients."""
    joint = want[0].abs().max().item() if want[0].numel() else 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        if w.numel():
            roundings = 8 if i < 2 else 40 + 4 * joint
            error = (g.cpu().double() - w).abs().max()
            assert error <= roundings * 2**-24 * w.abs().max().clamp_min(1e-3), f"output {i}"


@shapes
@labelled
def test_values_and_every_gradient_match_the_specification(implementation, device, shape, labelled):
    operands = make(*shape, labelled, device=device)
    assert_close(outputs_and_gradients(operands), specification(operands))


@pytest.mark.float64
def test_the_density_is_that_of_torch_distributions(implementation, device):
    z, means, log_prior, labels = make(9, 5, 4, True, torch.float64, device)
    joint, log_prob, posterior = gmm_log_prob(z, means, log_prior, labels)
    components = Independent(Normal(means, torch.ones_like(means)), 1)
    each = components.log_prob(z[:, None, :])
    mixture = MixtureSameFamily(Categorical(logits=log_prior), components).log_prob(z)
    own = (each + log_prior).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(joint, each + log_prior)
    torch.testing.assert_close(log_prob, torch.where(labels < 0, mixture, own))
    torch.testing.assert_close(posterior.log(), each + log_prior - mixture[:, None])
    assert (labels < 0).any() and (labels >= 0).any()


@pytest.mark.float64
@labelled
@pytest.mark.parametrize("classes", (3, 20))
def test_gradients_match_finite_differences(implementation, device, labelled, classes):
    operands = make(4, 3, classes, labelled, torch.float64, device)
    fast = implementation == "triton"  # along one random direction: the interpreter is slow
    assert gradcheck(lambda *t: tuple(gmm_log_prob(*t)), operands, fast_mode=fast)


@pytest.mark.parametrize("offset", (1e3, 1e4))
def test_a_distance_from_the_origin_costs_no_digits(implementation, device, offset):
    operands = make(6, 70, 10, True, device=device, offset=offset)
    assert_close(outputs_and_gradients(operands), specification(operands))


def test_large_operands_stay_finite(implementation, device):
    operands = make(4, 6, 3, True, device=device)
    with torch.no_grad():
        for t in operands[:2]:
            t.copy_(1e4 * t.sign())
    want = specification(operands)
    assert all(w.isfinite().all() for w in want)
    assert_close(outputs_and_gradients(operands), want)


def test_a_class_without_weight_has_no_posterior_and_no_gradient(implementation, device):
    z, means, log_prior, _ = make(5, 4, 3, device=device)
    with torch.no_grad():
        log_prior[1] = -math.inf
    joint, log_prob, posterior = gmm_log_prob(z, means, log_prior)
    (grad,) = torch.autograd.grad(log_prob.sum(), means)
    assert (joint[:, 1] == -math.inf).all() and (posterior[:, 1] == 0).all()
    assert log_prob.isfinite().all()
    assert (grad[1] == 0).all() and (grad[0] != 0).all()


@labelled
def test_a_missing_gradient_counts_as_zero(implementation, device, labelled):
    for used in range(3):
        operands = make(3, 4, 5, labelled, device=device)
        weights = [torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 5)]
        weights[used] += torch.linspace(1, 2, weights[used].numel()).view_as(weights[used])
        want = specification(operands, weights)
        result = gmm_log_prob(*operands)[used]
        got = torch.autograd.grad(result, operands[:3], weights[used].to(result))
        assert_close([*want[:3], *got], want)


@pytest.mark.parametrize("layout", ("expanded", "transposed", "sliced"))
def test_gradients_and_inputs_of_any_layout(implementation, device, layout):
    def lay_out(t):
        if layout == "expanded":
            return t.reshape(-1)[:1].view((1,) * t.dim()).expand(t.shape)
        if layout == "transposed" and t.dim() > 1:
            return t.T.contiguous().T
        return torch.stack((t, t), dim=-1)[..., 0]

    operands = [lay_out(t.detach()) for t in make(4, 6, 3, True, device=device)]
    shapes = ((4, 3), (4,), (4, 3))
    weights = [lay_out(torch.linspace(-1, 1, math.prod(s)).view(s)) for s in shapes]
    leaves = [t.requires_grad_() for t in operands[:3]]
    results = gmm_log_prob(*leaves, operands[3])
    down = [lay_out(w.to(r)) for w, r in zip(weights, results, strict=True)]
    grads = torch.autograd.grad(results, leaves, down)
    got = [*(r.detach() for r in results), *grads]
    assert_close(got, specification(operands, weights))


def test_operands_and_gradients_are_left_as_they_were(implementation, device):
    operands = make(3, 4, 5, True, device=device)
    results = gmm_log_prob(*operands)
    everything = [*operands, *(torch.ones_like(r) for r in results)]
    before = [t.detach().clone() for t in everything]
    torch.autograd.backward(results, everything[4:])
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_every_element_of_the_results_is_written(implementation, device):
    """Fresh memory holds NaN here: what a kernel leaves out, or reads unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape in ((7, 37, 10), (3, 5, 40), (0, 4, 3)):
            operands = make(*shape, labelled=True, device=device)
            assert all(t.isfinite().all() for t in outputs_and_gradients(operands))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("classes", (10, 20))
def test_two_runs_are_bit_equal(implementation, device, classes):
    operands = make(70, 6, classes, True, device=device)
    runs = [outputs_and_gradients(operands) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_results_do_not_depend_on_the_number_of_threads():
    operands = make(300, 256, 12, True)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(operands))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("means_too", (False, True))
def test_16_bit_types_differ_by_their_own_rounding(dtype, means_too):
    """Results are float32, gradients have the type of their operand."""
    operands = make(8, 20, 4, True)
    with torch.no_grad():
        operands[0] = operands[0].to(dtype)
        if means_too:
            operands[1] = operands[1].to(dtype)
    got, want = outputs_and_gradients(operands), specification(operands)
    assert all(g.dtype == torch.float32 for g in got[:3])
    assert [g.dtype for g in got[3:]] == [t.dtype for t in operands[:3]]
    for g, w, of in zip(got, want, [*got[:3], *operands[:3]], strict=True):
        eps = torch.finfo(of.dtype).eps
        assert (g - w).abs().max() <= (0.5 * eps + 100 * 2**-24) * w.abs().max()


def test_autocast_changes_nothing(implementation, device):
    operands = make(5, 20, 3, True, device=device)
    want = gmm_log_prob(*operands)
    with torch.autocast(device, torch.bfloat16):
        got = gmm_log_prob(*operands)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@labelled
def test_operators_are_registered_correctly(labelled):
    z, means, log_prior, labels = make(3, 4, 5, labelled)
    operands = [t.detach() for t in (z, means, log_prior)]
    torch.library.opcheck(torch.ops.hybridflow.gmm_log_prob.default, (*operands, labels))
    joint, log_prob, posterior = torch.ops.hybridflow.gmm_log_prob(*operands, labels)
    for grads in ((joint, log_prob, posterior), (None, log_prob, None)):
        torch.library.opcheck(
            torch.ops.hybridflow.gmm_log_prob_backward.default,
            (*grads, *operands, posterior, labels),
        )


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_the_function_gives_the_same(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    z, means, log_prior, labels = make(6, 4, 3, True)

    def step(z, means, logits):
        first = gmm_log_prob(z, means, logits.log_softmax(0), labels)
        second = gmm_log_prob(2 * z, means, logits.log_softmax(0))
        return first.log_prob.sum() + (second.posterior * first.joint).sum()

    leaves = (z, means, log_prior)
    want = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=backend)(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("wrong", (-2, 5))
def test_a_label_out_of_range_is_refused(implementation, device, wrong):
    if device != "cpu":
        pytest.skip("labels are not read on this device")
    z, means, log_prior, labels = make(3, 4, 5, True)
    labels[1] = wrong
    with pytest.raises(ValueError, match=rf"labels: got {wrong}, want classes from 0 to 4, or -1"):
        gmm_log_prob(z, means, log_prior, labels)


def test_wrong_operands_are_named():
    z, means, log_prior, labels = make(3, 4, 5, True)

    def message(*args):
        with pytest.raises(ValueError) as error:
            gmm_log_prob(*args)
        return str(error.value)

    assert message(z[0], means, log_prior) == "z: got shape (4,), want (B, d)"
    assert message(z.long(), means, log_prior) == "z: got torch.int64, want a floating type"
    assert message(z, means[:, :3], log_prior) == "means: got shape (5, 3), want (5, 4)"
    assert message(z, means[:0], log_prior).startswith("means: got shape (0, 4), want (K, d)")
    assert message(z, means, log_prior[:2]) == "log_prior: got shape (2,), want (5,)"
    assert message(z, means, log_prior.to("meta")) == ("log_prior: got a tensor on meta, want cpu")
    assert message(z, means, log_prior, labels[:2]) == "labels: got shape (2,), want (3,)"
    assert message(z, means, log_prior, labels.int()) == (
        "labels: got torch.int32, want torch.int64"
    )
