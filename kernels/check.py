"""Offline gate: compile every Triton kernel for every preset shape, without a GPU, and inspect it.

    python -m hybridflow.kernels.check [--ops actnorm_coupling] [--shapes 4x16x16 2]
                                       [--arch 80 90 100 gfx942] [--all] [--jobs 2]

One line for each compiled kernel: registers of a thread, stack and shared memory in bytes, the widest
global load in bytes, and tensor-core instructions. It fails, with exit status 1, on

- spills: a stack frame, local or scratch memory, registers kept elsewhere;
- shared memory above the chip's limit;
- narrow loads: none of 16 bytes where rows are contiguous and a multiple of 16 bytes long;
- float64 instructions in a kernel that is given no float64;
- a `tl.dot` of 16-bit or TF32 operands that became no tensor-core instruction.

An op is a folder with a gate.py, whose `launches(shape, dtype)` yields every launch of the op with the
bytes of the contiguous run that its main loads walk along. All of them are compiled for sm_90. Where that
takes long, the folder may have a `launches_elsewhere(shape, dtype)` of the same kind, fewer: those that
are compiled for the other chips, unless --all is given.
"""

import argparse
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._triton import Launch

__all__ = ["main"]

# Channels, then spatial sizes, of every coupling: MNIST; SVHN and CIFAR-10; digits; vectors.
SHAPES = (
    *((4, 16, 16), (8, 8, 8), (16, 4, 4), (64, 2, 2)),
    *((12, 16, 16), (24, 8, 8), (48, 4, 4), (192, 2, 2)),
    *((4, 4, 4), (8, 2, 2), (32, 1, 1)),
    (2,),
)
OPS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/gate.py")))
DTYPES = (torch.float32, torch.bfloat16)
EVERYTHING = "90"  # the chip that every launch is compiled for
VECTOR = 16  # bytes
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}  # a block's

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


Launches = Callable[[tuple[int, ...], torch.dtype], Iterator[tuple[Launch, int]]]


@dataclass(frozen=True)
class Task:
    """One compilation: plain values, so that it can be hashed and sent to another process."""

    op: str
    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of the arguments known to be multiples of 16
    vectors: bool  # whether 16-byte loads are expected


@dataclass(frozen=True)
class _DType:
    """A tl.dtype among the constants, by name."""

    name: str


@dataclass(frozen=True)
class Result:
    """What one compilation gave, and what is wrong with it."""

    registers: int
    stack: int
    shared: int
    widest_load: int
    tensor_cores: int
    faults: tuple[str, ...]


# --- from a launch to a compilation --------------------------------------------------------------


def _task(op: str, launch: Launch, run: int, arch: str) -> Task:
    kernel, constants, signature, divisible = launch.kernel, [], [], []
    options = launch.options_for(amd=_is_amd(arch))
    for position, parameter in enumerate(kernel.params):
        if position < len(launch.arguments):
            value = launch.arguments[position]
        else:
            value = options.pop(parameter.name, parameter.default)
        specialized = not parameter.do_not_specialize
        type_ = "constexpr" if parameter.is_constexpr else _type(value, specialized)
        signature.append((parameter.name, type_))
        if type_ == "constexpr":
            constants.append((parameter.name, _DType(value.name) if _is_dtype(value) else value))
        elif type_.startswith("*") or (specialized and type_ != "fp32" and value % 16 == 0):
            divisible.append(position)
    return Task(
        op=op,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        arch=arch,
        signature=tuple(signature),
        constants=tuple(constants),
        options=tuple(options.items()),
        divisible=tuple(divisible),
        vectors=run % VECTOR == 0,
    )


def _is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def _type(value: Any, specialized: bool) -> str:
    """As Triton types an argument at a launch: None, and if specialized the 1, are compiled in."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (specialized and value == 1):
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_dtype(value: Any) -> bool:
    import triton.language as tl

    return isinstance(value, tl.dtype)


def _compile(task: Task) -> Result:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(task.module), task.kernel)
    constants = {k: tl.dtype(v.name) if isinstance(v, _DType) else v for k, v in task.constants}
    source = ASTSource(
        kernel,
        dict(task.signature),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in task.divisible},
    )
    if _is_amd(task.arch):
        target = GPUTarget("hip", task.arch, 64)
    else:
        target = GPUTarget("cuda", int(task.arch), 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(task.options))
    except Exception as error:  # of many kinds: the front end's, a pass's, ptxas's
        return Result(0, 0, 0, 0, 0, (f"does not compile: {_reason(error)}",))
    return _inspect(compiled.asm, compiled.metadata.shared, task)


def _reason(error: BaseException) -> str:
    """The last line of the first cause; the front end's end with a caret below the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines else type(error).__name__


# --- from a compilation to its faults ------------------------------------------------------------


def _inspect(asm: Mapping[str, Any], shared: int, task: Task) -> Result:
    """`asm` holds what a compilation passed through: "ttir", then "ptx" and "cubin", or "amdgcn"."""
    double = any(type_ == "*fp64" for _, type_ in task.signature)
    if "amdgcn" in asm:
        registers, stack, spills = _amd_resources(asm["amdgcn"])
        loads = _amd_loads(asm["amdgcn"])
        tensor_cores = len(re.findall(r"^\s*v_mfma_", asm["amdgcn"], re.MULTILINE))
        has_float64 = re.search(r"^\s*v_\w*_f64", asm["amdgcn"], re.MULTILINE) is not None
    else:
        registers, stack, spills = _nvidia_resources(asm["cubin"])
        loads = _nvidia_loads(asm["ptx"], double)
        tensor_cores = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", asm["ptx"]))
        has_float64 = ".f64" in asm["ptx"]
    widest = max(loads, default=0)
    faults = []
    if stack or spills:
        faults.append(
            f"spills: stack {stack} B, {spills}" if spills else f"spills: stack {stack} B"
        )
    if shared > SHARED[task.arch]:
        faults.append(f"shared memory: {shared} B, the limit is {SHARED[task.arch]} B")
    if task.vectors and widest < VECTOR:
        faults.append(f"narrow loads: {widest} B")
    if has_float64 and not double:
        faults.append("float64 instructions")
    if not tensor_cores and _asks_for_tensor_cores(asm["ttir"]):
        faults.append("a dot without tensor cores")
    return Result(registers, stack, shared, widest, tensor_cores, tuple(faults))


def _nvidia_resources(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack in bytes, and what else was spilled, of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"], f"local {usage['LOCAL']} B" if usage["LOCAL"] else ""


def _amd_resources(amdgcn: str) -> tuple[int, int, str]:
    """Vector registers, scratch in bytes, and spilled registers, of the one kernel in a listing."""
    keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    found = dict(re.findall(rf"^\s*\.({'|'.join(keys)}):\s*(\d+)", amdgcn, re.MULTILINE))
    registers, scratch, vectors, scalars = (int(found[key]) for key in keys)
    spilled = f"{vectors} vector and {scalars} scalar registers" if vectors or scalars else ""
    return registers, scratch, spilled


def _nvidia_loads(ptx: str, double: bool) -> list[int]:
    """Bytes of each global load. 64-bit elements of a kernel without float64 are indices."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    direct = [int(count or 1) * int(bits) // 8 for count, bits in loads if double or bits != "64"]
    return direct + [int(size, 0) for size in copies]


_AMD_SIZES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}


def _amd_loads(amdgcn: str) -> list[int]:
    """Bytes of each global load; names that are not in the table load a byte."""
    names = re.findall(r"\b(?:global|buffer|flat)_load_(?:lds_)?(dwordx\d|[a-z]+)", amdgcn)
    return [_AMD_SIZES.get(name, 1) for name in names]


def _asks_for_tensor_cores(ttir: str) -> bool:
    return re.search(r"\btt\.dot\b.*(?:= tf32|x(?:bf16|f16)>)", ttir) is not None


# --- command line --------------------------------------------------------------------------------


def _tasks(
    ops: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    archs: tuple[str, ...],
    everything: bool = False,
) -> dict[Task, tuple[int, ...]]:
    """Every compilation and the first shape that asks for it: equal ones are made once."""
    tasks: dict[Task, tuple[int, ...]] = {}
    for op in ops:
        gate = importlib.import_module(f".{op}.gate", __package__)
        for arch in archs:
            of_arch = gate.launches if everything or arch == EVERYTHING else _elsewhere(gate)
            for shape in shapes:
                for dtype in DTYPES:
                    for launch, run in of_arch(shape, dtype):
                        tasks.setdefault(_task(op, launch, run, arch), shape)
    return tasks


def _elsewhere(gate: ModuleType) -> Launches:
    launches: Launches = gate.launches
    return getattr(gate, "launches_elsewhere", launches)


def _left_out(ops: tuple[str, ...], archs: tuple[str, ...]) -> str:
    """What to say of launches that are compiled for sm_90 alone."""
    gates = {op: importlib.import_module(f".{op}.gate", __package__) for op in ops}
    fewer = [op for op, gate in gates.items() if hasattr(gate, "launches_elsewhere")]
    if not fewer or set(archs) <= {EVERYTHING}:
        return ""
    return f"; of {', '.join(fewer)} all for sm_90 and a part for other chips (--all: all)"


def _line(task: Task, shape: tuple[int, ...], result: Result) -> str:
    chip = task.arch if _is_amd(task.arch) else f"sm_{task.arch}"
    types = "/".join(dict.fromkeys(t for _, t in task.signature if t.startswith("*")))
    return (
        f"{chip:<6} {task.op} {'x'.join(map(str, shape)):<8} {types:<17} "
        f"{task.kernel.strip('_'):<24} registers {result.registers:<4} stack {result.stack:<3} "
        f"shared {result.shared:<6} load {result.widest_load:<3} "
        f"tensor cores {result.tensor_cores:<4} {'; '.join(result.faults) or 'ok'}"
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; returns the exit status."""
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m hybridflow.kernels.check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="CxHxW")
    parser.add_argument("--arch", nargs="+", choices=tuple(SHARED), default=tuple(SHARED))
    parser.add_argument("--all", action="store_true", help="every launch for every chip")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)

    ops, archs = tuple(chosen.ops), tuple(chosen.arch)
    tasks = _tasks(ops, tuple(chosen.shapes), archs, chosen.all)
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        results = pool.map(_compile, tasks, chunksize=4)
        for (task, shape), result in zip(tasks.items(), results, strict=True):
            print(_line(task, shape, result), flush=True)
            failures += bool(result.faults)
    left_out = "" if chosen.all else _left_out(ops, archs)
    print(f"{len(tasks)} kernels, {failures} failures, Triton {triton.__version__}{left_out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
