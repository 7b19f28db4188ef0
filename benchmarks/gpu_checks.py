"""Every operation as it must be on a GPU: a table of cases, and one check for all of them.

A case here is one of `benchmarks.cases` whose `plain` is the operation itself: run by its kernels it is
what is checked, run by the reference it is PyTorch's own, run by the reference in float64 it is exact.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.cases import Case, Operands, step
from hybridflow import kernels
from hybridflow.kernels import CouplingForm, _backend, _philox
from hybridflow.kernels.actnorm_coupling.form import PLAIN, Scale
from hybridflow.kernels.check import SHAPES

__all__ = ["capture", "check", "error_of_allowed", "every_case", "results_of", "small_cases"]

Shape = tuple[int, ...]
Results = dict[str, Tensor]
Function = Callable[..., Any]

# Sums taken in another order than PyTorch's differ by a few roundings of the accumulating type: of the
# result's, or, where terms cancel, of the terms', which show in what a rounding of the operands makes.
_ROUNDINGS = 32
_NUDGES = 4
_NARROW = {"y", "x", "a"}  # results in the type of the activations; all others are float32
_CLASSES = 10


# --- the check -----------------------------------------------------------------------------------


def check(case: Case, device: torch.device, function: Function | None = None) -> dict[str, Any]:
    """Check a case, or another function in its place: all results, and gradients of all operands.

    Compared with float64; on memory poisoned with NaN; with a second run, bit for bit; on a GPU with
    the replay of a CUDA graph on operands rewritten after capture, bit for bit. Operands must stay as
    they were. What is drawn without a seed must differ from call to call and from replay to replay.
    """
    written = case.function("eager")
    function = written if function is None else function
    operands = case.operands(0, device)
    before = [t.detach().clone() for t in (*operands.given.values(), *operands.incoming)]
    with _poisoned_memory():
        ours = results_of(case, function, operands)
        again = results_of(case, function, operands)
        replayed = ours if device.type == "cpu" else _replayed(case, function, operands)
    after = (*operands.given.values(), *operands.incoming)
    problems = [f"{name}: differs in a second run" for name in _differing(ours, again)]
    problems += [f"{name}: differs in a replay" for name in _differing(ours, replayed)]
    if not all(map(torch.equal, before, after)):
        problems.append("an operand or a gradient was written to")
    with _backend.using("reference"):
        pytorch, exact = results_of(case, written, operands), case.exact(operands)
        nudged = case.exact(_nudged(operands))
    ratios = {
        name: error_of_allowed(ours[name], pytorch[name], exact[name], nudged[name])
        for name in ours
    }
    problems += [
        f"{name}: error {r:.3g} of the allowed" for name, r in ratios.items() if not r <= 1
    ]
    problems += _misshapen(case, ours, pytorch)
    if "seed" in operands.given:
        problems += _drawn_alike(case, function, operands, device)
    largest = max(ratios.values(), key=lambda r: math.inf if math.isnan(r) else r)
    return {
        "op": case.op,
        "note": case.note,
        "shape": list(case.shape),
        "dtype": case.type_name,
        "passed": not problems,
        "error_of_allowed": float(f"{largest:.3g}") if math.isfinite(largest) else str(largest),
        "problems": problems,
    }


def results_of(case: Case, function: Function, operands: Operands) -> Results:
    """Results of one call and gradients of the operands, by name."""
    results = case.named(*step(case.bind("eager", operands, function), operands.incoming))
    return {name: value.detach() for name, value in results.items()}


@torch.no_grad()
def error_of_allowed(ours: Tensor, pytorch: Tensor, exact: Tensor, nudged: Tensor) -> float:
    """The error of `ours` over the one allowed: the larger ratio of 2-norms and of maxima.

    Allowed is twice PyTorch's own error in the same type and a few roundings of the accumulating type.
    Above 1, or NaN: wrong, and so is another shape.

    Args:
        exact: in float64.
        nudged: the same from operands that are each a rounding of the accumulating type away.
    """
    if ours.shape != exact.shape:
        return math.inf
    rounding = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    ratios = []
    for order in (2, math.inf):
        size, by_nudge, error, of_pytorch = (
            torch.linalg.vector_norm(difference.double(), order)
            for difference in (exact, nudged - exact, ours - exact, pytorch - exact)
        )
        allowed = 2 * of_pytorch + _ROUNDINGS * rounding * size + _NUDGES * by_nudge
        ratios.append(float(error / allowed.clamp_min(torch.finfo(torch.float32).tiny)))
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def _nudged(operands: Operands) -> Operands:
    """In float64, every number changed by about a rounding of float32."""
    generator = Generator().manual_seed(1)

    def nudge(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        by = torch.randn(value.shape, generator=generator).to(value.device)
        return value.detach().double() * (1 + torch.finfo(torch.float32).eps * by)

    given = {name: nudge(value) for name, value in operands.given.items()}
    return Operands(given, tuple(map(nudge, operands.incoming)))


def _differing(a: Results, b: Results) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def _misshapen(case: Case, ours: Results, pytorch: Results) -> list[str]:
    """Results of another type or shape than the reference's, or of fewer digits than float32."""
    wrong = [
        f"{name}: {value.dtype} {tuple(value.shape)}, not as PyTorch's"
        for name, value in ours.items()
        if (value.shape, value.dtype) != (pytorch[name].shape, pytorch[name].dtype)
    ]
    narrow = {*_NARROW, *(f"the gradient of {name}" for name in case.activations)}
    return wrong + [
        f"{name}: {value.dtype}, want float32"
        for name, value in ours.items()
        if name not in narrow and value.dtype.itemsize < 4
    ]


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until written, inside a `with` block."""
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


# --- CUDA graphs ---------------------------------------------------------------------------------


def capture(call: Callable[[], Any], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call after warm-up on a side stream, and what the call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def _replayed(case: Case, function: Function, operands: Operands) -> Results:
    """`results_of` by replay: nothing that was computed during capture can be left over."""
    static = Operands(
        {name: _another(value) for name, value in operands.given.items()},
        tuple(_another(value) for value in operands.incoming),
    )
    graph, results = capture(lambda: results_of(case, function, static))
    for value in results.values():  # first: the gradient of log_det is the one that came in
        value.fill_(math.nan)
    with torch.no_grad():
        for name, value in operands.given.items():
            static.given[name].copy_(value)
        for to, value in zip(static.incoming, operands.incoming, strict=True):
            to.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return {name: value.clone() for name, value in results.items()}


def _another(value: Tensor) -> Tensor:
    """Other values that are as valid: zeros; of integers, which may index something, the reverse."""
    if value.is_floating_point() or value.dim() == 0:
        return torch.zeros_like(value).requires_grad_(value.requires_grad)
    return value.flip(0)


def _drawn_alike(
    case: Case, function: Function, operands: Operands, device: torch.device
) -> list[str]:
    """Complaints about two calls, or two replays, that draw the same without a seed."""
    unseeded = Operands(
        {name: value for name, value in operands.given.items() if name != "seed"},
        operands.incoming,
    )
    first = case.results[0]
    drawn = [results_of(case, function, unseeded)[first] for _ in range(2)]
    problems = ["two calls draw the same"] if torch.equal(*drawn) else []
    if device.type == "cuda":
        graph, results = capture(lambda: results_of(case, function, unseeded))
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append(results[first].clone())
        problems += ["two replays draw the same"] if torch.equal(*replays) else []
    return problems


# --- operands ------------------------------------------------------------------------------------


def _normal(*size: int, g: Generator) -> Tensor:
    return torch.randn(size, generator=g)


def _seed(g: Generator) -> Tensor:
    return torch.randint(2**62, (), generator=g)


def _vectors(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {
        "log_scale": 0.3 * _normal(shape[1], g=g),
        "bias": 0.5 * _normal(shape[1], g=g),
        "log_det": 10 * _normal(shape[0], g=g),
    }


def _coupling(
    first: str, transformed: int, absent: tuple[str, ...], layout: str, shape: Shape, g: Generator
) -> dict[str, Tensor]:
    """Bounded well enough that float16 holds exp(s), its products and their gradients."""
    samples, channels, *spatial = shape
    given = {first: _normal(*shape, g=g)}
    given["params"] = 0.7 * _normal(samples, 2 * transformed, *spatial, g=g)
    given |= _vectors(shape, g)
    given["gain"] = 0.5 + torch.rand(transformed, generator=g)
    given = {name: value for name, value in given.items() if name not in absent}
    if "channels-last" in layout:
        for name in (first, "params"):
            given[name] = given[name].to(memory_format=torch.channels_last)
    if "index" in layout:
        given["index"] = torch.randperm(channels, generator=g)
    return given


def _norm(first: str, layout: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {first: _activation(layout, shape, g), **_vectors(shape, g)}


def _identity(layout: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    given = _norm("x", layout, shape, g)
    del given["log_det"]
    return given


def _activation(layout: str, shape: Shape, g: Generator) -> Tensor:
    x = _normal(*shape, g=g)
    return x.to(memory_format=torch.channels_last) if layout == "channels-last" else x


def _unnormalised(layout: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    per_channel = _normal(1, shape[1], *(1 for _ in shape[2:]), g=g)
    return {"x": _activation(layout, shape, g) * per_channel.exp() + 3 * per_channel}


def _means(classes: int, size: int, g: Generator) -> Tensor:
    """About three standard deviations apart in any number of dimensions, far from the origin."""
    return 2 / math.sqrt(size) * _normal(classes, size, g=g) + 1


def _mixture(classes: int, labelled: bool, shape: Shape, g: Generator) -> dict[str, Tensor]:
    samples, size = shape
    means = _means(classes, size, g)
    given = {
        "z": means[torch.randint(classes, (samples,), generator=g)] + _normal(*shape, g=g),
        "means": means,
        "log_prior": _normal(classes, g=g).log_softmax(0),
    }
    if labelled:  # two in three rows; -1 has none
        labels = torch.randint(classes, (samples,), generator=g)
        given["labels"] = torch.where(torch.arange(samples) % 3 == 0, -1, labels)
    return given


def _latent(layout: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"z": _activation(layout, shape, g), "log_det": _normal(shape[0], g=g)}


def _unit(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"x": torch.rand(shape, generator=g), "log_det": _normal(shape[0], g=g)}


def _logits(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"y": 2 * _normal(*shape, g=g)}


def _grey(levels: int, by: str, shape: Shape, g: Generator) -> dict[str, Tensor]:
    x = torch.randint(levels, shape, generator=g, dtype=torch.uint8)
    noise = _seed(g) if by == "seed" else torch.rand(shape, generator=g)
    return {"x": x, "log_det": _normal(shape[0], g=g), by: noise}


def _prior(shape: Shape, g: Generator) -> dict[str, Tensor]:
    return {"means": _means(_CLASSES, shape[1], g), "seed": _seed(g)}


_STEPS = 3


def _chain(shape: Shape, g: Generator) -> dict[str, Tensor]:
    given = {"x": _normal(*shape, g=g), "log_det": _normal(shape[0], g=g)}
    kept = shape[1] - shape[1] // 2
    for i in range(_STEPS):
        own = _coupling("x", shape[1] // 2, (), "", shape, g)
        given |= {f"{name}_{i}": own[name] for name in ("log_scale", "bias", "gain")}
        given[f"weight_{i}"] = _normal(2 * (shape[1] // 2), kept, 3, 3, g=g) / (3 * kept**0.5)
    return given


# --- calls that differ from the public function's ------------------------------------------------


def _dequantize(x: Tensor, log_det: Tensor, seed: Tensor | None = None, **options: Any) -> Any:
    """In float64, the noise that the seed stands for is given: noise decides the type."""
    if log_det.dtype != torch.float64:
        return kernels.dequantize_logit(x, log_det=log_det, seed=seed, **options)
    assert seed is not None
    noise = _philox.uniforms(seed, x.shape[0], x.shape[1:].numel(), log_det.dtype).view(x.shape)
    return kernels.dequantize_logit(x, log_det=log_det, noise=noise, **options)


def _with_products(op: str, products: torch.dtype, *x: Tensor, **given: Any) -> Any:
    """Products of so few digits, but in float64, which is to be exact."""
    choices = {} if given["log_det"].dtype == torch.float64 else {"products": products}
    return getattr(kernels, op)(*x, **given, **choices)


class _Convolution(nn.Module):
    """A conditioner whose weight is an operand like any other."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weights = (weight,)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter(self._weights)

    def forward(self, a: Tensor) -> Tensor:
        return F.conv2d(a, *self._weights, padding=1).tanh()


def _run_chain(x: Tensor, log_det: Tensor, *, inverse: bool, **vectors: Tensor) -> Any:
    steps = [
        kernels.ChainStep(
            _Convolution(vectors[f"weight_{i}"]),
            x.shape[1] // 2,
            *(vectors[f"{name}_{i}"] for name in ("log_scale", "bias", "gain")),
            flip=i % 2 == 1,
        )
        for i in range(_STEPS)
    ]
    return kernels.coupling_chain(x, steps, log_det, inverse=inverse)


def _conditioner(hidden: int, shape: Shape, g: Generator) -> dict[str, Tensor]:
    half, outputs = shape[1], 2 * shape[1]
    return {
        "a": _normal(*shape, g=g),
        "weight1": _normal(hidden, half, 3, 3, g=g) / (9 * half) ** 0.5,
        "bias1": _normal(hidden, g=g),
        "weight2": _normal(outputs, hidden, 3, 3, g=g) / (9 * hidden) ** 0.5,
        "bias2": _normal(outputs, g=g),
    }


def _conv_coupling(
    first: str,
    transformed: int,
    hidden: int,
    size: int,
    absent: tuple[str, ...],
    layout: str,
    shape: Shape,
    g: Generator,
) -> dict[str, Tensor]:
    """Biases of the hidden units are so large that rounding moves none of them past its ReLU: half of
    them are on and half are off."""
    kept, outputs = shape[1] - transformed, 2 * transformed
    given = {first: _activation(layout, shape, g)}
    given["weight1"] = 0.3 * _normal(hidden, kept, size, size, g=g) / (kept * size**2) ** 0.5
    given["bias1"] = 3.0 - 6.0 * (torch.arange(hidden) % 2)
    given["weight2"] = _normal(outputs, hidden, size, size, g=g) / (9 * hidden * size**2) ** 0.5
    given["bias2"] = 0.3 * _normal(outputs, g=g)
    given |= _vectors(shape, g)
    given["gain"] = 0.5 + torch.rand(transformed, generator=g)
    return {name: value for name, value in given.items() if name not in absent}


def _dense(
    first: str, hidden: int, absent: tuple[str, ...], shape: Shape, g: Generator
) -> dict[str, Tensor]:
    size = shape[1]
    moved = size // 2
    given = {first: _normal(*shape, g=g)}
    widths = (size - moved, hidden, hidden, 2 * moved)
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
        given[f"weight{i}"] = _normal(outputs, inputs, g=g) / inputs**0.5
        given[f"bias{i}"] = 0.3 * _normal(outputs, g=g)
    given |= _vectors(shape, g)
    given["gain"] = 0.5 + torch.rand(moved, generator=g)
    return {name: value for name, value in given.items() if name not in absent}


# --- the table -----------------------------------------------------------------------------------


def _case(
    op: str,
    shape: Shape,
    make: Function,
    results: tuple[str, ...],
    trained: tuple[str, ...],
    dtype: torch.dtype,
    activations: tuple[str, ...],
    note: str = "",
    function: Function | None = None,
    **options: Any,
) -> Case:
    call = getattr(kernels, op) if function is None else function
    return Case(
        *(op, shape, make, call, results, _untimed),
        **{"dtype": dtype, "activations": activations, "note": note},
        **{"trained": trained, "options": options},
    )


def _untimed(case: Case) -> int:
    raise NotImplementedError(f"{case.op}: cases of this table are not timed")


def _couplings(
    shape: Shape,
    dtype: torch.dtype,
    note: str = "",
    *,
    form: CouplingForm = PLAIN,
    transformed: int | None = None,
    absent: tuple[str, ...] = (),
    layout: str = "",
    flip: bool = False,
) -> Iterator[Case]:
    """Both directions."""
    moved = shape[1] // 2 if transformed is None else transformed
    for first, out in (("x", "y"), ("y", "x")):
        names = (first, "params", "log_scale", "bias", "log_det", "gain")
        yield _case(
            *("actnorm_coupling" if first == "x" else "actnorm_coupling_inverse", shape),
            *(functools.partial(_coupling, first, moved, absent, layout), (out, "log_det")),
            *(tuple(name for name in names if name not in absent), dtype, (first, "params")),
            *(note or ("first part" if flip else ""),),
            **{"form": form, "flip": flip},
        )


_ALL_ELSE = CouplingForm("soft_clamp", 2.0, 0.0, 0.5, True, True, "shift", True)


def _forms(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Every scale, every other choice alone, and all of these together."""

    def coupling(note: str, **choices: Any) -> Iterator[Case]:
        return _couplings(shape, dtype, note, **choices)

    for scale in get_args(Scale):
        yield from coupling(scale, form=CouplingForm(scale, clamp=2.0))
    yield from coupling("sigmoid with eps", form=CouplingForm("sigmoid", eps=1e-3))
    yield from coupling("interleaved", form=CouplingForm(interleaved=True))
    yield from coupling("shift leads", form=CouplingForm(leading="shift"))
    yield from coupling("shift first", form=CouplingForm(shift_first=True))
    yield from coupling("actnorm's shift first", form=CouplingForm(norm_shift_first=True))
    yield from coupling("factor", form=CouplingForm("exp", factor=0.5))
    yield from coupling("index", layout="index")
    yield from coupling("no actnorm", absent=("log_scale", "bias"))
    yield from coupling("no gain, no log-det", absent=("gain", "log_det"))
    yield from coupling("no identity part", transformed=shape[1])
    images = ("channels-last ",) if len(shape) == 4 else ()
    for layout in images:
        yield from coupling(layout.strip(), layout=layout)
        yield from coupling(f"{layout}first part", layout=layout, flip=True)
        yield from coupling(f"{layout}no identity part", layout=layout, transformed=shape[1])
    for layout in ("", *images):
        yield from coupling(f"{layout}index, all else", form=_ALL_ELSE, layout=f"{layout}index")


def _norms(shape: Shape, dtype: torch.dtype, layout: str = "") -> Iterator[Case]:
    """actnorm, its inverse, its statistics and its identity part."""
    if shape[1] > 1:
        for flip in (False, True):
            yield _case(
                *("actnorm_identity", shape, functools.partial(_identity, layout), ("a",)),
                *(("x", "log_scale", "bias"), dtype, ("x",)),
                *(" ".join(filter(None, (layout, "first part" if flip else ""))),),
                flip=flip,
            )
    for shift_first in (False, True):
        for op, first, out in (("actnorm", "x", "y"), ("actnorm_inverse", "y", "x")):
            yield _case(
                *(op, shape, functools.partial(_norm, first, layout), (out, "log_det")),
                *((first, "log_scale", "bias", "log_det"), dtype, (first,)),
                *(" ".join(filter(None, (layout, "shift first" if shift_first else ""))),),
                shift_first=shift_first,
            )
    yield _case(
        *("actnorm_statistics", shape, functools.partial(_unnormalised, layout)),
        *(("log_scale", "bias"), (), dtype, ("x",), layout),
    )


def _latents(shape: Shape, dtype: torch.dtype, layout: str = "") -> Iterator[Case]:
    """The standard normal's density, and the logit and its inverse."""
    yield _case(
        *("standard_normal_log_prob", shape, functools.partial(_latent, layout), ("log_prob",)),
        *(("z", "log_det"), dtype, ("z",), layout),
    )
    if not layout:
        yield _case(
            *("logit_transform", shape, _unit, ("y", "log_det"), ("x", "log_det"), dtype, ("x",)),
            alpha=0.05,
        )
        yield _case(
            *("logit_transform_inverse", shape, _logits, ("x",), ("y",), dtype, ("y",)), alpha=0.05
        )


def _mixtures(samples: int, size: int, dtype: torch.dtype, classes: int) -> Iterator[Case]:
    names = (("joint", "log_prob", "posterior"), ("z", "means", "log_prior"))
    for labelled in (False, True):
        yield _case(
            *("gmm_log_prob", (samples, size), functools.partial(_mixture, classes, labelled)),
            *(*names, dtype, ("z",), f"{classes} classes{', labels' if labelled else ''}"),
        )


def _samples(samples: int, size: int, dtype: torch.dtype, beta: float) -> Case:
    return _case(
        *("boundary_sample", (samples, size), _prior, ("z", "labels"), ("means",), dtype),
        *(("means",), f"beta {beta}"),
        count=samples,
        beta=beta,
    )


def _dequantized(shape: Shape, dtype: torch.dtype, levels: int) -> Iterator[Case]:
    """The seed's way in float32 alone: only given noise has another type. With two levels a
    difference in the last bits of the noise shows."""
    for by in ("noise", *(("seed",) if dtype == torch.float32 else ())):
        yield _case(
            *("dequantize_logit", shape, functools.partial(_grey, levels, by), ("y", "log_det")),
            *((), torch.float32 if by == "seed" else dtype, ("noise",), f"{levels} levels, {by}"),
            function=_dequantize if by == "seed" else None,
            levels=levels,
            alpha=0.05,
        )


def _conditioners(shape: Shape, dtype: torch.dtype, hidden: int) -> Iterator[Case]:
    """In float32 alone, which has kernels."""
    names = ("a", "weight1", "bias1", "weight2", "bias2")
    if dtype == torch.float32:
        make = functools.partial(_conditioner, hidden)
        yield _case("conv_conditioner", shape, make, ("params",), names, dtype, ())


def _conv_couplings(
    shape: Shape,
    dtype: torch.dtype,
    hidden: int,
    note: str = "",
    *,
    form: CouplingForm = PLAIN,
    transformed: int | None = None,
    size: int = 3,
    absent: tuple[str, ...] = (),
    layout: str = "",
    flip: bool = False,
    products: torch.dtype | None = None,
) -> Iterator[Case]:
    """Both directions."""
    moved = shape[1] // 2 if transformed is None else transformed
    weights = ("weight1", "bias1", "weight2", "bias2")
    for first, out in (("x", "y"), ("y", "x")):
        names = (first, *weights, "log_scale", "bias", "log_det", "gain")
        make = functools.partial(_conv_coupling, first, moved, hidden, size, absent, layout)
        op = "conv_coupling" if first == "x" else "conv_coupling_inverse"
        function = functools.partial(_with_products, op, products) if products else None
        yield _case(
            *(op, shape, make, (out, "log_det")),
            *(tuple(name for name in names if name not in absent), dtype, (first,)),
            *(", ".join(filter(None, (f"{hidden} hidden", layout, note))), function),
            **{"form": form, "flip": flip},
        )


def _mixed_conv_couplings(
    shape: Shape, products: torch.dtype, hidden: int, **choices: Any
) -> Iterator[Case]:
    """Of float32, with narrower products. Beside autocast these are put in tests/kernels: of sums of few
    terms, as here, PyTorch's error may be small by chance."""
    if products != torch.float32:
        note = f"{str(products).removeprefix('torch.')} products"
        yield from _conv_couplings(shape, torch.float32, hidden, note, products=products, **choices)


def _small_conv_couplings(dtype: torch.dtype) -> Iterator[Case]:
    """Images of few pixels, whose weights are dense, and others; then every choice."""
    image, few = (5, 5, 3, 3), (5, 3, 2, 2)
    for shape in (image, few, (2, 3, 1, 1), (1, 4, 9, 11), (1, 18, 4, 3)):
        yield from _conv_couplings(shape, dtype, 20)
        yield from _mixed_conv_couplings(shape, dtype, 20)
    yield from _conv_couplings(image, dtype, 150)
    for shape in (image, few):
        yield from _conv_couplings(shape, dtype, 20, layout="channels-last")
        yield from _conv_couplings(shape, dtype, 20, "first part", flip=True)
        yield from _mixed_conv_couplings(
            shape, dtype, 20, layout="channels-last", flip=True, form=_ALL_ELSE
        )
        yield from _conv_couplings(shape, dtype, 20, "size 1", size=1)
        yield from _conv_couplings(shape, dtype, 20, "one part of 2", transformed=2)
        yield from _conv_couplings(shape, dtype, 20, "all else", form=_ALL_ELSE)
        for absent in (("log_scale", "bias"), ("gain", "log_det")):
            yield from _conv_couplings(shape, dtype, 20, f"no {absent[0]}", absent=absent)


# Hidden channels of the presets' couplings, where they are not 128.
_HIDDEN = {(64, 2, 2): 512, (192, 2, 2): 1024, (4, 4, 4): 32, (8, 2, 2): 64}


def _preset_conv_couplings(shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[Case]:
    for shape in shapes:
        if len(shape) == 3:
            hidden = _HIDDEN.get(shape, 128)
            yield from _conv_couplings((300, *shape), dtype, hidden, layout="channels-last")
            yield from _mixed_conv_couplings((300, *shape), dtype, hidden, layout="channels-last")


def _dense_couplings(
    shape: Shape,
    dtype: torch.dtype,
    hidden: int,
    note: str = "",
    *,
    form: CouplingForm = PLAIN,
    absent: tuple[str, ...] = (),
    flip: bool = False,
) -> Iterator[Case]:
    """Coupling and conditioner in one, both directions. In float32 alone: what 16 bits round in the
    hidden layers shows in the log-det, in another way in every order of the sums."""
    layers = (f"{kind}{i}" for i in (1, 2, 3) for kind in ("weight", "bias"))
    names = (*layers, "log_scale", "bias", "log_det", "gain")
    for first, out in (("x", "y"), ("y", "x")) if dtype == torch.float32 else ():
        yield _case(
            *("mlp_coupling" if first == "x" else "mlp_coupling_inverse", shape),
            *(functools.partial(_dense, first, hidden, absent), (out, "log_det")),
            *(tuple(name for name in (first, *names) if name not in absent), dtype, (first,)),
            *(" ".join(filter(None, (f"hidden {hidden}", note, "first part" if flip else ""))),),
            **{"form": form, "flip": flip},
        )


def _chains(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """In float32 alone: in 16 bits the inverted activations differ by more than a rounding."""
    vectors = ("log_scale", "bias", "gain", "weight")
    trained = ("x", "log_det", *(f"{name}_{i}" for i in range(_STEPS) for name in vectors))
    for inverse in (False, True) if dtype == torch.float32 else ():
        yield _case(
            *("coupling_chain", shape, _chain, ("y", "log_det"), trained, dtype, ("x",)),
            *("inverse" if inverse else "", _run_chain),
            inverse=inverse,
        )


def small_cases(dtype: torch.dtype) -> list[Case]:
    """Every kernel of every operation and form, at the smallest odd sizes."""
    image, line, vector = (5, 5, 3, 3), (3, 5, 7), (7, 3)
    return [
        *_forms(image, dtype),
        *(case for shape in (line, vector, (1, 2)) for case in _couplings(shape, dtype)),
        *(case for shape in (line, vector) for case in _couplings(shape, dtype, flip=True)),
        *(case for shape in (image, vector) for case in _norms(shape, dtype)),
        *_norms(image, dtype, "channels-last"),
        *(case for shape in (image, vector) for case in _latents(shape, dtype)),
        *_latents(image, dtype, "channels-last"),
        *(case for classes in (3, 37) for case in _mixtures(7, 9, dtype, classes)),
        *(_samples(7, size, dtype, 0.3) for size in (2, 9)),
        *(case for levels in (2, 256) for case in _dequantized((5, 3, 3, 3), dtype, levels)),
        *_chains((5, 5, 3, 3), dtype),
        *_conditioners((5, 2, 3, 3), dtype, 8),
        *_small_conv_couplings(dtype),
        *_dense_couplings((7, 2), dtype, 3),
        *_dense_couplings((37, 5), dtype, 20, flip=True),
        *_dense_couplings(
            (7, 5), dtype, 20, "bare", absent=("log_scale", "bias", "gain", "log_det")
        ),
        *_dense_couplings((7, 5), dtype, 20, "all else", form=_ALL_ELSE),
    ]


def preset_cases(dtype: torch.dtype, shapes: Sequence[Shape] = SHAPES) -> list[Case]:
    """Every operation at the shapes of the presets, with samples of two numbers."""
    sizes = sorted({math.prod(shape) for shape in shapes})
    return [
        *(case for shape in shapes for case in _couplings((300, *shape), dtype)),
        *(case for size in sizes for case in _mixtures(300, size, dtype, _CLASSES)),
        *(_samples(300, size, dtype, 0.5) for size in sizes),
        *(case for shape in shapes for case in _latents((300, *shape), dtype)),
        *(case for image in _IMAGES for case in _dequantized((300, *image), dtype, 256)),
        *(case for shape in shapes for case in _couplings((37, *shape), dtype, flip=True)),
        *(case for shape in shapes[::3] for case in _norms((300, *shape), dtype)),
        *_preset_conv_couplings(shapes, dtype),
    ]


_IMAGES = ((1, 32, 32), (3, 32, 32), (1, 8, 8))


def every_case(dtype: torch.dtype) -> list[Case]:
    """Small sizes first, whose kernels the sanitizer then finds compiled; presets; forms at a shape of
    theirs."""
    form_shape = (37, 12, 16, 16)
    return [
        *small_cases(dtype),
        *preset_cases(dtype),
        *_forms(form_shape, dtype),
        *_norms(form_shape, dtype, "channels-last"),
        *_mixtures(300, 3072, dtype, 100),
        *_chains((64, 12, 16, 16), dtype),
        *_dense_couplings((300, 2), dtype, 64),
        *_dense_couplings((20_000, 64), dtype, 128),
    ]
