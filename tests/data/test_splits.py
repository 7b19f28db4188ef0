"""Splits are balanced, disjoint and determined by the seed."""

import json

import pytest
import torch

from hybridflow.data import load_split, make_split, save_split
from hybridflow.errors import InputError

UNEVEN = torch.arange(5).repeat_interleave(torch.tensor([90, 40, 300, 55, 115]))
UNEVEN = UNEVEN[torch.randperm(600, generator=torch.Generator().manual_seed(0))]


def split_uneven(num_labels=20, num_validation=60, seed=0):
    return make_split(
        UNEVEN, classes=5, num_labels=num_labels, num_validation=num_validation, seed=seed
    )


def parts(split):
    return [part.tolist() for part in (split.labelled, split.unlabelled, split.validation)]


@pytest.mark.parametrize("num_labels", [5, 6, 9, 10, 37, 163])
@pytest.mark.parametrize("num_validation", [0, 1, 7, 60])
def test_counts_are_balanced_and_stratified(num_labels, num_validation):
    split = split_uneven(num_labels, num_validation)
    assert len(split.labelled) == num_labels
    assert len(split.validation) == num_validation
    labelled = UNEVEN[split.labelled].bincount(minlength=5)
    assert labelled.max() - labelled.min() <= 1
    held_out = UNEVEN[split.validation].bincount(minlength=5)
    assert ((held_out - UNEVEN.bincount() * num_validation / 600).abs() < 1).all()


@pytest.mark.parametrize(("num_labels", "num_validation"), [(5, 0), (38, 100), (170, 90)])
def test_parts_cover_the_train_part_and_validation_is_held_out(num_labels, num_validation):
    split = split_uneven(num_labels, num_validation)
    labelled, unlabelled, validation = map(set, parts(split))
    assert unlabelled | validation == set(range(600))
    assert not unlabelled & validation
    assert labelled <= unlabelled
    for part in parts(split):
        assert part == sorted(set(part))
    for part in (split.labelled, split.unlabelled, split.validation):
        assert part.dtype == torch.int64


def test_the_seed_determines_the_split():
    assert parts(split_uneven(seed=3)) == parts(split_uneven(seed=3))
    for first, second in zip(parts(split_uneven(seed=3)), parts(split_uneven(seed=4)), strict=True):
        assert first != second


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    first = parts(split_uneven())
    state = torch.get_rng_state()
    assert parts(split_uneven()) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_spreads_the_remainder_over_all_classes():
    extra = torch.stack(
        [UNEVEN[split_uneven(7, 0, seed).labelled].bincount() for seed in range(60)]
    )
    assert ((extra == 1) | (extra == 2)).all()
    assert (extra == 2).any(dim=0).all()


def test_labelled_parts_are_nested_and_do_not_depend_on_validation():
    small, large = split_uneven(10, 0), split_uneven(50, 60)
    assert set(small.labelled.tolist()) < set(large.labelled.tolist())
    assert torch.equal(large.labelled, split_uneven(50, 7).labelled)


@pytest.mark.parametrize(
    ("num_labels", "num_validation", "message"),
    [
        (4, 0, "num_labels: got 4, want at least one for each of the 5 classes"),
        (-1, 0, "num_labels: got -1"),
        (10, -1, "num_validation: got -1, want 0 or more"),
        (601, 0, r"got 601 \+ 0, want at most the 600 images"),
        (10, 591, r"got 10 \+ 591, want at most the 600 images"),
        (10, 2**60, "want at most the 600 images"),
        (205, 0, r"take 41 \+ 0 images of class 1, but it has 40"),
        (190, 60, r"take 38 \+ 4 images of class 1, but it has 40"),
    ],
)
def test_impossible_counts_are_refused(num_labels, num_validation, message):
    with pytest.raises(InputError, match=message):
        split_uneven(num_labels, num_validation)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 5]), torch.tensor([-1, 0]), torch.zeros(0)])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(InputError, match=r"labels: .* want \(N,\) with values in 0\.\.4"):
        make_split(labels, classes=5, num_labels=5, num_validation=0, seed=0)


def test_a_saved_split_is_read_back(tmp_path):
    split = split_uneven(num_validation=0)
    save_split(split, tmp_path / "split.json")
    loaded = load_split(tmp_path / "split.json")
    assert parts(loaded) == parts(split)
    assert loaded.validation.dtype == torch.int64


def test_saving_leaves_nothing_else_and_a_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "split.json"
    save_split(split_uneven(seed=1), path)
    assert list(tmp_path.iterdir()) == [path]

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_split(split_uneven(seed=2), path)
    assert parts(load_split(path)) == parts(split_uneven(seed=1))


GOOD = {"labelled": [0], "unlabelled": [0, 1], "validation": [2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as a split"),
        ('{"labelled": [0', "cannot be read as a split"),
        ([0, 1], "want one JSON object with labelled, unlabelled, validation"),
        ({"labelled": [0], "unlabelled": [0]}, "want one JSON object"),
        (GOOD | {"more": []}, "want one JSON object"),
        (GOOD | {"labelled": 0}, "labelled is not a list of indices"),
        (GOOD | {"labelled": [0.0]}, "labelled is not a list of indices"),
        (GOOD | {"labelled": [True]}, "labelled is not a list of indices"),
        (GOOD | {"validation": [-1]}, "validation is not a list of indices"),
        (GOOD | {"unlabelled": [1, 1]}, "unlabelled repeats an index"),
        (GOOD | {"validation": [1]}, r"1 validation images are used for training too, e\.g\. 1"),
        (GOOD | {"labelled": [2]}, r"1 validation images are used for training too, e\.g\. 2"),
    ],
)
def test_a_file_that_is_no_split_is_refused(tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=rf"split\.json: .*{message}|split\.json: {message}"):
        load_split(path)


def test_a_missing_split_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        load_split(tmp_path / "none.json")
