"""Files are found in the documented folders, verified, and downloaded all or nothing."""

import hashlib
import tarfile
from dataclasses import replace

import pooch
import pytest
import requests

from hybridflow.data.files import Archive, PublishedFiles, find_files
from hybridflow.errors import InputError

CONTENT = {"a.bin": b"first file" * 50, "b.bin": b"second file" * 50}
FILES = PublishedFiles(
    "letters",
    "https://example.org/letters/",
    {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in CONTENT.items()},
)


def write(folder, names=tuple(CONTENT)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENT[name])
    return folder


def everything(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def packed(tmp_path):
    """FILES as an archive with one more member, that would escape the folder if extracted."""
    remote = write(tmp_path / "remote")
    outside = tmp_path / "outside"
    outside.write_text("must not be extracted")
    with tarfile.open(remote / "letters.tar.gz", "w:gz") as tar:
        for name in CONTENT:
            tar.add(remote / name, f"letters-bin/{name}")
        tar.add(outside, "../escaped")
    digest = hashlib.md5((remote / "letters.tar.gz").read_bytes()).hexdigest()
    return replace(FILES, archive=Archive("letters.tar.gz", f"md5:{digest}", "letters-bin"))


@pytest.mark.parametrize("place", ["", "letters", "letters-bin", "letters/letters-bin"])
def test_files_are_found_in_every_documented_folder(tmp_path, packed, place):
    folder = write(tmp_path / "data" / place)
    found = find_files(packed, tmp_path / "data")
    assert found == {name: folder / name for name in CONTENT}


def test_files_may_lie_in_different_folders(tmp_path):
    write(tmp_path, ["a.bin"])
    write(tmp_path / "letters", ["b.bin"])
    assert set(find_files(FILES, tmp_path).values()) == {
        tmp_path / "a.bin",
        tmp_path / "letters" / "b.bin",
    }


def test_an_intact_file_is_preferred_to_one_of_another_data_set(tmp_path):
    write(tmp_path)
    folder = write(tmp_path / "letters")
    (folder / "a.bin").write_bytes(b"another set's")
    assert find_files(FILES, tmp_path)["a.bin"] == tmp_path / "a.bin"


def test_the_default_folder_is_the_cache(tmp_path):
    folder = write(tmp_path / "cache" / "hybridflow" / "letters")
    assert find_files(FILES)["a.bin"] == folder / "a.bin"


@pytest.mark.parametrize("damage", ["truncated", "one byte flipped", "extended"])
def test_a_damaged_file_is_named_and_kept(tmp_path, serve, damage):
    asked = serve(write(tmp_path / "remote"))
    path = write(tmp_path / "data") / "b.bin"
    content = CONTENT["b.bin"]
    path.write_bytes(
        {
            "truncated": content[:-1],
            "one byte flipped": content[:9] + bytes([content[9] ^ 1]) + content[10:],
            "extended": content + b"\0",
        }[damage]
    )
    damaged = path.read_bytes()
    with pytest.raises(InputError) as caught:
        find_files(FILES, tmp_path / "data")
    message = str(caught.value)
    assert str(path) in message
    assert f"expected {FILES.checksums['b.bin']}" in message
    assert f"found md5:{hashlib.md5(damaged).hexdigest()}" in message
    assert path.read_bytes() == damaged
    assert asked == []


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("download", [True, False])
def test_absence_is_one_error_with_all_that_is_needed(tmp_path, packed, exists, download):
    data_dir = tmp_path / "data"
    if exists:
        write(data_dir, ["a.bin"])
    with pytest.raises(InputError) as caught:
        find_files(packed, data_dir, download=download)
    message = str(caught.value)
    assert message.startswith("letters: b.bin not" if exists else "letters: a.bin, b.bin not")
    assert ("no network" if download else "switched off") in message
    folders = [data_dir / p for p in ("letters", "", "letters/letters-bin", "letters-bin")]
    assert [line.strip() for line in message.splitlines()[2:-1]] == list(map(str, folders))
    assert "https://example.org/letters/letters.tar.gz" in message
    assert "--data-dir" in message


def test_a_data_dir_that_is_a_file_is_an_input_error(tmp_path, serve):
    serve(write(tmp_path / "remote"))
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(InputError, match="download failed"):
        find_files(FILES, tmp_path / "data")


def test_absent_files_are_downloaded_and_found_afterwards(tmp_path, serve):
    asked = serve(write(tmp_path / "remote"))
    write(tmp_path / "data", ["a.bin"])
    found = find_files(FILES, tmp_path / "data")
    assert {name: path.read_bytes() for name, path in found.items()} == CONTENT
    assert found["b.bin"] == tmp_path / "data" / "letters" / "b.bin"
    assert find_files(FILES, tmp_path / "data") == found
    assert asked == ["https://example.org/letters/b.bin"]


def test_an_archive_is_unpacked_to_its_folder_and_nowhere_else(tmp_path, serve, packed):
    serve(tmp_path / "remote")
    found = find_files(packed, tmp_path / "data")
    folder = tmp_path / "data" / "letters" / "letters-bin"
    assert found == {name: folder / name for name in CONTENT}
    assert everything(tmp_path / "data") == sorted(found.values())
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("archived", [False, True])
def test_a_download_that_breaks_off_leaves_no_file(tmp_path, monkeypatch, packed, archived):
    def break_off(self, url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as out:
            out.write(b"half a file")
        raise requests.exceptions.ChunkedEncodingError("connection broken")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", break_off)
    with pytest.raises(InputError, match="download failed: connection broken"):
        find_files(packed if archived else FILES, tmp_path / "data")
    assert everything(tmp_path / "data") == []


@pytest.mark.parametrize("archived", [False, True])
def test_a_download_with_another_checksum_leaves_no_file(tmp_path, serve, packed, archived):
    remote = tmp_path / "remote"
    serve(remote)
    (remote / "a.bin").write_bytes(b"forged")
    (remote / "letters.tar.gz").write_bytes(b"forged")
    with pytest.raises(InputError, match="does not match the known hash"):
        find_files(packed if archived else FILES, tmp_path / "data")
    assert everything(tmp_path / "data") == []
