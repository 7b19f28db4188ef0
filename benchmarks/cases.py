"""What is measured of each operation: its operands, the bytes it must move, its baselines, its check."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks import plain
from benchmarks.measuring import relative_errors
from hybridflow import kernels

__all__ = ["CASES", "QUICK_CASES", "Bound", "Case", "Operands", "step"]

Shape = tuple[int, ...]
Results = dict[str, Tensor]
Check = Callable[["Case", "Operands", Results], tuple[dict[str, float], list[str]]]
SHAPES: tuple[Shape, ...] = ((300, 4, 16, 16), (64, 12, 16, 16), (4096, 64))
_CLASSES = 10


@dataclass(frozen=True)
class Operands:
    """Tensors by the names they have in the call, and what gradients of the results come in."""

    given: Mapping[str, Tensor]
    incoming: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.given.values(), *self.incoming))


@dataclass(frozen=True)
class Bound:
    """A variant of an operation on one set of operands: what to call, and which leaves to derive by."""

    call: Callable[[], Any]
    leaves: Mapping[str, Tensor]


Peer = Callable[[Mapping[str, Tensor]], Bound]


@dataclass(frozen=True, eq=False)
class Case:
    """A row of the table: one operation at one shape and type.

    Args:
        op: name of the public function.
        shape: of its first operand; for `boundary_sample` (count, d).
        make: random operands on the CPU, as float32, activations to be cast to `dtype`.
        plain: the same in plain PyTorch.
        results: names of the results.
        moved: bytes that must be moved: each operand read once, each result written once.
        dtype: of the operands named in `activations`; the others are float32.
        note: what sets the row apart from the op's others.
        trained: operands that get a gradient; with none, the forward alone is measured.
        options: further arguments of both functions; those of one alone in `fused_options`.
        peers: other libraries' ways, by name.
        check: errors and problems of a result that chance has a part in.
        used: the one of the fused op's results that is taken; None for all.
    """

    op: str
    shape: Shape
    make: Callable[[Shape, Generator], dict[str, Tensor]]
    plain: Callable[..., Any]
    results: tuple[str, ...]
    moved: Callable[["Case"], int]
    dtype: torch.dtype = torch.float32
    activations: tuple[str, ...] = ("x", "y", "params")
    note: str = ""
    trained: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    fused_options: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    check: Check | None = None
    used: int | None = None

    @property
    def direction(self) -> str:
        return "forward + backward" if self.trained else "forward"

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        parts = (self.op, self.note.replace(" ", "_"), "x".join(map(str, self.shape)))
        return "-".join(filter(None, (*parts, self.type_name)))

    @property
    def variants(self) -> tuple[str, ...]:
        return ("eager", "compile", "fused", *self.peers)

    def operands(self, seed: int, device: torch.device) -> Operands:
        """Random operands and random incoming gradients."""
        generator = Generator().manual_seed(seed)
        given = self.make(self.shape, generator)
        for name in self.activations:
            if name in given:
                given[name] = given[name].to(self.dtype)
        incoming: tuple[Tensor, ...] = ()
        if self.trained:
            with torch.no_grad():
                results = _tuple(self.plain(**given, **self.options))
            incoming = tuple(torch.randn(r.shape, generator=generator).to(r.dtype) for r in results)
        given = {name: value.to(device) for name, value in given.items()}
        for name in self.trained:
            given[name].requires_grad_()
        return Operands(given, tuple(g.to(device) for g in incoming))

    def bind(self, variant: str, operands: Operands, function: Callable[..., Any] | None) -> Bound:
        """A variant on these operands; `function` is what `self.function` gave for it."""
        given = operands.given
        if function is None:
            return self.peers[variant](given)
        first, *rest = given.items()
        call = partial(function, first[1], **dict(rest))
        return Bound(call, {name: given[name] for name in self.trained})

    def function(self, variant: str) -> Callable[..., Any]:
        """The function of a variant that is not a peer: "eager", "compile" or "fused"."""
        if variant == "fused":
            op = partial(getattr(kernels, self.op), **self.options, **self.fused_options)
            used = self.used
            return op if used is None else lambda *given, **named: op(*given, **named)[used]
        written = partial(self.plain, **self.options)
        return torch.compile(written, fullgraph=True) if variant == "compile" else written

    def exact(self, operands: Operands) -> Results:
        """Results and gradients of plain PyTorch in float64."""
        given = {
            name: value.detach().double() if value.is_floating_point() else value
            for name, value in operands.given.items()
        }
        for name in self.trained:
            given[name].requires_grad_()
        call = partial(self.plain, **given, **self.options)
        bound = Bound(call, {name: given[name] for name in self.trained})
        return self.named(*step(bound, tuple(g.double() for g in operands.incoming)))

    def named(self, results: tuple[Tensor, ...], grads: Mapping[str, Tensor]) -> Results:
        """What `step` returned, by name."""
        named = dict(zip(self.results, results, strict=True))
        return named | {f"the gradient of {name}": grad for name, grad in grads.items()}


def step(
    bound: Bound, incoming: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """One call, and the gradients of its leaves where it has any."""
    if not bound.leaves:
        with torch.no_grad():
            return _tuple(bound.call()), {}
    results = _tuple(bound.call())
    grads = torch.autograd.grad(results, tuple(bound.leaves.values()), incoming)
    return results, dict(zip(bound.leaves, grads, strict=True))


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


# --- bytes ---------------------------------------------------------------------------------------


def _elements(case: Case) -> int:
    return math.prod(case.shape)


def _coupling_bytes(case: Case) -> int:
    """x and params in, y out; gradient of y, y and params in, gradients of x and params out."""
    batch, channels = case.shape[:2]
    vectors = 4 * (2 * channels + channels // 2) if "gain" in case.trained else 0
    return 8 * _elements(case) * case.dtype.itemsize + 3 * 4 * batch + 3 * vectors


def _actnorm_bytes(case: Case) -> int:
    """x in, y out; gradient of y and y in, gradient of x out."""
    batch, channels = case.shape[:2]
    return 5 * _elements(case) * case.dtype.itemsize + 3 * 4 * batch + 3 * 4 * 2 * channels


def _statistics_bytes(case: Case) -> int:
    return _elements(case) * case.dtype.itemsize + 2 * 4 * case.shape[1]


def _logit_bytes(case: Case) -> int:
    """x in, y out; gradient of y and y in, gradient of x out."""
    return 4 * (5 * _elements(case) + 3 * case.shape[0])


def _dequantize_bytes(case: Case) -> int:
    """Grey levels of one byte in, float32 out."""
    return 5 * _elements(case) + 2 * 4 * case.shape[0]


def _normal_bytes(case: Case) -> int:
    """z in; z in, gradient of z out."""
    return 4 * (3 * _elements(case) + 3 * case.shape[0])


def _mixture_bytes(case: Case) -> int:
    """z and means in, (B, K) tables out; the same and their gradients in, gradients of z and means out."""
    batch, size = case.shape
    tables = 1 if case.used is not None else 1 + 2 * _CLASSES
    forward = batch * size + _CLASSES * size + batch * tables
    return 4 * (2 * forward + batch * size + _CLASSES * size + batch * tables)


def _boundary_bytes(case: Case) -> int:
    """Means in, z and soft labels out; gradients of both, z, labels and means in, gradient of means out."""
    batch, size = case.shape
    return 4 * (3 * (batch * size + batch * _CLASSES) + 3 * _CLASSES * size)


# --- operands ------------------------------------------------------------------------------------


def _normal(*size: int, g: Generator) -> Tensor:
    return torch.randn(size, generator=g)


def _coupling(name: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    batch, channels, *spatial = shape
    return {
        name: _normal(*shape, g=g),
        "params": _normal(batch, channels, *spatial, g=g),
        "log_scale": 0.3 * _normal(channels, g=g),
        "bias": _normal(channels, g=g),
        "gain": 0.7 * _normal(channels // 2, g=g),
        "log_det": _normal(batch, g=g),
    }


def _peer_coupling(name: str, masked: bool, shape: Shape, g: Generator) -> dict[str, Tensor]:
    given = {k: v for k, v in _coupling(name, shape, g).items() if k in (name, "params", "log_det")}
    given["params"] = 0.5 * given["params"]
    if masked:  # even channels stay, odd ones are transformed
        positions = torch.arange(shape[1])
        given["index"] = torch.cat((positions[0::2], positions[1::2]))
    return given


def _actnorm(name: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    given = _coupling(name, shape, g)
    return {key: given[key] for key in (name, "log_scale", "bias", "log_det")}


def _unnormalised(shape: Shape, g: Generator) -> dict[str, Tensor]:
    size = (1, shape[1], *(1,) * (len(shape) - 2))
    return {"x": _normal(*shape, g=g) * _normal(*size, g=g).exp() + _normal(*size, g=g)}


def _means(size: int, g: Generator) -> Tensor:
    """24 standard deviations apart, in any number of dimensions."""
    return 24 / math.sqrt(2 * size) * _normal(_CLASSES, size, g=g)


def _mixture(shape: Shape, g: Generator) -> dict[str, Tensor]:
    """z around points between two classes, so that the posterior is not trivial."""
    batch, size = shape
    means = _means(size, g)
    a, b = torch.randint(_CLASSES, (2, batch), generator=g)
    weight = torch.rand(batch, 1, generator=g)
    return {
        "z": weight * means[a] + (1 - weight) * means[b] + _normal(*shape, g=g),
        "means": means,
        "log_prior": _normal(_CLASSES, g=g).log_softmax(0),
    }


def _latent(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"z": _normal(*shape, g=g), "log_det": _normal(shape[0], g=g)}


def _unit(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"x": torch.rand(shape, generator=g), "log_det": _normal(shape[0], g=g)}


def _grey(shape: Shape, g: Generator) -> dict[str, Tensor]:
    levels = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    return {"x": levels, "log_det": _normal(shape[0], g=g)}


def _only_means(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"means": _means(shape[1], g)}


# --- checks of results that chance has a part in -------------------------------------------------


def _is_off(name: str, values: Tensor, mean: float, variance: float) -> list[str]:
    """Whether mean or variance of many values lie more than 6 standard errors away."""
    count = values.numel()
    kurtosis = ((values - values.mean()) ** 4).mean().item() / variance**2
    deviations = {
        "mean": (values.mean().item() - mean) / math.sqrt(variance / count),
        "variance": (values.var().item() - variance) / (variance * math.sqrt(kurtosis / count)),
    }
    return [f"{name}: its {k} is off by {d:.0f} σ" for k, d in deviations.items() if not abs(d) < 6]


def _check_dequantized(
    case: Case, operands: Operands, got: Results
) -> tuple[dict[str, float], list[str]]:
    """The noise, recovered from y, is uniform, and the log-det is that of x and this noise."""
    levels, alpha = case.options["levels"], case.options["alpha"]
    given = {name: value.detach().cpu() for name, value in operands.given.items()}
    unit = (got["y"].detach().double().cpu().sigmoid() - alpha) / (1 - 2 * alpha)
    noise = levels * unit - given["x"]
    problems = _is_off("the noise", noise, 0.5, 1 / 12)
    if not (noise.min() > -1e-3 and noise.max() < 1 + 1e-3):
        problems.append(f"noise from {noise.min():.3f} to {noise.max():.3f}, want [0, 1)")
    given["log_det"] = given["log_det"].double()
    _, log_det = case.plain(**given, **case.options, noise=noise)
    return relative_errors(got, {"log_det": log_det}), problems


def _check_boundary(
    case: Case, operands: Operands, got: Results
) -> tuple[dict[str, float], list[str]]:
    """z lies around β μ_a + (1 - β) μ_b for every pair a ≠ b alike; labels and gradient are its own.

    Which pair a sample came from is read from z: the means are far enough apart for that.
    """
    beta = case.options["beta"]
    means = operands.given["means"].detach().double().cpu().requires_grad_()
    z = got["z"].detach().double().cpu()
    a, b = torch.combinations(torch.arange(_CLASSES), 2).T  # β = ½ does not tell a from b
    centres = beta * means[a] + (1 - beta) * means[b]
    pair = torch.cdist(z, centres.detach()).argmin(1)
    noise = z - centres.detach()[pair]
    problems = _is_off("z", noise, 0.0, beta**2 + (1 - beta) ** 2)
    expected = len(z) / len(a)
    counts = pair.bincount(minlength=len(a))
    if not (counts - expected).abs().max() < 6 * math.sqrt(expected):
        problems.append(f"pairs drawn {counts.min()} to {counts.max()} times, want {expected:.0f}")
    sample = centres[pair] + noise
    labels = plain._component_log_prob(sample, means).softmax(1)
    incoming = [g.double().cpu() for g in operands.incoming]
    (grad,) = torch.autograd.grad((sample, labels), means, incoming)
    return relative_errors(got, {"labels": labels, "the gradient of means": grad}), problems


# --- other libraries' mixtures -------------------------------------------------------------------


def _flowgmm(given: Mapping[str, Tensor]) -> Bound:
    z, means, log_prior = (given[name] for name in ("z", "means", "log_prior"))
    inverse_softplus = torch.full((_CLASSES,), math.log(math.e - 1), device=z.device)
    return Bound(
        lambda: plain.flowgmm_log_prob(z, means, log_prior, inverse_softplus),
        {"z": z, "means": means},
    )


def _normflows(given: Mapping[str, Tensor]) -> Bound:
    from normflows.distributions import GaussianMixture

    z, means = given["z"], given["means"]
    prior = GaussianMixture(_CLASSES, z.shape[1], trainable=False).float().to(z.device)
    prior.weight_scores = given["log_prior"][None]
    prior.loc = means[None]
    return Bound(lambda: prior.log_prob(z), {"z": z, "means": means})


def _zuko(given: Mapping[str, Tensor]) -> Bound:
    from zuko.mixtures import GMM

    z, means = given["z"], given["means"]
    prior = GMM(z.shape[1], components=_CLASSES, covariance_type="spherical", epsilon=0.0)
    log_scales = torch.zeros_like(prior.phi[2], device=z.device)
    del prior.phi  # parameters of its own
    prior.phi = [given["log_prior"], means, log_scales]
    return Bound(lambda: prior().log_prob(z), {"z": z, "means": means})


# --- the rows ------------------------------------------------------------------------------------

_ALL = ("params", "log_scale", "bias", "gain", "log_det")
_NORM = ("log_scale", "bias", "log_det")


def _flat(shape: Shape) -> Shape:
    return shape[0], math.prod(shape[1:])


def _rows(shape: Shape) -> list[Case]:
    """Every operation at one shape."""
    flat = _flat(shape)
    return [
        Case(
            "actnorm_coupling",
            shape,
            partial(_coupling, "x"),
            plain.actnorm_coupling,
            ("y", "log_det"),
            _coupling_bytes,
            trained=("x", *_ALL),
        ),
        Case(
            "actnorm_coupling_inverse",
            shape,
            partial(_coupling, "y"),
            plain.actnorm_coupling_inverse,
            ("x", "log_det"),
            _coupling_bytes,
            trained=("y", *_ALL),
        ),
        Case(
            "actnorm",
            shape,
            partial(_actnorm, "x"),
            plain.actnorm,
            ("y", "log_det"),
            _actnorm_bytes,
            trained=("x", *_NORM),
        ),
        Case(
            "actnorm_inverse",
            shape,
            partial(_actnorm, "y"),
            plain.actnorm_inverse,
            ("x", "log_det"),
            _actnorm_bytes,
            trained=("y", *_NORM),
        ),
        Case(
            "actnorm_statistics",
            shape,
            _unnormalised,
            plain.actnorm_statistics,
            ("log_scale", "bias"),
            _statistics_bytes,
        ),
        Case(
            "gmm_log_prob",
            flat,
            _mixture,
            plain.gmm_log_prob,
            ("joint", "log_prob", "posterior"),
            _mixture_bytes,
            trained=("z", "means", "log_prior"),
        ),
        Case(
            "standard_normal_log_prob",
            flat,
            _latent,
            plain.standard_normal_log_prob,
            ("log_prob",),
            _normal_bytes,
            trained=("z", "log_det"),
        ),
        Case(
            "logit_transform",
            shape,
            _unit,
            plain.logit_transform,
            ("y", "log_det"),
            _logit_bytes,
            trained=("x", "log_det"),
            options={"alpha": 0.05},
        ),
        Case(
            "dequantize_logit",
            shape,
            _grey,
            plain.dequantize_logit,
            ("y", "log_det"),
            _dequantize_bytes,
            activations=(),
            options={"levels": 256, "alpha": 0.05},
            check=_check_dequantized,
        ),
        Case(
            "boundary_sample",
            flat,
            _only_means,
            plain.boundary_sample,
            ("z", "labels"),
            _boundary_bytes,
            trained=("means",),
            options={"count": flat[0], "beta": 0.5},
            check=_check_boundary,
        ),
    ]


def _bfloat16(shape: Shape) -> Case:
    return Case(
        "actnorm_coupling",
        shape,
        partial(_coupling, "x"),
        plain.actnorm_coupling,
        ("y", "log_det"),
        _coupling_bytes,
        dtype=torch.bfloat16,
        trained=("x", *_ALL),
    )


def _of_a_library(
    library: str,
    shape: Shape,
    function: Callable[..., Any],
    form: kernels.CouplingForm,
    masked: bool = False,
    inverse: bool = False,
) -> Case:
    x, y = ("y", "x") if inverse else ("x", "y")
    return Case(
        "actnorm_coupling_inverse" if inverse else "actnorm_coupling",
        shape,
        partial(_peer_coupling, x, masked),
        function,
        (y, "log_det"),
        _coupling_bytes,
        note=f"as in {library}",
        trained=(x, "params", "log_det"),
        fused_options={"form": form},
    )


_LIBRARIES = (
    _of_a_library(
        "normflows",
        (64, 12, 16, 16),
        plain.normflows_coupling,
        kernels.CouplingForm("exp", interleaved=True, leading="shift"),
        inverse=True,
    ),
    _of_a_library(
        "nflows",
        (4096, 64),
        plain.nflows_coupling,
        kernels.CouplingForm("sigmoid", eps=1e-3, leading="shift"),
        masked=True,
    ),
    _of_a_library(
        "zuko",
        (4096, 64),
        plain.zuko_coupling,
        kernels.CouplingForm("soft_clamp", math.log(1e3), interleaved=True, leading="shift"),
        masked=True,
    ),
    _of_a_library(
        "FrEIA", (64, 12, 16, 16), plain.freia_coupling, kernels.CouplingForm("atan", clamp=2.0)
    ),
)


def _prior(shape: Shape) -> Case:
    """The likelihood alone, which is all that other libraries' mixtures give."""
    return Case(
        "gmm_log_prob",
        shape,
        _mixture,
        lambda z, means, log_prior: plain.gmm_log_prob(z, means, log_prior)[1],
        ("log_prob",),
        _mixture_bytes,
        note="log_prob alone",
        trained=("z", "means"),
        peers={"FlowGMM": _flowgmm, "normflows": _normflows, "zuko": _zuko},
        used=1,
    )


CASES = (
    *(case for shape in SHAPES for case in _rows(shape)),
    *(_bfloat16(shape) for shape in SHAPES),
    *_LIBRARIES,
    _prior((64, 3072)),
)
QUICK_CASES = (*_rows((8, 4, 4, 4)), _bfloat16((8, 4, 4, 4)), _prior((8, 16)))
