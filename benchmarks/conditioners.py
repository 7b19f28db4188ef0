"""Measure the convolutional conditioner: `python -m benchmarks.conditioners`.

Forward and backward at the shapes of the presets, as PyTorch runs it (contiguous and channels-last),
compiled, and as `hybridflow.kernels.conv_conditioner` does. Where there is AMX, also the latter with
products of PyTorch's precision "high", and PyTorch under autocast to bfloat16 and `conv_conditioner` with
such products. Variants take turns in one run. Exit status: 0 if every variant was right.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import RESULTS, commit
from benchmarks.measuring import command, machine, quantiles, relative_errors, rounds_for, verdict
from hybridflow.kernels import conv_conditioner, native
from hybridflow.precision import arithmetic

__all__ = ["SHAPES", "Shape", "main", "matmul_rate", "measure"]

_TURNS = 5
_SECONDS = 0.25  # of a turn


@dataclass(frozen=True)
class Shape:
    """One conditioner: C channels of x, half of which it sees, on images of size x size."""

    data: str
    batch: int
    channels: int
    size: int
    hidden: int

    @property
    def flops(self) -> int:
        """Of forward and backward, taps outside the image and what is computed twice not counted as
        saved or spent: three times two 3x3 convolutions."""
        layers = self.channels // 2 * self.hidden + self.hidden * self.channels
        return 3 * 2 * 9 * self.batch * self.size**2 * layers


SHAPES = (
    *(Shape("MNIST", 300, c, s, h) for c, s, h in ((4, 16, 128), (8, 8, 128), (16, 4, 128), (64, 2, 512))),
    *(Shape("CIFAR-10", 64, c, s, 128) for c, s in ((12, 16), (24, 8), (48, 4))),
    Shape("CIFAR-10", 64, 192, 2, 1024),
    *(Shape("SVHN", 64, c, s, 512) for c, s in ((12, 16), (24, 8), (48, 4), (192, 2))),
    *(Shape("digits", 150, c, s, h) for c, s, h in ((4, 4, 32), (8, 2, 64))),
    *(Shape("one image", 1, c, s, h) for c, s, h in ((4, 16, 128), (16, 4, 128), (64, 2, 512))),
    *(Shape("64 positions", 4, c, 4, h) for c, h in ((16, 128), (48, 512))),
    *(Shape("64 positions", 16, c, 2, h) for c, h in ((64, 512), (192, 1024))),
)  # fmt: skip


def _plain(a: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    hidden = F.conv2d(a, weight1, bias1, padding=1).relu()
    return F.conv2d(hidden, weight2, bias2, padding=1)


def _autocast(*operands: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return _plain(*operands)


def _operands(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """a, weights and biases, and the gradient of the output.

    What the ReLU sees is a whole number and a half: no rounding decides on which side of zero it is, and
    all variants have the same gradient.
    """
    generator = torch.Generator().manual_seed(0)
    half, hidden, outputs = shape.channels // 2, shape.hidden, shape.channels
    image = shape.size, shape.size

    def whole(most: int, *size: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=generator).float()

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    values = [
        whole(3, shape.batch, half, *image),
        *(whole(2, hidden, half, 3, 3), torch.full((hidden,), 0.5)),
        *(normal(outputs, hidden, 3, 3), normal(outputs)),
    ]
    return values, normal(shape.batch, outputs, *image)


def _step(function: Callable[..., Tensor], values: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [v.detach().requires_grad_() for v in values]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _named(results: Sequence[Tensor]) -> dict[str, Tensor]:
    names = ("params", "a", "weight1", "bias1", "weight2", "bias2")
    return dict(zip(names, results, strict=True))


def measure(shape: Shape, seconds: float = _SECONDS) -> list[dict[str, Any]]:
    """A row for each variant: times in µs (p20, p50, p80), GFLOP/s, and what is wrong with it."""
    torch.compiler.reset()
    values, grad = _operands(shape)
    last = [v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    grad_last = grad.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(_plain, fullgraph=True)
    calls: dict[str, Callable[[], list[Tensor]]] = {
        "eager": lambda: _step(_plain, values, grad),
        "eager, channels-last": lambda: _step(_plain, last, grad_last),
        "compile": lambda: _step(compiled, values, grad),
        "fused": lambda: _step(conv_conditioner, values, grad),
    }
    if native.available() and native.load().tiles is not None:
        rounded = functools.partial(conv_conditioner, products=torch.bfloat16)
        calls |= {
            "fused, high": arithmetic("high", torch.device("cpu"))(calls["fused"]),
            "eager, bf16": lambda: _step(_autocast, values, grad),
            "eager, channels-last, bf16": lambda: _step(_autocast, last, grad_last),
            "fused, bf16": lambda: _step(rounded, values, grad),
        }
    exact = _named(_step(_plain, [v.double() for v in values], grad.double()))
    errors = {name: relative_errors(_named(call()), exact) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(_TURNS), calls.items()):
        call()
        start = time.perf_counter()
        call()
        for _ in range(rounds_for(time.perf_counter() - start, seconds, 3)):
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    rows = []
    for name, us in times.items():
        low, middle, high = quantiles(us)
        eager, dtype = "eager", torch.float32
        if name.endswith(", bf16"):
            eager, dtype = "eager, bf16", torch.bfloat16
        elif name.endswith(", high"):
            dtype = torch.float16  # which has fewer digits
        problems = verdict(errors[name], dtype, None if name == eager else errors[eager])
        rows.append(
            asdict(shape)
            | {"variant": name, "us": [round(t, 1) for t in (low, middle, high)]}
            | {"rounds": len(us), "gflop_s": round(shape.flops / middle / 1e3, 1)}
            | {"error": float(f"{max(errors[name].values()):.2g}"), "problems": problems}
        )
    return rows


def matmul_rate() -> float:
    """GFLOP/s of PyTorch's product of 1024x1024 matrices, the median of twenty."""
    a, b = torch.randn(2, 1024, 1024)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return round(2 * 1024**3 / quantiles(times)[1] / 1e9, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.conditioners", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "conditioners-cpu.json")
    args = parser.parse_args(argv)
    before = commit()
    rows = []
    for shape in SHAPES:
        rate = matmul_rate()
        measured = measure(shape)
        rows += [row | {"matmul_gflop_s": rate} for row in measured]
        print(shape, {row["variant"]: row["us"][1] for row in measured}, flush=True)
    results = {
        "command": command("benchmarks.conditioners", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": before,
        "machine": machine(torch.device("cpu")),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [f"wrong: {r['data']} {r['variant']}: {p}" for r in rows for p in r["problems"]]
    print("\n".join([*wrong, f"results: {args.out}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
