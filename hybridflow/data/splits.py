"""Which train images are labelled, unlabelled and held out for validation."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from hybridflow.errors import InputError

__all__ = ["Split", "load_split", "make_split", "save_split"]


@dataclass(frozen=True, eq=False)
class Split:
    """Indices into the train part, each int64, ascending and without repeats.

    Attributes:
        labelled: (L,) images whose labels are used.
        unlabelled: (U,) images used without their labels. By the usual protocol of semi-supervised
            learning these are all images outside `validation`, the labelled ones among them.
        validation: (V,) images held out from training altogether.
    """

    labelled: Tensor
    unlabelled: Tensor
    validation: Tensor


def make_split(
    labels: Tensor, *, classes: int, num_labels: int, num_validation: int, seed: int
) -> Split:
    """Draw a split of the train part.

    The labelled part is class-balanced: every class gets ``num_labels // classes`` images, and the
    remainder goes one each to classes chosen by the seed. The validation part is stratified: every
    class has the share it has in `labels`, rounded by largest remainders.

    Each class is shuffled once by the seed; labelled images are taken from the front and validation
    images from the back. So for one seed the labelled parts of different sizes are nested and do
    not depend on `num_validation`.

    Args:
        labels: int64 (N,), in 0..classes - 1.
        classes: number of classes K.
        num_labels: L, at least K.
        num_validation: V, zero or more.
        seed: seed of the split.

    Raises:
        InputError: L or V out of range, or a class with too few images for both.
    """
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels: got shape {tuple(labels.shape)}, want (N,) with values in 0..{classes - 1}"
        )
    if num_labels < classes:
        raise InputError(
            f"num_labels: got {num_labels}, want at least one for each of the {classes} classes"
        )
    if num_validation < 0:
        raise InputError(f"num_validation: got {num_validation}, want 0 or more")
    if num_labels + num_validation > len(labels):
        raise InputError(
            f"num_labels, num_validation: got {num_labels} + {num_validation}, "
            f"want at most the {len(labels)} images of the train part"
        )

    generator = torch.Generator().manual_seed(seed)
    counts = labels.bincount(minlength=classes)
    wanted = torch.full((classes,), num_labels // classes)
    wanted[torch.randperm(classes, generator=generator)[: num_labels % classes]] += 1
    held_out = _proportional(counts, num_validation)

    labelled, validation = [], []
    for k in range(classes):
        front, back, count = int(wanted[k]), int(held_out[k]), int(counts[k])
        if front + back > count:
            raise InputError(
                f"num_labels, num_validation: got {num_labels} and {num_validation}, which take "
                f"{front} + {back} images of class {k}, but it has {count}"
            )
        members = (labels == k).nonzero()[:, 0]
        members = members[torch.randperm(count, generator=generator)]
        labelled.append(members[:front])
        validation.append(members[count - back :])

    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[torch.cat(validation)] = False
    return Split(
        labelled=torch.cat(labelled).sort().values,
        unlabelled=kept.nonzero()[:, 0],
        validation=(~kept).nonzero()[:, 0],
    )


def _proportional(counts: Tensor, total: int) -> Tensor:
    """`total` divided in proportion to `counts` (K,), by the method of largest remainders."""
    shares, remainders = counts * total // counts.sum(), counts * total % counts.sum()
    rest = total - int(shares.sum())
    shares[remainders.argsort(descending=True, stable=True)[:rest]] += 1
    return shares


def save_split(split: Split, path: Path) -> None:
    """Write a split as JSON, one list of indices for each part; `path` changes all at once."""
    content = json.dumps({name: part.tolist() for name, part in asdict(split).items()})
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_split(path: Path) -> Split:
    """Read a split written by `save_split`.

    Raises:
        InputError: no such file, not JSON, or not a split: a part missing, an index repeated or
            negative, or a validation image in another part.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a split: {error}") from error
    names = [field.name for field in fields(Split)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise InputError(f"{path}: not a split, want one JSON object with {', '.join(names)}")
    for name in names:
        part = content[name]
        if not isinstance(part, list) or not all(type(i) is int and i >= 0 for i in part):
            raise InputError(f"{path}: {name} is not a list of indices (integers from 0)")
        if len(set(part)) != len(part):
            raise InputError(f"{path}: {name} repeats an index")
    if shared := set(content["validation"]) & {*content["labelled"], *content["unlabelled"]}:
        raise InputError(
            f"{path}: {len(shared)} validation images are used for training too, e.g. {min(shared)}"
        )
    return Split(**{name: torch.tensor(content[name], dtype=torch.int64) for name in names})
