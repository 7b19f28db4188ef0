"""The offline gate on one shape, and its findings."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from hybridflow.kernels import check


def test_every_kernel_compiles_without_spills_for_one_shape():
    """In a subprocess: this one interprets the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hybridflow.kernels.check"]
    command += ["--shapes", "4x4x4", "--arch", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{len(lines) - 1} kernels, 0 failures"
    assert len(lines) > 10 and all(line.endswith("ok") for line in lines[:-1])


def inspect(monkeypatch, ptx, stack=0, vectors=True, accumulate="fp32"):
    usage = {"REG": 32, "STACK": stack, "SHARED": 0, "LOCAL": 0}
    monkeypatch.setattr(check, "_resource_usage", lambda cubin: usage)
    constants = (("ACC", accumulate),)
    task = check.Task("m", "k", 90, (), constants, (), (), vectors)
    return check._inspect(ptx, b"", task)


def test_the_gate_sees_spills_narrow_loads_and_float64(monkeypatch):
    wide = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];\n"
    narrow = "ld.global.b32 %r1, [%rd1];\n"
    assert inspect(monkeypatch, wide).faults == ()
    assert inspect(monkeypatch, narrow).faults == ("narrow loads: 4 B",)
    assert inspect(monkeypatch, narrow, vectors=False).faults == ()
    assert inspect(monkeypatch, wide, stack=8).faults == ("spills: stack 8 B, local 0 B",)
    double = wide + "mul.f64 %fd1, %fd2, %fd3;\n"
    assert inspect(monkeypatch, double).faults == ("float64 instructions",)
    assert inspect(monkeypatch, double, accumulate="fp64").faults == ()
