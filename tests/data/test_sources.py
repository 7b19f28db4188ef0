"""Every data set has the documented shapes, types and ranges, and is the same each time."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridflow.data import DATASETS, PLANAR, fresh_points, load_dataset, sources
from hybridflow.data.files import find_files
from hybridflow.errors import InputError


def check(dataset, shape):
    """What holds for every data set."""
    for x, y in ((dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)):
        assert x.shape == (len(y), *shape)
        assert x.dtype == (torch.float32 if dataset.levels is None else torch.uint8)
        assert y.dtype == torch.int64
        assert set(y.tolist()) == set(range(dataset.classes))
        if dataset.levels is not None:
            assert x.max() == dataset.levels - 1
    assert len(dataset.class_names) == len(set(dataset.class_names)) == dataset.classes


@pytest.fixture
def publish(monkeypatch):
    """publish(name, folder): the files in `folder` become the published ones of data set `name`."""

    def publish(name, folder):
        checksums = {
            path.name: f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
            for path in folder.iterdir()
        }
        assert checksums.keys() == sources._PUBLISHED[name].checksums.keys()
        published = replace(sources._PUBLISHED[name], checksums=checksums)
        monkeypatch.setitem(sources._PUBLISHED, name, published)

    return publish


def test_names():
    assert DATASETS == (
        "digits",
        "pinwheel",
        "two-moons",
        "mnist",
        "fashion-mnist",
        "svhn",
        "cifar10",
    )


def test_unknown_name_is_refused():
    with pytest.raises(InputError, match="dataset: got 'MNIST', want one of digits, pinwheel"):
        load_dataset("MNIST")


def test_digits():
    dataset = load_dataset("digits")
    check(dataset, (1, 8, 8))
    assert (dataset.levels, len(dataset.train_y), len(dataset.test_y)) == (17, 1437, 360)
    shares = dataset.test_y.bincount() / dataset.train_y.bincount()
    assert ((shares - 360 / 1437).abs() < 0.01).all(), "the test part is stratified"


def test_the_test_part_of_digits_never_changes():
    """Results of different versions stay comparable: this digest may not be edited."""
    test_x = load_dataset("digits").test_x.numpy()
    assert hashlib.sha256(test_x.tobytes()).hexdigest()[:16] == "3cc232bd25364446"


@pytest.mark.parametrize(("name", "classes"), [("pinwheel", 5), ("two-moons", 2)])
def test_planar(name, classes):
    dataset = load_dataset(name)
    check(dataset, (2,))
    assert (dataset.classes, dataset.levels) == (classes, None)
    assert (len(dataset.train_y), len(dataset.test_y)) == (5000, 2000)
    assert dataset.train_y.bincount().unique().tolist() == [5000 / classes]
    std, mean = torch.std_mean(dataset.train_x, dim=0)
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(2), atol=1e-5, rtol=0)
    assert (dataset.test_x.mean(0).abs() < 0.1).all()
    assert not torch.equal(dataset.test_x, dataset.train_x[:2000])


@pytest.mark.parametrize("name", PLANAR)
def test_fresh_points_are_of_the_data_set_and_new(name):
    dataset = load_dataset(name)
    assert torch.equal(fresh_points(name, 5000, 0), dataset.train_x)
    fresh = fresh_points(name, 5000, 2)
    assert not torch.equal(fresh, dataset.train_x)
    torch.testing.assert_close(fresh.T.cov(), dataset.train_x.T.cov(), atol=0.08, rtol=0)


def test_only_planar_data_has_fresh_points():
    with pytest.raises(InputError, match="name: got 'digits', want one of pinwheel, two-moons"):
        fresh_points("digits", 10, 2)


def test_pinwheel_has_fivefold_symmetry():
    """Arm k turned back by 2 pi k / 5 lies where arm 0 does."""
    x, arm = sources.pinwheel(50_000, seed=3)
    z = torch.view_as_complex(x)
    centres = torch.stack([z[arm == k].mean() for k in range(5)])
    turned = centres * torch.exp(-2j * torch.pi * torch.arange(5) / 5)
    assert centres.abs().min() > 0.5
    torch.testing.assert_close(turned, turned[:1].expand(5), atol=0.02, rtol=0)


def test_pinwheel_arms_are_bent():
    """Turned back by 0.25 exp(radius), arm 0 lies on the positive real axis, but for its noise."""
    x, arm = sources.pinwheel(5000, seed=3)
    z = torch.view_as_complex(x[arm == 0])
    straight = z * torch.exp(-0.25j * z.abs().exp())
    assert straight.angle().abs().median() < 0.05 < (z.angle() - z.angle().median()).abs().median()


@pytest.mark.parametrize("name", ["digits", "pinwheel", "two-moons"])
def test_generated_data_ignores_the_run_seed(name):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (scikit-learn would use the global generator)
    first = load_dataset(name)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = load_dataset(name)
    for part in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(first, part), getattr(second, part))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_images_are_padded_to_32(tmp_path, write_idx, publish, images, digits, name):
    small = np.ascontiguousarray(images[:, 0, :28, :28])
    small[0, 0, 0] = 255
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", small)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", digits)
    publish(name, tmp_path)
    dataset = load_dataset(name, tmp_path)
    check(dataset, (1, 32, 32))
    assert np.array_equal(dataset.train_x[:, 0, 2:30, 2:30].numpy(), small)
    border = dataset.train_x.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.sum() == 0


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((20, 28, 28), 10, r"labels-idx1-ubyte\.gz: label 10, want 0\.\.9"),
        ((19, 28, 28), 9, r"images-idx3-ubyte\.gz: images \(19, 28, 28\), want \(20, 28, 28\)"),
        ((20, 32, 32), 9, r"images-idx3-ubyte\.gz: images \(20, 32, 32\), want \(20, 28, 28\)"),
    ],
)
def test_idx_files_that_do_not_fit_are_refused(
    tmp_path, write_idx, publish, digits, shape, label, message
):
    digits[-1] = label
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.zeros(shape, np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", digits)
    publish("mnist", tmp_path)
    with pytest.raises(InputError, match=message):
        load_dataset("mnist", tmp_path)


def test_svhn(tmp_path, write_svhn, publish, images, digits):
    images[:, 0, 0, 0] = 255
    write_svhn(tmp_path / "train_32x32.mat", images, digits)
    write_svhn(tmp_path / "test_32x32.mat", images[::-1], digits[::-1])
    publish("svhn", tmp_path)
    dataset = load_dataset("svhn", tmp_path)
    check(dataset, (3, 32, 32))
    assert np.array_equal(dataset.train_x.numpy(), images)
    assert np.array_equal(dataset.test_x.numpy(), images[::-1])


def test_cifar_keeps_the_order_of_its_files(tmp_path, write_cifar, publish, images, digits):
    images[:, 0, 0, 0] = 255
    for n in range(5):
        part = slice(4 * n, 4 * n + 4)
        write_cifar(tmp_path / f"data_batch_{n + 1}.bin", images[part], digits[part])
    write_cifar(tmp_path / "test_batch.bin", images[::-1], digits[::-1])
    publish("cifar10", tmp_path)
    dataset = load_dataset("cifar10", tmp_path)
    check(dataset, (3, 32, 32))
    assert np.array_equal(dataset.train_x.numpy(), images)
    assert np.array_equal(dataset.train_y.numpy(), digits)
    assert np.array_equal(dataset.test_x.numpy(), images[::-1])


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10"])
def test_absent_files_without_network_are_an_input_error(tmp_path, name):
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    message = str(caught.value)
    for expected in (*sources._PUBLISHED[name].checksums, sources._PUBLISHED[name].address):
        assert expected in message


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("inner", [False, True], ids=["parent folder", "own folder"])
def test_real_idx_sets(published_data, name, inner):
    dataset = load_dataset(name, published_data / name if inner else published_data, download=False)
    check(dataset, (1, 32, 32))
    assert (len(dataset.train_y), len(dataset.test_y)) == (60_000, 10_000)


def test_one_set_is_not_taken_for_another_with_the_same_file_names(published_data):
    with pytest.raises(InputError, match="not the file published for fashion-mnist"):
        load_dataset("fashion-mnist", published_data / "mnist")


def test_one_flipped_byte_in_a_real_file_is_found(published_data, tmp_path):
    for path in (published_data / "mnist").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz.*expected md5:ec29112d"):
        load_dataset("mnist", tmp_path)


def test_restored_cifar_is_the_published_version(restored_cifar):
    checksums = sources._PUBLISHED["cifar10"].checksums
    only = {"test_batch.bin": checksums["test_batch.bin"]}
    found = find_files(replace(sources._PUBLISHED["cifar10"], checksums=only), restored_cifar)
    assert found == {"test_batch.bin": restored_cifar / "test_batch.bin"}
