"""Whether a coupling's conditioner runs as one op or layer by layer: read from a table of measurements.

choices.json is written by `python -m benchmarks.choices`, a section for each kind of device and type of
products; nothing is measured while a model runs. What has no section runs layer by layer.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["PATH", "Layer", "device_key", "fewest_samples", "prefers_one_op", "using"]

PATH = Path(__file__).with_name("choices.json")

_forced: bool | None = None


class Layer(NamedTuple):
    """A conditioner: what it is made of and, of convolutions, their window and the image."""

    kind: str  # "conv" or "dense"
    inputs: int
    hidden: int
    outputs: int
    window: int = 1
    height: int = 1
    width: int = 1


@contextmanager
def using(one_op: bool) -> Iterator[None]:
    """Inside a `with` block, all conditioners run as one op, or none. For tests and benchmarks."""
    global _forced
    before, _forced = _forced, one_op
    try:
        yield
    finally:
        _forced = before


def prefers_one_op(layer: Layer, samples: int, key: str) -> bool:
    """Whether this conditioner of so many samples is faster as one op, as far as was measured."""
    if _forced is not None:
        return _forced
    fewest = fewest_samples(layer, key)
    return fewest is not None and samples >= fewest


@functools.cache
def device_key(device: torch.device, products: torch.dtype) -> str:
    """The section of the table: "cpu", or a GPU's instruction set with the type of the products, as in
    "sm_90 bfloat16"."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        chip = properties.gcnArchName.split(":")[0]
    else:
        chip = f"sm_{properties.major}{properties.minor}"
    return f"{chip} {str(products).removeprefix('torch.')}"


@functools.lru_cache(maxsize=1024)
def fewest_samples(layer: Layer, key: str) -> int | None:
    """From how many samples on one op was faster on such a device: None if it never was.

    A layer that was not measured is taken for the one most like it: least Σ |log ratio| over the sizes.
    """
    rows = [row for row in _sections().get(key, {"rows": []})["rows"] if row["kind"] == layer.kind]
    if not rows:
        return None

    def distance(row: dict[str, Any]) -> float:
        return sum(abs(math.log(row[name] / size)) for name, size in zip(names, sizes, strict=True))

    names, sizes = layer._fields[1:], layer[1:]
    return min(rows, key=distance)["fewest"]


@functools.cache
def _sections() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}
