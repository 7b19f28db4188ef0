"""Offline gate: compile every Triton kernel for every preset shape, without a GPU, and inspect it.

    python -m hybridflow.kernels.check [--shapes 4x16x16 2] [--arch 80 90 100] [--jobs 2]

One line for each compiled kernel: registers, stack, shared memory, and the widest global load in
bytes. It fails, with exit status 1, on

- spills: a stack frame or local memory;
- narrow loads: none of 16 bytes where rows are contiguous and a multiple of 16 bytes long;
- float64 instructions in a kernel that does not compute in float64.
"""

import argparse
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._triton import Launch, recording

__all__ = ["main"]

# Channels, then spatial sizes, of every coupling: MNIST; SVHN and CIFAR-10; digits; vectors.
SHAPES = (
    *((4, 16, 16), (8, 8, 8), (16, 4, 4), (64, 2, 2)),
    *((12, 16, 16), (24, 8, 8), (48, 4, 4), (192, 2, 2)),
    *((4, 4, 4), (8, 2, 2), (32, 1, 1)),
    (2,),
)
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)
SAMPLES = 300
VECTOR = 16  # bytes

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Task:
    """One compilation: plain values, so that it can be hashed and sent to another process."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of the arguments known to be multiples of 16
    vectors: bool  # whether 16-byte loads are expected


@dataclass(frozen=True)
class Result:
    """What one compilation gave, and what is wrong with it."""

    registers: int
    stack: int
    shared: int
    widest_load: int
    faults: tuple[str, ...]


def _actnorm_coupling(shape: tuple[int, ...], flip: bool) -> Iterator[tuple[Launch, int]]:
    """Every launch of the op, with the bytes of a contiguous run that its loads walk along."""
    from .actnorm_coupling import triton_impl as op

    channels, *spatial = shape
    moved = channels // 2
    for dtype in DTYPES:
        x = torch.empty(SAMPLES, *shape, dtype=dtype, device="meta")
        params = x.new_empty(SAMPLES, 2 * moved, *spatial)
        vector = x.new_empty(channels, dtype=torch.float32)
        gain, log_det = vector.new_empty(moved), vector.new_empty(SAMPLES)
        operands = (params, vector, vector, gain)
        with recording() as launches:
            a = op.identity(x, vector, vector, flip)
            op.identity_backward(a, a, vector, vector, flip)
            op.forward(x, *operands, log_det, flip)
            op.inverse(x, *operands, log_det, flip)
            op.backward(x, log_det, x, *operands, flip)
            op.inverse_backward(x, log_det, x, *operands, flip)
        positions = x.shape[2:].numel()
        for launch in launches:
            second_stage = "GROUPS" in launch.options
            yield launch, 4 * positions if second_stage else x.element_size() * moved * positions


OPS = (_actnorm_coupling,)


def _task(launch: Launch, run: int, arch: int) -> Task:
    import triton.language as tl

    kernel, constants, options = launch.kernel, [], []
    signature, divisible = [], []
    for name, value in zip(kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature.append((name, _POINTERS[value.dtype]))
        elif value is None or value == 1:  # Triton compiles these in, as it does at a launch
            signature.append((name, "constexpr"))
            constants.append((name, value))
        else:
            signature.append((name, "i32"))
        if isinstance(value, torch.Tensor) or (value and value % 16 == 0):
            divisible.append(kernel.arg_names.index(name))
    for name in kernel.arg_names[len(launch.arguments) :]:
        signature.append((name, "constexpr"))
        constants.append((name, launch.options[name]))
    options = [(k, v) for k, v in launch.options.items() if k not in kernel.arg_names]
    return Task(
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        arch=arch,
        signature=tuple(signature),
        constants=tuple((k, str(v) if isinstance(v, tl.dtype) else v) for k, v in constants),
        options=tuple(options),
        divisible=tuple(divisible),
        vectors=run % VECTOR == 0,
    )


def _compile(task: Task) -> Result:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(task.module), task.kernel)
    constants = {k: tl.dtype(v) if isinstance(v, str) else v for k, v in task.constants}
    source = ASTSource(
        kernel,
        dict(task.signature),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in task.divisible},
    )
    target = GPUTarget("cuda", task.arch, 32)
    compiled = triton.compile(source, target=target, options=dict(task.options))
    return _inspect(compiled.asm["ptx"], compiled.asm["cubin"], task)


def _inspect(ptx: str, cubin: bytes, task: Task) -> Result:
    usage = _resource_usage(cubin)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    widest = max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)
    faults = []
    if usage["STACK"] or usage["LOCAL"]:
        faults.append(f"spills: stack {usage['STACK']} B, local {usage['LOCAL']} B")
    if task.vectors and widest < VECTOR:
        faults.append(f"narrow loads: {widest} B")
    if ".f64" in ptx and dict(task.constants)["ACC"] != "fp64":
        faults.append("float64 instructions")
    return Result(usage["REG"], usage["STACK"], usage["SHARED"], widest, tuple(faults))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridflow.kernels.check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="CxHxW")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)

    tasks: dict[Task, tuple[int, ...]] = {}  # equal specialisations are compiled once
    for op in OPS:
        for i, shape in enumerate(chosen.shapes):
            for launch, run in op(shape, flip=i % 2 == 1):  # the halves are alike: one order each
                for arch in chosen.arch:
                    tasks.setdefault(_task(launch, run, arch), shape)

    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        for (task, shape), result in zip(
            tasks.items(), pool.map(_compile, tasks, chunksize=4), strict=True
        ):
            types = "/".join(dict.fromkeys(t for _, t in task.signature if t.startswith("*")))
            print(
                f"sm_{task.arch:<4} {'x'.join(map(str, shape)):<9} {types:<12} "
                f"{task.kernel.strip('_'):<24} registers {result.registers:<4} "
                f"stack {result.stack:<3} shared {result.shared:<5} load {result.widest_load:<3} "
                f"{'; '.join(result.faults) or 'ok'}",
                flush=True,
            )
            failures += bool(result.faults)
    print(f"{len(tasks)} kernels, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
