"""Data sets, label splits and device-resident batches."""

from hybridflow.data.batches import Batches, iterate
from hybridflow.data.readers import read_cifar_bin, read_idx, read_svhn_mat
from hybridflow.data.sources import DATASETS, PLANAR, Dataset, fresh_points, load_dataset
from hybridflow.data.splits import Split, load_split, make_split, save_split
from hybridflow.data.strong import strong_view

__all__ = [
    "DATASETS",
    "PLANAR",
    "Batches",
    "Dataset",
    "Split",
    "fresh_points",
    "iterate",
    "load_dataset",
    "load_split",
    "make_split",
    "read_cifar_bin",
    "read_idx",
    "read_svhn_mat",
    "save_split",
    "strong_view",
]
