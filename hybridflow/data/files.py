"""Finding, checking and downloading the published files of a data set."""

import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch

from hybridflow.errors import InputError

__all__ = ["Archive", "PublishedFiles", "find_files"]


@dataclass(frozen=True)
class Archive:
    """A tar archive that holds the files, all in one folder.

    Attributes:
        name: file name of the archive.
        checksum: ``algorithm:hexadecimal``.
        folder: the folder inside the archive.
    """

    name: str
    checksum: str
    folder: str


@dataclass(frozen=True)
class PublishedFiles:
    """The files a data set is published as.

    Attributes:
        name: the data set's name, also the name of its folder.
        address: address of the folder they are downloaded from, with a closing slash.
        checksums: file name to ``algorithm:hexadecimal``.
        archive: the archive at `address` that the files come in, None if they lie there singly.
    """

    name: str
    address: str
    checksums: Mapping[str, str]
    archive: Archive | None = None


def find_files(
    files: PublishedFiles, data_dir: Path | None = None, *, download: bool = True
) -> dict[str, Path]:
    """Find the files of a data set on disk, downloading the absent ones, and verify them all.

    They are looked for in ``data_dir/<name>``, in `data_dir` itself, and in the archive's own
    folder under both. Downloads go to the first of these (for an archive, to its folder there); a
    file takes its final name only when it is complete, and existing files are never touched.

    Args:
        files: what to look for.
        data_dir: root folder; None for the user's cache folder.
        download: whether absent files may be downloaded.

    Returns:
        file name to path, for each name in ``files.checksums``.

    Raises:
        InputError: a file differs from the published one, or is absent and cannot be downloaded.
    """
    root = Path(pooch.os_cache("hybridflow")) if data_dir is None else data_dir.expanduser()
    folders = [root / files.name, root]
    if files.archive:
        folders += [folder / files.archive.folder for folder in folders]
    found = _locate(files, folders)
    missing = [name for name in files.checksums if name not in found]
    if not missing:
        return found
    if not download:
        raise _absent(files, missing, folders, "downloading is switched off")
    try:
        _download(files, missing, root / files.name)
    except (OSError, ValueError) as error:
        raise _absent(files, missing, folders, f"the download failed: {error}") from error
    return _locate(files, folders)


def _locate(files: PublishedFiles, folders: Sequence[Path]) -> dict[str, Path]:
    """The verified files among `folders`; the first match of each name."""
    found = {}
    for name, checksum in files.checksums.items():
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        computed = {path: _checksum(path, checksum.partition(":")[0]) for path in paths}
        intact = [path for path in paths if computed[path] == checksum]
        if paths and not intact:
            raise InputError(
                f"{paths[0]}: not the file published for {files.name}, but damaged or of another "
                f"data set: expected {checksum}, found {computed[paths[0]]}. Remove it to download "
                "it again, or name another folder with --data-dir."
            )
        if intact:
            found[name] = intact[0]
    return found


def _checksum(path: Path, algorithm: str) -> str:
    try:
        return f"{algorithm}:{pooch.file_hash(path, alg=algorithm)}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _download(files: PublishedFiles, names: Sequence[str], folder: Path) -> None:
    if files.archive is None:
        for name in names:
            url = files.address + name
            pooch.retrieve(url, files.checksums[name], fname=name, path=folder, progressbar=True)
        return
    archive = files.archive
    destination = folder / archive.folder
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        url = files.address + archive.name
        packed = pooch.retrieve(
            url, archive.checksum, fname=archive.name, path=scratch, progressbar=True
        )
        with tarfile.open(packed) as tar:
            for name in names:
                _extract(tar, f"{archive.folder}/{name}", Path(scratch) / name)
        for name in names:
            (Path(scratch) / name).replace(destination / name)


def _extract(tar: tarfile.TarFile, member: str, path: Path) -> None:
    """Copy one member's bytes to `path`: no name, link or mode of the archive is acted on."""
    content = tar.extractfile(tar.getmember(member))
    if content is None:
        raise ValueError(f"{member} in the archive is not a file")
    with content, path.open("wb") as out:
        shutil.copyfileobj(content, out)


def _absent(
    files: PublishedFiles, missing: Sequence[str], folders: Sequence[Path], reason: str
) -> InputError:
    looked = "\n".join(f"  {folder}" for folder in folders)
    if files.archive:
        origin = f"unpacked from {files.address}{files.archive.name}"
    else:
        origin = f"from {files.address}"
    return InputError(
        f"{files.name}: {', '.join(missing)} not found, and {reason}\n"
        f"looked in:\n{looked}\n"
        f"Put the files there, {origin}, or name the folder that holds them with --data-dir."
    )
