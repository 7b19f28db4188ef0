"""Small files in the published layouts, a network that fails, and the real data where it is."""

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest
import requests
import scipy.io

WriteIdx = Callable[[Path, np.ndarray], Path]
WriteLabelled = Callable[[Path, np.ndarray, np.ndarray], Path]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches the network or the user's cache folder."""

    def fail(self, url, output_file, pooch, check_only=False):
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fail)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """serve(folder): downloads come from `folder`; returns the growing list of addresses asked."""

    def serve(folder: Path) -> list[str]:
        asked: list[str] = []

        def copy(self, url, output_file, pooch, check_only=False):
            asked.append(url)
            Path(output_file).write_bytes((folder / url.rsplit("/", 1)[1]).read_bytes())

        monkeypatch.setattr(pooch.HTTPDownloader, "__call__", copy)
        return asked

    return serve


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The folder of real data: $HYBRIDFLOW_TEST_DATA, or shared/data beside the repository."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("HYBRIDFLOW_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data: set HYBRIDFLOW_TEST_DATA to a folder that holds mnist/ etc.")
    return folder


@pytest.fixture
def write_idx() -> WriteIdx:
    """write_idx(path, values uint8): a gzipped idx file."""

    def write(path: Path, values: np.ndarray) -> Path:
        header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        path.write_bytes(gzip.compress(header + values.tobytes()))
        return path

    return write


@pytest.fixture
def write_cifar() -> WriteLabelled:
    """write_cifar(path, images uint8 (N, 3, 32, 32), labels (N,)): a file of the binary version."""

    def write(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
        records = zip(labels, images, strict=True)
        path.write_bytes(b"".join(bytes([label]) + image.tobytes() for label, image in records))
        return path

    return write


@pytest.fixture
def write_svhn() -> WriteLabelled:
    """write_svhn(path, images uint8 (N, 3, 32, 32), digits (N,)): a file of format 2."""

    def write(path: Path, images: np.ndarray, digits: np.ndarray) -> Path:
        y = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": y}, do_compression=True)
        return path

    return write


@pytest.fixture
def images() -> np.ndarray:
    """20 random images, uint8 (20, 3, 32, 32)."""
    return np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def digits() -> np.ndarray:
    """Labels 0..9, twice over: uint8 (20,)."""
    return (np.arange(20) % 10).astype(np.uint8)


@pytest.fixture(scope="session")
def restored_cifar(published_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with test_batch.bin, restored from the packed copy."""
    pytest.importorskip("PIL")
    out = tmp_path_factory.mktemp("cifar")
    script = published_data / "restore_cifar10.py"
    if not script.is_file():
        pytest.skip(f"no {script.name} in the folder of real data")
    subprocess.run([sys.executable, script, out, "--parts", "5"], check=True)
    return out
