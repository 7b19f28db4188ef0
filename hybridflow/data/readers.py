"""Readers of the published file formats. None of them executes anything found in a file."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor

from hybridflow.errors import InputError

__all__ = ["check_labels", "read_cifar_bin", "read_idx", "read_svhn_mat"]

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read a gzipped idx file of unsigned bytes.

    The header is big-endian: two zero bytes, the type (0x08 for unsigned bytes), the number of
    dimensions, then one 32-bit size per dimension; the values follow in row-major order.

    Args:
        path: the ``.gz`` file.
        dims: number of dimensions wanted: 3 for images, 1 for labels.

    Returns:
        uint8, of the shape in the header: (N, H, W) or (N,).

    Raises:
        InputError: broken compression, wrong magic number, or more or fewer values than announced.

    Source: http://yann.lecun.com/exdb/mnist/
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be decompressed ({error}); want a whole .gz file"
        ) from error
    magic = bytes([0, 0, 8, dims])
    if content[:4] != magic:
        raise InputError(f"{path}: magic number is {content[:4].hex()}, want {magic.hex()}")
    header = 4 + 4 * dims
    if len(content) < header:
        raise InputError(f"{path}: {len(content)} bytes, want a header of {header}")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise InputError(
            f"{path}: {len(content) - header} values, but the header announces "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def read_cifar_bin(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of CIFAR-10's binary version.

    A record is one label byte and 3072 pixel bytes: the red, green and blue planes of 32 × 32.

    Args:
        path: a ``.bin`` file.

    Returns:
        images, uint8 (N, 3, 32, 32), and labels, int64 (N,) in 0..9.

    Raises:
        InputError: not a whole number of records, or a label above 9.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % _CIFAR_RECORD:
        raise InputError(
            f"{path}: {content.size} bytes, want a whole number of {_CIFAR_RECORD}-byte records"
        )
    records = torch.from_numpy(content).view(-1, _CIFAR_RECORD)
    labels = records[:, 0].long()
    check_labels(path, labels, 0, 9)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), labels


def read_svhn_mat(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of SVHN's format 2 (cropped digits).

    The MATLAB file holds X, uint8 (32, 32, 3, N), and y, (N, 1) in 1..10, with 10 for the digit 0.

    Args:
        path: a ``.mat`` file.

    Returns:
        images, uint8 (N, 3, 32, 32), and labels, int64 (N,) in 0..9.

    Raises:
        InputError: not a readable MATLAB file, an array missing, or of the wrong type, shape or
            range.

    Source: http://ufldl.stanford.edu/housenumbers/
    """
    try:
        arrays = scipy.io.loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # on damaged files scipy raises whatever its parser trips over
        raise InputError(f"{path}: cannot be read as a MATLAB file ({error})") from error
    if missing := {"X", "y"} - arrays.keys():
        raise InputError(f"{path}: no array named {' or '.join(sorted(missing))}, want X and y")
    x, y = arrays["X"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise InputError(f"{path}: X is {x.dtype} {x.shape}, want uint8 (32, 32, 3, N)")
    if y.dtype.kind not in "iuf" or y.shape != (x.shape[3], 1):
        raise InputError(f"{path}: y is {y.dtype} {y.shape}, want numbers ({x.shape[3]}, 1)")
    labels = torch.from_numpy(y[:, 0].astype(np.int64))
    check_labels(path, labels, 1, 10)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1))), labels % 10


def check_labels(path: Path, labels: Tensor, low: int, high: int) -> None:
    """Raise InputError naming `path` if a label lies outside low..high."""
    outside = labels[(labels < low) | (labels > high)]
    if len(outside):
        raise InputError(f"{path}: label {outside[0].item()}, want {low}..{high}")
