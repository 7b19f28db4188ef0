"""What is written in a published layout is read back; what is not in that layout is refused."""

import gzip

import numpy as np
import pytest
import scipy.io
import torch

from hybridflow.data import read_cifar_bin, read_idx, read_svhn_mat
from hybridflow.errors import InputError


@pytest.mark.parametrize("shape", [(5,), (4, 28, 28), (1, 2, 3)])
def test_idx_is_read_back(tmp_path, write_idx, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = read_idx(write_idx(tmp_path / "a.gz", values), dims=len(shape))
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), values)


def test_idx_with_wrong_magic_is_refused(tmp_path, write_idx):
    path = write_idx(tmp_path / "labels.gz", np.zeros(5, np.uint8))
    with pytest.raises(InputError, match=r"labels\.gz: magic number is 00000801, want 00000803"):
        read_idx(path, dims=3)


@pytest.mark.parametrize(("change", "values"), [(-1, 4), (1, 6)])
def test_idx_with_too_few_or_too_many_values_is_refused(tmp_path, write_idx, change, values):
    path = write_idx(tmp_path / "a.gz", np.ones(5, np.uint8))
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:change] if change < 0 else content + b"\0" * change))
    with pytest.raises(InputError, match=rf"a\.gz: {values} values, but the header announces 5"):
        read_idx(path, dims=1)


def test_idx_without_a_whole_header_is_refused(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3, 0, 0])))
    with pytest.raises(InputError, match=r"a\.gz: 6 bytes, want a header of 16"):
        read_idx(path, dims=3)


def test_idx_with_broken_compression_is_refused(tmp_path, write_idx):
    path = write_idx(tmp_path / "a.gz", np.arange(200, dtype=np.uint8))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-20], whole[:15], bytes(flipped), b"not gzip"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.gz: cannot be decompressed"):
            read_idx(path, dims=1)


def test_cifar_is_read_back(tmp_path, write_cifar, images, digits):
    x, y = read_cifar_bin(write_cifar(tmp_path / "a.bin", images, digits))
    assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert np.array_equal(x.numpy(), images)
    assert np.array_equal(y.numpy(), digits)


def test_cifar_with_a_broken_record_is_refused(tmp_path, write_cifar, images, digits):
    path = write_cifar(tmp_path / "a.bin", images, digits)
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.bin: {len(content)} bytes, want .* 3073-byte"):
            read_cifar_bin(path)


def test_cifar_with_a_label_out_of_range_is_refused(tmp_path, write_cifar, images, digits):
    digits[7] = 10
    with pytest.raises(InputError, match=r"a\.bin: label 10, want 0\.\.9"):
        read_cifar_bin(write_cifar(tmp_path / "a.bin", images, digits))


def test_svhn_is_read_back_with_zero_for_ten(tmp_path, write_svhn, images, digits):
    x, y = read_svhn_mat(write_svhn(tmp_path / "a.mat", images, digits))
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.is_contiguous()
    assert np.array_equal(x.numpy(), images)
    assert np.array_equal(y.numpy(), digits)


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.ones((4, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X}, "no array named y"),
        ({"y": Y}, "no array named X"),
        ({"X": X.astype(float), "y": Y}, "X is float64"),
        ({"X": X[..., 0], "y": Y}, r"X is uint8 \(32, 32, 3\)"),
        ({"X": X[:28], "y": Y}, r"X is uint8 \(28, 32, 3, 4\)"),
        ({"X": X, "y": Y[:3]}, r"y is uint8 \(3, 1\)"),
        ({"X": X, "y": np.array([["a"]] * 4)}, "y is <U1"),
        ({"X": X, "y": Y * 0}, r"label 0, want 1\.\.10"),
        ({"X": X, "y": Y * 11}, r"label 11, want 1\.\.10"),
    ],
)
def test_svhn_of_another_structure_is_refused(tmp_path, arrays, message):
    scipy.io.savemat(tmp_path / "a.mat", arrays)
    with pytest.raises(InputError, match=rf"a\.mat: {message}"):
        read_svhn_mat(tmp_path / "a.mat")


def test_damaged_svhn_is_refused(tmp_path, write_svhn, images, digits):
    path = write_svhn(tmp_path / "a.mat", images, digits)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"\x89HDF\r\n\x1a\n" + b"\0" * 200):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.mat: cannot be read as a MATLAB file"):
            read_svhn_mat(path)


def test_restored_cifar_matches_its_labels(published_data, restored_cifar):
    x, y = read_cifar_bin(restored_cifar / "test_batch.bin")
    labels = np.load(published_data / "cifar10" / "labels.npy")[50_000:]
    assert x.shape == (10_000, 3, 32, 32)
    assert np.array_equal(y.numpy(), labels)
