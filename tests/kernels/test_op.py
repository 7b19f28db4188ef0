"""The op as PyTorch sees it: operator registration, compilation, import."""

import shutil
import subprocess
import sys

import pytest
import torch

from hybridflow.kernels import (
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
)


@pytest.mark.parametrize("given", (False, True))
def test_operators_are_registered_correctly(operands, given):
    ops = torch.ops.hybridflow
    x, params, log_scale, bias, gain, log_det = (t.detach() for t in operands(3, 5, 2))
    small = (params, log_scale, bias, gain)
    a = x[:, :3].clone()
    for op, arguments in (
        (ops.actnorm_identity, (x, log_scale, bias, False)),
        (ops.actnorm_identity_backward, (a, a, log_scale, bias, False)),
        (ops.actnorm_coupling, (x, *small, log_det if given else None, True)),
        (ops.actnorm_coupling_inverse, (x, *small, log_det if given else None, True)),
        (ops.actnorm_coupling_backward, (x, log_det, x, *small, given)),
        (ops.actnorm_coupling_inverse_backward, (x, log_det, x, *small, given)),
    ):
        torch.library.opcheck(op.default, arguments)


def step(x, params, log_scale, bias, gain, log_det):
    a = actnorm_identity(x, log_scale, bias, flip=True)
    y, total = actnorm_coupling(x, params + a.mean(), log_scale, bias, gain, log_det, flip=True)
    back, zero = actnorm_coupling_inverse(y * 2, params, log_scale, bias, gain, flip=True)
    return (back * y).sum() + (total * zero).sum()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_whole_the_functions_give_the_same(operands, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    tensors = operands(3, 4, 2)
    want = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*tensors), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_forced_backend_ends_with_its_block():
    before = _backend.choose(torch.empty(1))
    with _backend.using("reference"):
        assert _backend.choose(torch.empty(1)) == "reference"
    assert _backend.choose(torch.empty(1)) == before


def test_importing_the_kernels_imports_neither_triton_nor_the_trainer():
    code = (
        "import sys, hybridflow.kernels\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "unwanted = {'triton', 'tyro', 'safetensors', 'pooch', 'sklearn', 'matplotlib'}\n"
        "assert not loaded & unwanted, loaded & unwanted\n"
        "assert 'hybridflow.flow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
