"""The data sets: image sets in their published form, digits bundled with scikit-learn, 2-D sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from hybridflow.data.files import Archive, PublishedFiles, find_files
from hybridflow.data.planar import PINWHEEL_ARMS, pinwheel, two_moons
from hybridflow.data.readers import check_labels, read_cifar_bin, read_idx, read_svhn_mat
from hybridflow.errors import InputError

__all__ = ["DATASETS", "PLANAR", "Dataset", "fresh_points", "load_dataset"]

_DIGIT_NAMES = tuple(map(str, range(10)))
_FASHION_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_CIFAR_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# The test parts of the sets without a published one are the same in every run.
_DIGITS_TEST_SIZE = 360
_DIGITS_TEST_SEED = 0
_PLANAR_TRAIN_SIZE, _PLANAR_TRAIN_SEED = 5000, 0
_PLANAR_TEST_SIZE, _PLANAR_TEST_SEED = 2000, 1

PLANAR = {"pinwheel": pinwheel, "two-moons": two_moons}
"""The 2-D data sets, by what generates them."""

_PUBLISHED = {
    "mnist": PublishedFiles(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": PublishedFiles(
        "fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "svhn": PublishedFiles(
        "svhn",
        "http://ufldl.stanford.edu/housenumbers/",
        {
            "train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "cifar10": PublishedFiles(
        "cifar10",
        "https://www.cs.toronto.edu/~kriz/",
        {
            "data_batch_1.bin": (
                "sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"
            ),
            "data_batch_2.bin": (
                "sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"
            ),
            "data_batch_3.bin": (
                "sha256:bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"
            ),
            "data_batch_4.bin": (
                "sha256:014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"
            ),
            "data_batch_5.bin": (
                "sha256:755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"
            ),
            "test_batch.bin": (
                "sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"
            ),
        },
        Archive(
            "cifar-10-binary.tar.gz",
            "md5:c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: its name in `DATASETS`.
        classes: number of classes K.
        levels: grey levels a value can take (values are 0..levels - 1); None for continuous values.
        train_x: uint8 (N, C, H, W), or float32 (N, 2) for 2-D data.
        train_y: int64 (N,), in 0..K - 1.
        test_x: as `train_x`, with M items.
        test_y: int64 (M,), in 0..K - 1.
        class_names: K names.
    """

    name: str
    classes: int
    levels: int | None
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: tuple[str, ...]


def load_dataset(name: str, data_dir: Path | None = None, *, download: bool = True) -> Dataset:
    """Load a data set, downloading its files if they are absent.

    ========================  ============  =====  ==============  ======
    name                      shape         K      train           test
    ========================  ============  =====  ==============  ======
    digits                    (1, 8, 8)     10     1437            360
    pinwheel                  (2,)          5      5000            2000
    two-moons                 (2,)          2      5000            2000
    mnist, fashion-mnist      (1, 32, 32)   10     60000           10000
    svhn                      (3, 32, 32)   10     73257           26032
    cifar10                   (3, 32, 32)   10     50000           10000
    ========================  ============  =====  ==============  ======

    The first three need no files. MNIST and Fashion-MNIST are padded with zeros from 28 × 28; 2-D
    data is standardised with the mean and standard deviation of its train part. Every file is
    checked against its published checksum.

    Args:
        name: one of `DATASETS`.
        data_dir: folder that holds the files, or a folder named after the data set with them; None
            for the user's cache folder.
        download: whether absent files may be downloaded into ``data_dir/<name>``.

    Raises:
        InputError: unknown name; a file damaged, or absent and not to be had.

    Example:
        >>> digits = load_dataset("digits")
        >>> digits.train_x.shape, digits.levels
        (torch.Size([1437, 1, 8, 8]), 17)
    """
    if name not in DATASETS:
        raise InputError(f"dataset: got {name!r}, want one of {', '.join(DATASETS)}")
    if name in _GENERATED:
        return _GENERATED[name]()
    return _READ[name](find_files(_PUBLISHED[name], data_dir, download=download))


def _digits() -> Dataset:
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        torch.arange(len(y)).numpy(),
        test_size=_DIGITS_TEST_SIZE,
        stratify=y.numpy(),
        random_state=_DIGITS_TEST_SEED,
    )
    return Dataset("digits", 10, 17, x[train], y[train], x[test], y[test], _DIGIT_NAMES)


def fresh_points(name: str, count: int, seed: int) -> Tensor:
    """New points of a 2-D data set, float32 (count, 2), standardised as its train part is.

    Raises:
        InputError: the data set is not one of `PLANAR`.
    """
    if name not in PLANAR:
        raise InputError(f"name: got {name!r}, want one of {', '.join(PLANAR)}")
    std, mean = torch.std_mean(PLANAR[name](_PLANAR_TRAIN_SIZE, _PLANAR_TRAIN_SEED)[0], dim=0)
    return (PLANAR[name](count, seed)[0] - mean) / std


def _pinwheel() -> Dataset:
    return _planar("pinwheel", tuple(f"arm {k}" for k in range(PINWHEEL_ARMS)))


def _two_moons() -> Dataset:
    return _planar("two-moons", ("upper", "lower"))


def _planar(name: str, class_names: tuple[str, ...]) -> Dataset:
    parts = (_PLANAR_TRAIN_SIZE, _PLANAR_TRAIN_SEED), (_PLANAR_TEST_SIZE, _PLANAR_TEST_SEED)
    train_x, test_x = (fresh_points(name, *part) for part in parts)
    train_y, test_y = (PLANAR[name](*part)[1] for part in parts)
    return Dataset(name, len(class_names), None, train_x, train_y, test_x, test_y, class_names)


def _mnist(paths: Mapping[str, Path]) -> Dataset:
    return Dataset("mnist", 10, 256, *_idx_parts(paths), _DIGIT_NAMES)


def _fashion_mnist(paths: Mapping[str, Path]) -> Dataset:
    return Dataset("fashion-mnist", 10, 256, *_idx_parts(paths), _FASHION_NAMES)


def _idx_parts(paths: Mapping[str, Path]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and labels, test images and labels; images padded from 28 × 28 to 32 × 32."""
    parts = []
    for part in ("train", "t10k"):
        images_path = paths[f"{part}-images-idx3-ubyte.gz"]
        labels_path = paths[f"{part}-labels-idx1-ubyte.gz"]
        images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1).long()
        check_labels(labels_path, labels, 0, 9)
        if images.shape != (len(labels), 28, 28):
            raise InputError(
                f"{images_path}: images {tuple(images.shape)}, want ({len(labels)}, 28, 28) "
                f"to go with the labels of {labels_path.name}"
            )
        parts += [F.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels]
    train_x, train_y, test_x, test_y = parts
    return train_x, train_y, test_x, test_y


def _svhn(paths: Mapping[str, Path]) -> Dataset:
    train = read_svhn_mat(paths["train_32x32.mat"])
    test = read_svhn_mat(paths["test_32x32.mat"])
    return Dataset("svhn", 10, 256, *train, *test, _DIGIT_NAMES)


def _cifar10(paths: Mapping[str, Path]) -> Dataset:
    images, labels = zip(
        *(read_cifar_bin(paths[f"data_batch_{n}.bin"]) for n in range(1, 6)), strict=True
    )
    test = read_cifar_bin(paths["test_batch.bin"])
    return Dataset("cifar10", 10, 256, torch.cat(images), torch.cat(labels), *test, _CIFAR_NAMES)


_GENERATED = {"digits": _digits, "pinwheel": _pinwheel, "two-moons": _two_moons}
_READ = {"mnist": _mnist, "fashion-mnist": _fashion_mnist, "svhn": _svhn, "cifar10": _cifar10}

DATASETS = (*_GENERATED, *_READ)
