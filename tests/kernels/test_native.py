"""Loading the native library, and what happens without it."""

import subprocess
import sys

import pytest
import torch

from hybridflow.kernels import _backend, actnorm_coupling, native


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_PATH", tmp_path / native._PATH.name)
    native._open.cache_clear()
    yield tmp_path / native._PATH.name
    native._open.cache_clear()


def test_a_library_that_was_not_built_is_reported_in_one_line(no_library):
    assert not native.available()
    assert "was not built" in native.why_missing() and "\n" not in native.why_missing()
    with pytest.raises(native.NativeLibraryError, match=r"C\+\+17 compiler"):
        native.load()


def test_a_library_that_cannot_be_loaded_is_reported(no_library):
    no_library.write_bytes(b"not a library")
    assert "cannot be loaded" in native.why_missing()


def test_without_the_library_the_reference_runs(no_library, operands):
    tensors = operands(3, 4, 2)
    y, log_det = actnorm_coupling(*tensors)
    with _backend.using("reference"):
        want = actnorm_coupling(*tensors)
    assert torch.equal(y, want[0]) and torch.equal(log_det, want[1])


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="isa: got 'neon'"), native.load().using("neon"):
        pass


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_tiles_that_do_not_run_are_refused_and_restored_after_use():
    library = native.load()
    before = library.tiles
    with pytest.raises(ValueError, match="tiles: got 'sme'"), library.using_tiles("sme"):
        pass
    with library.using_tiles("emulated"):
        assert library.tiles == "emulated"
    assert library.tiles == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_torch_and_the_library_share_one_openmp_runtime():
    program = (  # in a process of its own: other libraries here may have brought theirs
        "from hybridflow.kernels import native; native.load(); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert len(found.stdout.split()) <= 1


@pytest.mark.skipif(not native.available(), reason=native.why_missing())
def test_exp_and_tanh_are_accurate_over_their_whole_range():
    """y = u * exp(s) + shift with u = 1, shift = 0 shows exp; gain = 1 and log-det show tanh."""
    raw = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 1, 10001)])
    samples = raw.numel()
    x = torch.tensor([[0.0, 1.0]]).expand(samples, 2)
    params = torch.stack((raw, torch.zeros(samples)), dim=1)
    zero = torch.zeros(2)
    library = native.load()
    for isa in library.supported:
        for gain in (1.0, 40.0, -85.0):
            with library.using(isa):
                y, s = actnorm_coupling(x, params, zero, zero, torch.tensor([gain]))
            want = gain * raw.double().tanh()
            assert ((s - want).abs() <= 4 * 2**-24 * want.abs()).all()
            assert ((y[:, 1] / s.double().exp() - 1).abs() <= 4 * 2**-24).all()
