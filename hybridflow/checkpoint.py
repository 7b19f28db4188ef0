"""Checkpoints: one safetensors file, written atomically and verified when read.

The tensors are stored as safetensors stores them. One entry of its header, "hybridflow-checkpoint",
holds a JSON object: the format's version, the caller's metadata, and a SHA-256 over the metadata
and over the name, dtype, shape and bytes of every tensor. Reading a file executes nothing in it.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hybridflow.errors import InputError

__all__ = ["JSON", "atomic_write_bytes", "atomic_write_text", "load", "save"]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT = "hybridflow-checkpoint"
VERSION = 1


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, JSON]
) -> None:
    """Write `tensors` and `metadata` to `path`, replacing it in one step.

    A failure or a kill at any moment leaves either the previous checkpoint or the new one. Tensors
    may share memory, be views, and live on any device; each is stored on its own, bit for bit.

    Args:
        path: The file to write; its folder must exist.
        tensors: Dense tensors by name, of any shape and of any dtype that safetensors stores.
        metadata: What JSON can hold. Tuples come back as lists and keys as strings; NaN and the
            infinities come back as they are.

    Raises:
        InputError: `path` is a folder or its folder cannot be written; a tensor cannot be stored;
            `metadata` is not JSON.
        OSError: The disk is full or fails.
    """
    try:
        plain = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata: wanted what JSON can hold: {error}") from error
    stored = {name: _to_cpu(name, tensor) for name, tensor in tensors.items()}
    try:
        data = safetensors.torch.save(stored, {FORMAT: _seal(stored, plain)})
    except KeyError as error:
        raise InputError(f"tensors: dtype {error.args[0]} cannot be stored") from error
    atomic_write_bytes(path, data)


def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and verify every byte of it.

    Args:
        path: A file that `save` wrote.
        device: Where the tensors are put.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        InputError: The file is missing or unreadable, is no checkpoint of this format and version,
            is truncated, or was altered.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from error
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    seal = (json.loads(header).get("__metadata__") or {}).get(FORMAT)
    if seal is None:
        raise InputError(f"{path}: a safetensors file, but not a {FORMAT}")
    try:
        content = json.loads(seal)
        version, metadata = content["version"], dict(content["metadata"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the {FORMAT} header is damaged: {error!r}") from error
    if version != VERSION:
        raise InputError(f"{path}: {FORMAT} version {version!r}, wanted version {VERSION}")
    # The format pads its header with spaces, the only bytes that the digest does not cover.
    if seal != _seal(tensors, metadata) or not header.rstrip(b" ").endswith(b"}"):
        raise InputError(f"{path}: damaged or altered: the contents do not match their SHA-256")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, as `atomic_write_bytes` does.

    Raises:
        InputError: `path` is a folder, or its folder cannot be written.
        OSError: The disk is full or fails.
    """
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader finds the old contents or the new, never a part.

    The data goes to a temporary file in the same folder, which then takes the name of `path`; both
    the file and the folder are flushed to disk. A temporary file that a killed process left behind
    for the same `path` is removed first. The last of several concurrent writers wins.

    Raises:
        InputError: `path` is a folder, or its folder cannot be written.
        OSError: The disk is full or fails.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"path: {path} is a folder, wanted a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        file = temporary.open("xb")
    except OSError as error:
        raise InputError(f"path: cannot write in {path.parent}: {error.strerror}") from error
    try:
        with file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            _remove_leftovers(path)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that no living process holds locked."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.partial"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _to_cpu(name: str, tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor` that shares memory with no other."""
    if name == "__metadata__":
        raise InputError(f"tensors: the name {name!r} is the file format's own")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise InputError(
            f"tensors: {name!r} must be dense and hold data, got layout {tensor.layout} "
            f"on device {tensor.device}"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """The JSON text of the header: version, SHA-256, metadata."""
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    content = {"version": VERSION, "sha256": digest.hexdigest(), "metadata": metadata}
    return json.dumps(content)
