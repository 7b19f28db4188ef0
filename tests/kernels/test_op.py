"""The op as PyTorch sees it: operator registration, compilation, import."""

import shutil
import subprocess
import sys

import pytest
import torch

from hybridflow.kernels import (
    CouplingForm,
    _backend,
    actnorm_coupling,
    actnorm_coupling_inverse,
    actnorm_identity,
)


@pytest.mark.parametrize("given", (False, True))
@pytest.mark.parametrize("channels_last", (False, True))
def test_operators_are_registered_correctly(operands, given, channels_last):
    ops = torch.ops.hybridflow
    tensors = [t.detach() for t in operands(3, 5, 2, 3)]
    if channels_last:
        tensors[:2] = (t.to(memory_format=torch.channels_last) for t in tensors[:2])
    x, params, log_scale, bias, gain, log_det = tensors
    norm = (log_scale, bias) if given else (None, None)
    operands = (params, *norm, gain if given else None)
    index = None if given else torch.tensor([3, 1, 0, 2, 4])
    form = CouplingForm("atan", shift_first=given).key
    a = x[:, :3].clone()
    for op, arguments in (
        (ops.actnorm_identity, (x, log_scale, bias, index, 2, form, given)),
        (ops.actnorm_identity_backward, (a, a, log_scale, bias, index, 2, form, given)),
        (
            ops.actnorm_coupling,
            (x, *operands, log_det if given else None, index, form, given, True),
        ),
        (ops.actnorm_coupling, (x, None, *norm, None, None, None, form, False, False)),
        (ops.actnorm_coupling_backward, (x, log_det, x, *operands, index, form, given, False)),
        (ops.actnorm_moments, (x,)),
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
