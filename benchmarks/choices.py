"""Measure where a coupling is faster with its conditioner as one op: `python -m benchmarks.choices`.

Rewrites the section of this device in kernels/swap/choices.json, from which `fuse` reads how a conditioner
runs. Steps of the presets' flows, forward and backward, with the conditioner as one op and layer by layer;
the two take turns. They are float32, and under autocast where products are of another type. Exit status: 0.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import commit
from benchmarks.measuring import command, machine, quantiles, rounds_for
from hybridflow.flow.coupling import FlowStep, conv_conditioner, dense_conditioner
from hybridflow.kernels import fuse
from hybridflow.kernels.swap import _choices

__all__ = ["LAYERS", "main", "measure"]

_BATCHES = (1, 4, 16, 64, 300)
_TURNS = 5
_SECONDS = 0.05  # of a turn

# Channels of the step, height and width, hidden channels.
_CONVOLUTIONS = (
    *((4, 16, 128), (8, 8, 128), (16, 4, 128), (64, 2, 512)),  # mnist
    *((12, 16, 128), (24, 8, 128), (48, 4, 128), (192, 2, 1024)),  # cifar10
    *((12, 16, 512), (24, 8, 512), (48, 4, 512), (192, 2, 512)),  # svhn
    *((4, 4, 32), (8, 2, 32), (32, 1, 64)),  # digits
    *((4, 16, 32), (8, 8, 32), (16, 4, 32), (64, 2, 64)),  # mnist-small
)
# Entries of a vector, hidden units.
_DENSE = ((2, 64), (2, 128), (16, 64), (64, 64), (64, 128), (64, 256))
LAYERS = (
    *(
        _choices.Layer("conv", c - c // 2, hidden, 2 * (c // 2), 3, size, size)
        for c, size, hidden in _CONVOLUTIONS
    ),
    *(_choices.Layer("dense", d - d // 2, hidden, 2 * (d // 2)) for d, hidden in _DENSE),
)


def _step(layer: _choices.Layer, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    """A fused step with this conditioner, and the shape of a sample."""
    channels, dense = layer.inputs + layer.outputs // 2, layer.kind == "dense"
    make = dense_conditioner if dense else conv_conditioner
    step = FlowStep(channels, make(layer.inputs, layer.hidden, layer.outputs))
    nn.init.normal_(step.coupling.conditioner[-1].weight, std=0.01)
    step.to(device)
    fuse(step)
    return step, (channels,) if dense else (channels, layer.height, layer.width)


def _run(step: nn.Module, x: Tensor, weight: Tensor, products: torch.dtype) -> None:
    with torch.autocast(x.device.type, products, enabled=products != x.dtype):
        y, log_det = step(x)
    torch.autograd.grad((y, log_det), [x, *step.parameters()], (weight, log_det.detach()))
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(
    layer: _choices.Layer,
    device: torch.device,
    products: torch.dtype,
    batches: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """A row of the table: for each number of samples how many times faster one op is."""
    step, shape = _step(layer, device)
    faster = {}
    for batch in batches:
        x = torch.randn(batch, *shape, device=device, requires_grad=True)
        weight = torch.randn_like(x)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _, one_op in itertools.product(range(_TURNS), times):
            with _choices.using(one_op):
                _run(step, x, weight, products)
                start = time.perf_counter()
                _run(step, x, weight, products)
                for _ in range(rounds_for(time.perf_counter() - start, seconds, 3)):
                    start = time.perf_counter()
                    _run(step, x, weight, products)
                    times[one_op].append(time.perf_counter() - start)
        faster[batch] = round(quantiles(times[False])[1] / quantiles(times[True])[1], 2)
    return layer._asdict() | {"fewest": fewest(faster), "faster": faster}


def fewest(faster: dict[int, float]) -> int | None:
    """The least number of samples from which on one op was never slower."""
    least = None
    for batch, ratio in sorted(faster.items(), reverse=True):
        if ratio < 1:
            break
        least = batch
    return least


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.choices", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--type",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the convolutions' products",
    )
    parser.add_argument("--out", type=Path, default=_choices.PATH)
    parser.add_argument("--batches", type=int, nargs="+", default=_BATCHES)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of a turn")
    args = parser.parse_args(argv)
    if args.device.type == "cpu" and args.type != "float32":
        parser.error(
            f"--type: got {args.type}, want float32: on a CPU there is no op of other types"
        )
    products = getattr(torch, args.type)
    key = _choices.device_key(args.device, products)
    section: dict[str, Any] = {
        "command": command("benchmarks.choices", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(args.device),
        "rows": [],
    }
    for layer in LAYERS:
        row = measure(layer, args.device, products, args.batches, args.seconds)
        section["rows"].append(row)
        sections = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(sections | {key: section}, indent=1) + "\n")
        print(layer, row["fewest"], row["faster"], flush=True)
    print(f"table: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
