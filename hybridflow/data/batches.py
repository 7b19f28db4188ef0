"""Batches from a data set that lives on the device, drawn without a word from the host."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridflow.errors import InputError

__all__ = ["Batches", "iterate"]


class Batches:
    """Endless shuffled batches, gathered and augmented on the device.

    Batch t holds the items ``order[(t · B + arange(B)) % N]``, where `order` is a random
    permutation. An epoch is one call of `shuffle` and `steps_per_epoch` calls of `next`: it visits
    every item, and if B does not divide N the last batch goes on with those visited first. B may
    exceed N; then items repeat within a batch.

    `next` can be captured in a CUDA graph: all shapes are static, nothing is read on the host, and
    the cursor and the permutation are device tensors that are only ever changed in place. Random
    numbers come from the device's default generator.

    Args:
        x: items: uint8 images (N, C, H, W), or points (N, D).
        y: labels (N,), or None.
        batch_size: B.
        shift: s; images are shifted by up to s pixels each way, by a random crop from the image
            padded with s zeros on each side.
        flip: whether images are mirrored left to right, with probability 1/2 each.
        device: where the data is kept and the batches are made.

    Attributes:
        steps_per_epoch: ⌈N / B⌉.

    Raises:
        InputError: an argument out of range, lengths that differ, or augmentation of anything but
            images.

    Example:
        >>> x, y = torch.arange(6).view(6, 1), torch.arange(6)
        >>> batches = Batches(x, y, 4, device="cpu")
        >>> x, y = batches.next()
        >>> x.shape, y.shape, batches.steps_per_epoch
        (torch.Size([4, 1]), torch.Size([4]), 2)
    """

    steps_per_epoch: int

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        batch_size: int,
        *,
        shift: int = 0,
        flip: bool = False,
        device: torch.device | str,
    ) -> None:
        if len(x) == 0:
            raise InputError("x: got no items, want at least one")
        _check_batch(x, y, batch_size)
        if shift < 0:
            raise InputError(f"shift: got {shift}, want 0 or more pixels")
        if (shift or flip) and x.ndim != 4:
            raise InputError(
                f"shift, flip: got {shift}, {flip} for data of shape {tuple(x.shape)}; "
                "only images (N, C, H, W) can be augmented"
            )
        self._x = x.to(device)
        self._y = None if y is None else y.to(device)
        self._shift, self._flip = shift, flip
        if shift or flip:
            self._channels, self._rows, self._columns = (
                torch.arange(size, device=device) for size in x.shape[1:]
            )
            self._x = F.pad(self._x, (shift, shift, shift, shift))
        self._offsets = torch.arange(batch_size, device=device)
        self._order = torch.arange(len(x), device=device)
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._index = torch.zeros_like(self._offsets)
        self.steps_per_epoch = -(-len(x) // batch_size)
        self.shuffle()

    def next(self) -> tuple[Tensor, Tensor | None]:
        """The next batch: items (B, …) of the type of x, and labels (B,) or None."""
        self._index.copy_(self._order[(self._cursor + self._offsets) % len(self._order)])
        self._cursor.add_(len(self._offsets)).remainder_(len(self._order))
        return self.another_view(), None if self._y is None else self._y[self._index]

    def another_view(self) -> Tensor:
        """The items of the last batch once more, augmented anew."""
        index = self._index
        return self._augmented(index) if self._shift or self._flip else self._x[index]

    def _augmented(self, index: Tensor) -> Tensor:
        """The images `index` (B,), each cropped at its own place and mirrored or not."""
        size = (len(index), 1)
        device = index.device
        columns = self._columns
        if self._flip:
            mirrored = torch.rand(size, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(0), columns)
        top, left = torch.randint(2 * self._shift + 1, (2, *size), device=device)
        return self._x[
            index[:, None, None, None],
            self._channels[:, None, None],
            (top + self._rows)[:, None, :, None],
            (left + columns)[:, None, None, :],
        ]

    def shuffle(self) -> None:
        """Draw a new permutation, in place; call it between steps."""
        torch.randperm(len(self._order), out=self._order)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the permutation, int64 (N,), and of the cursor, int64 ().

        With the state of the device's default generator they determine all batches to come.
        """
        return {"order": self._order.clone(), "cursor": self._cursor.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`, in place, so that captured graphs follow.

        Raises:
            InputError: the state is of a data set of another size, or is no permutation.
        """
        order, cursor = state["order"].to(self._order), state["cursor"].to(self._cursor)
        if len(order) != len(self._order):
            raise InputError(f"state: order has {len(order)} items, want {len(self._order)}")
        everything = torch.arange(len(order), device=order.device)
        if not order.sort().values.equal(everything) or not 0 <= cursor < len(order):
            raise InputError("state: order is not a permutation, or the cursor lies outside it")
        self._order.copy_(order)
        self._cursor.copy_(cursor)


def iterate(x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of consecutive items and labels, in order; the last batch may be smaller.

    Args:
        x: (N, …).
        y: (N,).
        batch_size: B.

    Raises:
        InputError: B below 1, or lengths that differ.
    """
    _check_batch(x, y, batch_size)
    return zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)


def _check_batch(x: Tensor, y: Tensor | None, batch_size: int) -> None:
    if y is not None and len(y) != len(x):
        raise InputError(f"y: got {len(y)} labels, want one for each of the {len(x)} items")
    if batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, want 1 or more")
