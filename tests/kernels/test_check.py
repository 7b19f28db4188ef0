"""The offline gate on one shape, and that it finds each kind of fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hybridflow.kernels import check
from hybridflow.kernels._triton import Launch

# Kernels that are bad on purpose, in the folder of an op of their own.
BAD = '''
import torch
import triton
import triton.language as tl

from hybridflow.kernels._triton import launch, recording


@triton.jit
def strided(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + 2 * i))


@triton.jit
def double(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.sqrt(tl.load(x + i).to(tl.float64)))


@triton.jit
def spilling(x, y, N: tl.constexpr):
    """Everything has to wait for the sum, in the few registers that the launch allows."""
    i = tl.arange(0, N)
    e = tl.exp(tl.load(x + i).to(tl.float32))
    tl.store(y + i, e / tl.sum(e, axis=0))


@triton.jit
def wrong(x, y, N: tl.constexpr):
    tl.store(y, tl.load(x) + tl.arange(0, N).no_such_thing)


@triton.jit
def product(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile))


def launches(shape, dtype):
    x = torch.empty(1 << 16, dtype=dtype, device="meta")
    y = torch.empty(1 << 16, dtype=torch.float32, device="meta")
    with recording() as made:
        launch(strided, (1,), x, y, N=1024, num_warps=4)
        launch(double, (1,), x, y, N=1024, num_warps=4)
        launch(spilling, (1,), x, y, N=8192, num_warps=1, maxnreg=64, waves_per_eu=8)
        launch(wrong, (1,), x, y, N=1024, num_warps=4)
        launch(product, (1,), x, y, N=64, num_warps=4)
    return [(launch, 1024) for launch in made]
'''


def run(*arguments, **variables):
    """In a subprocess: this one interprets the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_spills_for_one_shape():
    done = run("-m", "hybridflow.kernels.check", "--shapes", "4x4x4", "--arch", "90", "gfx942")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith(f"{len(lines)} kernels, 0 failures, Triton ")
    assert all(line.endswith("ok") for line in lines)
    for op in {*check.OPS} - {"mlp_coupling"}:  # that is for vectors
        assert f" {op} " in done.stdout
    for chip in ("sm_90", "gfx942"):
        assert sum(line.startswith(chip) for line in lines) > 8


BAD_OP = """
import sys, bad
from hybridflow.kernels import check
sys.modules["hybridflow.kernels.bad.gate"] = bad
check.OPS = ("bad",)
check.DTYPES = (bad.torch.bfloat16,)
sys.exit(check.main(["--ops", "bad", "--shapes", "2", "--arch", "90", "gfx942", "--jobs", "1"]))
"""


def test_bad_kernels_are_found_on_both_makers_chips(tmp_path: Path):
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "go.py").write_text(f"if __name__ == '__main__':{BAD_OP}".replace("\n", "\n    "))
    done = run(str(tmp_path / "go.py"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("10 kernels, 8 failures, Triton ")
    for name, fault in {
        "strided": "narrow loads",
        "double": "float64 instructions",
        "spilling": "spills",
        "wrong": "does not compile",
    }.items():
        found = [line for line in lines if f" {name} " in line]
        assert len(found) == 2 and all(fault in line for line in found), found
    products = [line for line in lines if " product " in line]
    assert len(products) == 2 and all(line.endswith("ok") for line in products), products
    assert not any("tensor cores 0 " in line for line in products)


def test_a_gate_may_compile_less_for_other_chips_unless_all_is_asked_for(tmp_path: Path):
    """Of two good kernels here the second is left out elsewhere than on sm_90."""
    good = (
        BAD[: BAD.index("def launches")]
        + """
def launches(shape, dtype, sizes=(1024, 2048)):
    x = torch.empty(1 << 16, dtype=dtype, device="meta")
    with recording() as made:
        for n in sizes:
            launch(contiguous, (1,), x, x, N=n, num_warps=4)
    return [(launch, 1024) for launch in made]


def launches_elsewhere(shape, dtype):
    return launches(shape, dtype, (1024,))
"""
    )
    good = good.replace("def strided", "def contiguous").replace("x + 2 * i", "x + i")
    (tmp_path / "bad.py").write_text(good)
    script = f"if __name__ == '__main__':{BAD_OP}".replace("\n", "\n    ")
    for option, counts in ("", {"sm_90": 2, "gfx942": 1}), ('"--all", ', {"sm_90": 2, "gfx942": 2}):
        (tmp_path / "go.py").write_text(script.replace('"--ops"', f'{option}"--ops"'))
        done = run(str(tmp_path / "go.py"), PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        *lines, last = done.stdout.splitlines()
        assert {chip: sum(x.startswith(chip) for x in lines) for chip in counts} == counts
        assert ("of bad all for sm_90 and a part for other chips" in last) == (not option)


def nvidia(monkeypatch, ptx, stack=0, spills="", shared=0, vectors=True, type_="*fp32", ttir=""):
    monkeypatch.setattr(check, "_nvidia_resources", lambda cubin: (32, stack, spills))
    task = check.Task("op", "m", "k", "80", (("x", type_),), (), (), (), vectors)
    return check._inspect({"ttir": ttir, "ptx": ptx, "cubin": b""}, shared, task).faults


def test_a_fault_is_named_with_what_was_found(monkeypatch):
    wide = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
    narrow = "ld.global.b32 %r1, [%rd1];\n"
    assert nvidia(monkeypatch, wide) == ()
    assert nvidia(monkeypatch, narrow) == ("narrow loads: 4 B",)
    assert nvidia(monkeypatch, narrow, vectors=False) == ()
    assert nvidia(monkeypatch, wide, stack=8) == ("spills: stack 8 B",)
    assert nvidia(monkeypatch, wide, spills="local 4 B") == ("spills: stack 0 B, local 4 B",)
    above = ("shared memory: 166913 B, the limit is 166912 B",)
    assert nvidia(monkeypatch, wide, shared=163 * 1024 + 1) == above
    assert nvidia(monkeypatch, wide, shared=163 * 1024) == ()
    double = wide + "mul.f64 %fd1, %fd2, %fd3;\n"
    assert nvidia(monkeypatch, double) == ("float64 instructions",)
    assert nvidia(monkeypatch, double, type_="*fp64") == ()


def test_wide_loads_of_indices_do_not_hide_narrow_ones_of_values(monkeypatch):
    indices = "ld.global.v2.b64 {%rd1, %rd2}, [%rd3];\nld.global.b32 %r1, [%rd4];\n"
    assert nvidia(monkeypatch, indices) == ("narrow loads: 4 B",)
    copied = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
    assert nvidia(monkeypatch, copied) == ()


def test_a_16_bit_dot_wants_tensor_cores_and_an_exact_one_does_not(monkeypatch):
    wide = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
    exact = "%0 = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>"
    half = exact.replace("xf32> *", "xbf16> *")
    tf32 = exact.replace("%c", "%c, inputPrecision = tf32")
    missing = ("a dot without tensor cores",)
    assert nvidia(monkeypatch, wide, ttir=exact) == ()
    assert nvidia(monkeypatch, wide, ttir=half) == missing
    assert nvidia(monkeypatch, wide, ttir=tf32) == missing
    matrix = wide + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};\n"
    assert nvidia(monkeypatch, matrix, ttir=half) == ()


def test_options_for_amd_are_its_own_with_half_the_warps_and_no_limit_on_registers():
    options = {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    made = Launch(None, (), options, amd={"num_stages": 1})
    assert made.options_for(amd=False) == options
    assert made.options_for(amd=True) == {"num_warps": 4, "num_stages": 1}


LISTING = """
    {load} v[0:3], v0, s[0:1]
    v_add_f32_e32 v0, v1, v2
    {work}
    .private_segment_fixed_size: {scratch}
    .sgpr_spill_count: {scalars}
    .vgpr_count: 24
    .vgpr_spill_count: {vectors}
"""


def amd(load="global_load_dwordx4", work="s_nop 0", scratch=0, scalars=0, vectors=0, shared=0):
    listing = LISTING.format(
        load=load, work=work, scratch=scratch, scalars=scalars, vectors=vectors
    )
    task = check.Task("op", "m", "k", "gfx942", (("x", "*bf16"),), (), (), (), True)
    result = check._inspect({"ttir": "", "amdgcn": listing}, shared, task)
    assert result.registers == 24
    return result.faults


def test_a_listing_for_amd_is_read_alike():
    assert amd() == ()
    assert amd(load="buffer_load_dwordx4") == ()
    assert amd(load="buffer_load_dwordx2") == ("narrow loads: 8 B",)
    assert amd(load="global_load_ushort") == ("narrow loads: 2 B",)
    assert amd(scratch=12) == ("spills: stack 12 B",)
    assert amd(vectors=3) == ("spills: stack 0 B, 3 vector and 0 scalar registers",)
    assert amd(scalars=2) == ("spills: stack 0 B, 0 vector and 2 scalar registers",)
    assert amd(work="v_mul_f64 v[0:1], v[2:3], v[4:5]") == ("float64 instructions",)
    assert amd(shared=65537) == ("shared memory: 65537 B, the limit is 65536 B",)
