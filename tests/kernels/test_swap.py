"""fuse and unfuse on live models of hybridflow's own layers, and on strange ones.

Other libraries' layers: tests/kernels/swap.
"""

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from hybridflow.flow import MixtureFlow
from hybridflow.flow.coupling import FlowStep, conv_conditioner, dense_conditioner
from hybridflow.flow.multiscale import MultiScaleFlow, StepChain
from hybridflow.flow.prior import GaussianMixture
from hybridflow.kernels import _backend, fuse, native, unfuse
from hybridflow.kernels.swap import _choices
from hybridflow.kernels.swap import hybridflow as swap_hybridflow

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Stack(nn.Module):
    """Steps that share one log-det, as a flow runs them."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        log_det = None
        for step in self.steps:
            x, log_det = step(x, log_det)
        return x, log_det

    def inverse(self, y):
        log_det = None
        for step in reversed(self.steps):
            y, log_det = step.inverse(y, log_det)
        return y, log_det


def images(dtype=torch.float32):
    steps = (FlowStep(5, conv_conditioner(3, 8, 4), flip=bool(i % 2)) for i in range(3))
    return randomised(Stack(*steps), dtype), torch.randn(4, 5, 4, 4, dtype=dtype)


def vectors(dtype=torch.float32):
    steps = (FlowStep(2, dense_conditioner(1, 8, 2), flip=bool(i % 2)) for i in range(3))
    return randomised(Stack(*steps), dtype), torch.randn(9, 2, dtype=dtype)


def randomised(model, dtype):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def run(model, x, direction):
    x = x.clone().requires_grad_()
    out, log_det = direction(model)(x)
    parameters = list(model.parameters())
    loss = out.pow(2).sum() + (log_det * torch.linspace(1, 2, len(x))).sum()
    return [out, log_det, *torch.autograd.grad(loss, [x, *parameters])]


both_ways = pytest.mark.parametrize(
    "direction", (lambda m: m, lambda m: m.inverse), ids=("forward", "inverse")
)
models = pytest.mark.parametrize("make", (images, vectors))


@both_ways
@models
def test_a_fused_model_is_as_accurate_as_the_model(make, direction):
    """In float32, outputs and every gradient, both against the model in float64."""
    model, x = make()
    exact = run(copy.deepcopy(model).double(), x.double(), direction)
    plain = run(model, x, direction)
    fuse(model)
    for got, want, true in zip(run(model, x, direction), plain, exact, strict=True):
        assert got.dtype == want.dtype
        allowed = 4 * (want - true).abs().max() + 16 * 2**-24 * true.abs().max()
        assert (got - true).abs().max() <= allowed


@both_ways
@models
def test_a_fused_float64_model_gives_the_same(make, direction):
    model, x = make(torch.float64)
    want = run(model, x, direction)
    fuse(model)
    for got, expected in zip(run(model, x, direction), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.float64
@both_ways
def test_log_det_of_a_fused_step_is_that_of_its_jacobian(implementation, device, direction):
    """With the conditioner inside: its own derivative must not enter the log-det."""
    step = randomised(FlowStep(3, conv_conditioner(2, 4, 2), flip=True), torch.float64).to(device)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, device=device)
    step.__class__ = type(fused(step))
    jacobian = torch.autograd.functional.jacobian(lambda v: direction(step)(v)[0], x)
    log_det = direction(step)(x)[1]
    want = torch.linalg.slogdet(jacobian.reshape(12, 12))[1]
    assert log_det.item() == pytest.approx(want.item(), abs=1e-11)


def dense(size=5, hidden=20, flip=False, conditioner=None):
    net = conditioner or dense_conditioner((size + 1) // 2, hidden, 2 * (size // 2))
    return randomised(FlowStep(size, net, flip), torch.float32)


def calls_of_the_whole_op(monkeypatch, step, x):
    """How often the two directions run as one op each."""
    calls = []
    for name in ("mlp_coupling", "mlp_coupling_inverse"):
        op = getattr(swap_hybridflow, name)
        counted = functools.partial(lambda op, *a, **k: calls.append(op) or op(*a, **k), op)
        monkeypatch.setattr(swap_hybridflow, name, counted)
    with _choices.using(True):
        step(x)
        step.inverse(x)
    return len(calls)


@pytest.mark.parametrize("shape", ((2, 64, 150), (5, 20, 33), (64, 128, 40)), ids=str)
@pytest.mark.parametrize("flip", (False, True))
@both_ways
def test_a_dense_conditioner_runs_inside_the_step(monkeypatch, shape, flip, direction):
    """Results and gradients are as accurate as the step's; parameters and keys are the same."""
    size, hidden, samples = shape
    step, x = dense(size, hidden, flip), torch.randn(samples, size)
    state = copy.deepcopy(step.state_dict())
    exact = run(copy.deepcopy(step).double(), x.double(), direction)
    plain = run(step, x, direction)
    fuse(step)
    with _choices.using(True):
        got = run(step, x, direction)
    assert all(torch.equal(v, state[k]) for k, v in step.state_dict().items())
    for g, want, true in zip(got, plain, exact, strict=True):
        assert g.shape == want.shape
        allowed = 4 * (want - true).abs().max() + 64 * 2**-24 * true.abs().max()
        assert (g - true).abs().max() <= allowed
    assert calls_of_the_whole_op(monkeypatch, step, x) == 2


def without_bias():
    net = dense_conditioner(3, 20, 4)
    net[2] = nn.Linear(20, 20, bias=False)
    return net


def hooked(part):
    net = dense_conditioner(3, 20, 4)
    (net if part is None else net[part]).register_forward_hook(lambda *_: None)
    return net


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_part(i, part):
    net = dense_conditioner(3, 20, 4)
    net[i] = part
    return net


@pytest.mark.parametrize(
    "net",
    (
        without_bias(),
        hooked(None),
        hooked(1),
        hooked(4),
        with_part(1, nn.Tanh()),
        with_part(3, nn.LeakyReLU()),
        with_part(0, Doubled(3, 20)),
        nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 4)),
        dense_conditioner(3, 20, 4).append(nn.Identity()),
    ),
    ids="no-bias hook-of-all hook-of-relu hook-of-last tanh leaky subclass shorter longer".split(),
)
def test_another_dense_conditioner_is_left_as_it_is(monkeypatch, net):
    step, x = dense(conditioner=net), torch.randn(33, 5)
    want = [step(x), step.inverse(x)]
    fuse(step)
    with _choices.using(True):
        after = [step(x), step.inverse(x)]
    for got, expected in zip(after, want, strict=True):
        torch.testing.assert_close(got, expected)
    assert calls_of_the_whole_op(monkeypatch, step, x) == 0


def test_under_autocast_and_in_float64_a_dense_conditioner_is_left_as_it_is(monkeypatch):
    step, x = dense(), torch.randn(33, 5)
    fuse(step)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of_the_whole_op(monkeypatch, step, x) == 0
    assert calls_of_the_whole_op(monkeypatch, step, x) == 2
    assert calls_of_the_whole_op(monkeypatch, step.double(), x.double()) == 0


def fused(step):
    copied = copy.deepcopy(step).cpu()
    fuse(copied)
    return copied


@models
def test_unfuse_restores_the_model_bit_for_bit(make):
    model, x = make()
    types = [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    want = model(x)
    fuse(model)
    assert list(model.state_dict()) == list(state)
    unfuse(model)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model(x), want, strict=True))


def test_fusing_twice_changes_nothing():
    model, _ = images()
    first = fuse(model)
    types = [type(m) for m in model.modules()]
    assert fuse(model) == first
    assert [type(m) for m in model.modules()] == types


def test_the_report_names_what_was_swapped_and_why_the_rest_was_not():
    class Other(FlowStep):
        pass

    hooked = FlowStep(4, conv_conditioner(2, 8, 4))
    hooked.coupling.register_forward_hook(lambda *_: None)
    model = Stack(
        FlowStep(4, conv_conditioner(2, 8, 4)), Other(4, conv_conditioner(2, 8, 4)), hooked
    )
    report = fuse(model)
    assert report.swapped == {"steps.0": "hybridflow.flow.coupling.FlowStep"}
    assert report.left["steps.1"] == "a subclass of FlowStep, whose behaviour may differ"
    assert "hooks" in report.left["steps.2"]
    lines = str(report).splitlines()
    assert lines[:2] == ["fused 1 of 3 flow layers", "  1 hybridflow.flow.coupling.FlowStep"]
    assert "steps.2" in str(report)
    assert type(model.steps[1]) is Other


def test_hooks_of_the_step_still_run():
    model, x = images()
    calls = []
    model.steps[0].register_forward_hook(lambda *_: calls.append("hook"))
    fuse(model)
    model(x)
    assert calls == ["hook"]


def test_a_fused_model_can_be_copied_and_saved():
    model, x = images()
    fuse(model)
    want = model(x)
    copied = copy.deepcopy(model)
    fresh, _ = images()
    fresh.load_state_dict(model.state_dict())
    fuse(fresh)
    for other in (copied, fresh, pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), want, strict=True))


def test_what_a_fused_model_is_and_shows_stays():
    model, _ = images()
    shown = repr(model)
    fuse(model)
    assert repr(model) == shown
    assert all(isinstance(step, FlowStep) for step in model.steps)


def strange(name, module, **members):
    """A module that says it is a library's layer."""
    return type(name, (nn.Module,), {"__module__": module, **members})()


def fails(self, *_):
    raise LookupError("something about this layer")


@pytest.mark.parametrize(
    ("layer", "reason"),
    (
        (strange("ActNorm", "normflows.flows.normalization"), "AttributeError"),
        (strange("AffineCoupling", "normflows.flows", scale=True, scale_map=[]), "TypeError"),
        (strange("AffineCouplingBlock", "normflows.flows", flows=()), "its parts are"),
        (strange("ActNorm", "nflows.transforms", log_scale=torch.zeros(2)), "NotImplementedError"),
        (strange("GeneralCouplingTransform", "zuko.flows", univariate=fails), "not affine"),
        (strange("ActNorm", "FrEIA.modules", forward=fails), "its parameters are"),
        (strange("AllInOneBlock", "FrEIA.modules", GIN=property(fails)), "LookupError"),
        (strange("GLOWCouplingBlock", "FrEIA.modules", clamp="2"), "its clamp is '2'"),
        (strange("CouplingLayer", "flow_ssl.realnvp", mask=None), "NoneType"),
        (strange("FlowStep", "hybridflow.flow.coupling"), "AttributeError"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_strange_layer_is_left_with_a_reason(layer, reason):
    model = nn.Sequential(layer)
    report = fuse(model)
    assert not report.swapped
    assert reason in report.left["0"]
    assert type(model[0]) is type(layer)


def test_modules_that_are_no_flow_layers_are_not_reported():
    report = fuse(nn.Sequential(nn.Linear(2, 2), strange("ActNorm", "elsewhere.flows")))
    assert not report.swapped
    assert not report.left


def test_fuse_imports_no_other_library():
    code = (
        "import sys, torch\n"
        "from hybridflow.flow.coupling import FlowStep, dense_conditioner\n"
        "from hybridflow.kernels import fuse\n"
        "assert fuse(FlowStep(2, dense_conditioner(1, 8, 2))).swapped\n"
        "print([n for n in ('normflows', 'nflows', 'zuko', 'FrEIA', 'flow_ssl') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_without_the_library_fuse_says_so_and_changes_nothing(monkeypatch, tmp_path):
    model, _ = images()
    monkeypatch.setattr(native, "_PATH", tmp_path / "none.so")
    native._open.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="native CPU library is missing"):
            fuse(model)
    finally:
        native._open.cache_clear()
    assert all(type(s) is FlowStep for s in model.steps)


def test_memory_of_the_fused_step_holds_one_activation_less():
    """The backward recomputes from the output, so the step's input is not kept."""
    kept = []
    model, x = images()

    def pack(t):
        kept.append(t.data_ptr())
        return t

    x.requires_grad_()
    fuse(model)
    middle = []
    model.steps[1].register_forward_pre_hook(lambda _, args: middle.append(args[0].data_ptr()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.steps[1](x)
    assert middle[0] not in kept
    assert _backend.choose(x) == "native"


# --- the whole of hybridflow's model, and chains that keep the activations of one step ------------


def whole_model(dtype=torch.float32):
    flow = MultiScaleFlow((1, 8, 8), scales=1, couplings=4, hidden=6, last_hidden=8)
    model = randomised(MixtureFlow(flow, classes=3, logit=True), dtype)
    return model, torch.rand(5, 1, 8, 8, dtype=dtype)


def likelihood(model, x):
    x = x.clone().requires_grad_()
    joint = model.joint_log_prob(x)
    z = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(5, -1).requires_grad_()
    drawn = model.inverse(z, z[:, :0])
    parameters = list(model.parameters())
    weights = torch.linspace(-1, 1, joint.numel(), dtype=x.dtype).view_as(joint)
    grads = torch.autograd.grad((weights * joint).sum() + drawn.sum(), [x, z, *parameters])
    return [joint, drawn, *grads]


@pytest.mark.parametrize("constant_memory", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_whole_model_gives_the_same_in_both_directions(constant_memory, dtype):
    model, x = whole_model(dtype)
    exact = likelihood(copy.deepcopy(model).double(), x.double())
    plain = likelihood(model, x)
    report = fuse(model, constant_memory=constant_memory)
    assert not report.left
    chains = [n for n in report.swapped.values() if n.endswith("StepChain")]
    assert len(chains) == (1 if constant_memory else 0)
    eps = torch.finfo(dtype).eps
    for got, want, true in zip(likelihood(model, x), plain, exact, strict=True):
        allowed = 4 * (want - true).abs().max() + 200 * eps * true.abs().max()
        assert (got - true).abs().max() <= allowed
    unfuse(model)
    assert all(torch.equal(a, b) for a, b in zip(likelihood(model, x), plain, strict=True))


def test_48_couplings_keep_one_output_in_twelve():
    def kept(couplings):
        flow = StepChain(
            FlowStep(4, conv_conditioner(2, 8, 4), flip=bool(i % 2)) for i in range(couplings)
        )
        fuse(flow, constant_memory=True)
        parameters = {p.data_ptr() for p in flow.parameters()}
        seen = {}

        def pack(t):
            if t.data_ptr() not in parameters:
                seen[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flow(torch.randn(6, 4, 8, 8, requires_grad=True))
        return sum(seen.values())

    assert kept(8) == 4 * 6 * 4 * 8 * 8
    assert kept(48) == 4 * kept(8)


@pytest.mark.parametrize(
    "part", (nn.Dropout(0.1), nn.BatchNorm2d(2)), ids=lambda m: type(m).__name__
)
def test_a_chain_whose_conditioner_is_not_the_same_twice_is_left(part):
    net = conv_conditioner(2, 8, 4)
    chain = StepChain([FlowStep(4, nn.Sequential(part, net))])
    report = fuse(chain, constant_memory=True)
    assert type(part).__name__ in report.left[""]
    assert type(chain) is StepChain


def test_a_changed_mixture_is_left():
    class Wider(GaussianMixture):
        def log_prior(self):
            return super().log_prior() + 1

    model, _ = whole_model()
    model.prior = Wider(3, model.prior.means.shape[1])
    assert "a subclass of GaussianMixture" in fuse(model).left["prior"]
