import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hybridflow import checkpoint
from hybridflow.checkpoint import atomic_write_text, load, save
from hybridflow.errors import InputError

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.safetensors"
    save(path, {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(7)}, {"epoch": 3})
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    save(tmp_path / "state", {"x": tensor}, {})
    loaded = load(tmp_path / "state")[0]["x"]
    assert loaded.dtype == dtype and loaded.shape == shape
    assert bits(loaded) == bits(tensor)


def test_nan_payloads_and_negative_zero_survive(tmp_path):
    patterns = [0x7FC00001, -0x3FFFFF, -0x80000000, 0x00000001, 0x7F800000]
    tensor = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    save(tmp_path / "state", {"x": tensor}, {})
    assert load(tmp_path / "state")[0]["x"].view(torch.int32).tolist() == patterns


def test_shared_strided_and_trainable_tensors_are_stored_on_their_own(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "row": base[1],
        "expanded": torch.tensor(2.0).expand(5),
        "parameter": torch.nn.Parameter(base),
    }
    save(tmp_path / "state", tensors, {})
    loaded, _ = load(tmp_path / "state")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    loaded["base"].zero_()
    assert torch.equal(loaded["tied"], base)


def test_metadata_comes_back(tmp_path):
    metadata = {"config": {"name": "é\n", "betas": [0.5, 0.999]}, "best": -math.inf, "none": None}
    save(tmp_path / "state", {}, metadata)
    assert load(tmp_path / "state") == ({}, metadata)


def test_keys_that_become_equal_as_strings_still_load(tmp_path):
    save(tmp_path / "state", {}, {"map": {1: "a", "1": "b"}})
    assert load(tmp_path / "state")[1] == {"map": {"1": "b"}}


def test_equal_states_give_equal_files(saved, tmp_path):
    again = tmp_path / "again"
    save(again, *load(saved))
    assert again.read_bytes() == saved.read_bytes()


def test_load_puts_tensors_on_the_device(saved):
    assert load(saved, device="meta")[0]["weight"].device.type == "meta"


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_any_altered_byte_is_refused(saved, mask):
    whole = saved.read_bytes()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= mask
        saved.write_bytes(altered)
        with pytest.raises(InputError, match=r"state\.safetensors: "):
            load(saved)


def test_header_padding_is_verified(tmp_path):
    for name in ("x", "xx", "xxx"):  # at least two of the three lengths are padded
        save(tmp_path / name, {name: torch.zeros(1)}, {})
    padded = [path for path in tmp_path.iterdir() if b"} " in path.read_bytes()]
    assert padded
    for path in padded:
        path.write_bytes(path.read_bytes().replace(b"}} ", b"}}\n"))
        with pytest.raises(InputError, match="altered"):
            load(path)


def test_any_truncation_and_any_appendix_is_refused(saved):
    whole = saved.read_bytes()
    for size in range(len(whole)):
        saved.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"state\.safetensors: not a complete safetensors"):
            load(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="not a complete safetensors"):
        load(saved)


def test_exchanged_tensors_are_refused(tmp_path):
    path = tmp_path / "state"
    save(path, {"aa": torch.zeros(2), "bb": torch.ones(2)}, {})
    swapped = path.read_bytes().replace(b'"aa"', b'"cc"')
    assert swapped != path.read_bytes()
    path.write_bytes(swapped)
    with pytest.raises(InputError, match="SHA-256"):
        load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "but not a hybridflow-checkpoint"),
        ({"format": "pt"}, "but not a hybridflow-checkpoint"),
        ({"hybridflow-checkpoint": "{"}, "header is damaged"),
        ({"hybridflow-checkpoint": "[]"}, "header is damaged"),
        ({"hybridflow-checkpoint": "[" * 100_000}, "header is damaged"),
        ({"hybridflow-checkpoint": '{"version": 1, "metadata": 3}'}, "header is damaged"),
        (
            {"hybridflow-checkpoint": '{"version": 2, "metadata": {}}'},
            "version 2, wanted version 1",
        ),
    ],
    ids=["none", "other", "cut", "list", "deep", "metadata", "version"],
)
def test_other_formats_and_versions_are_refused(tmp_path, header, message):
    path = tmp_path / "state"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(InputError, match=message):
        load(path)


def test_a_null_header_is_refused(tmp_path):
    header = b'{"__metadata__":null}   '
    (tmp_path / "state").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="but not a hybridflow-checkpoint"):
        load(tmp_path / "state")


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "'__metadata__'"),
        ({"x": torch.eye(2).to_sparse()}, {}, "'x' must be dense"),
        ({"x": torch.zeros(2, device="meta")}, {}, "'x' must be dense and hold data"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, {}, "complex128"),
        ({}, {"x": object()}, "metadata"),
    ],
    ids=["name", "sparse", "meta", "dtype", "metadata"],
)
def test_what_cannot_be_stored_is_refused_and_writes_nothing(tmp_path, tensors, metadata, message):
    with pytest.raises(InputError, match=message):
        save(tmp_path / "state", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_previous_checkpoint(saved):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as failure:
            save(saved, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_unwritable_folder_is_refused_and_leaves_the_previous_checkpoint(saved):
    before = saved.read_bytes()
    user = os.geteuid()
    saved.parent.chmod(0o500)
    if user == 0:
        os.seteuid(65534)  # permissions do not bind root
    try:
        with pytest.raises(InputError, match=r"cannot write in .*: Permission denied"):
            save(saved, {}, {})
    finally:
        os.seteuid(user)
        saved.parent.chmod(0o700)
    assert saved.read_bytes() == before


def test_a_missing_folder_and_a_folder_as_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot write in .*missing: No such file"):
        save(tmp_path / "missing" / "state", {}, {})
    with pytest.raises(InputError, match="is a folder"):
        save(tmp_path, {}, {})


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    atomic_write_text(path, "a longer first text")
    atomic_write_text(path, "µ = 1\n")
    assert path.read_text(encoding="utf-8") == "µ = 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    atomic_write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_concurrent_writer_keeps_its_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    replace = os.replace

    def write_meanwhile(source, target):
        monkeypatch.setattr(os, "replace", replace)
        atomic_write_text(path, "inner")
        assert Path(source).exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", write_meanwhile)
    atomic_write_text(path, "outer")
    assert path.read_text() == "outer"


KILLED_SAVES = """
import json, os, random, signal, sys, time
import torch
from hybridflow.checkpoint import load, save

torch.set_num_threads(1)
folder = sys.argv[1]
path = os.path.join(folder, "state[1].safetensors")

def write(step):
    save(path, {f"{i}": torch.full((50_000,), step) for i in range(4)}, {"step": step})

def complete_step():
    tensors, metadata = load(path)
    assert all(bool((tensors[f"{i}"] == metadata["step"]).all()) for i in range(4))
    return metadata["step"]

def run_and_kill(seconds, start):
    child = os.fork()
    if child == 0:
        for step in range(start, start + 1_000_000):
            write(step)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

write(0)
delays = random.Random(0)
steps = [0]
for _ in range(10):
    run_and_kill(delays.uniform(0.02, 0.15), steps[-1] + 1)
    steps.append(complete_step())

child = os.fork()
if child == 0:
    os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
    write(-1)
os.waitpid(child, 0)
leftovers = len(os.listdir(folder)) - 1
steps.append(complete_step())
write(steps[-1])
print(json.dumps({"steps": steps, "leftovers": leftovers, "files": os.listdir(folder)}))
"""


def test_kill_9_at_any_moment_leaves_a_complete_state_and_the_next_save_cleans_up(tmp_path):
    root = Path(checkpoint.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, tmp_path],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    steps = outcome["steps"]
    assert steps == sorted(steps) and steps[-1] > 10
    assert steps[-1] == steps[-2]
    assert outcome["leftovers"] >= 1
    assert outcome["files"] == ["state[1].safetensors"]
