"""Repositories and archives whose files lead out of them, and addresses that are none."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest
from tests.services.git import git

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.types import StopSignal

from .conftest import Fetch


def _repository(folder: Path, link: str, target: str) -> str:
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "MLproject").write_text("name: x\n")
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(target)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return f"git+{folder.as_uri()}"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("data", "/etc"),
        ("requirements.txt", "/proc/self/environ"),
        ("deep/down/link", "../../../../.."),
        ("loop", "MLproject/../../.."),
    ],
)
def test_link_out_of_repository_is_refused(link: str, target: str, tmp_path: Path, fetch: Fetch, cache: Path) -> None:
    (tmp_path / "MLproject").mkdir(exist_ok=True)
    with pytest.raises(FetchError, match="leads out of the project") as caught:
        fetch(_repository(tmp_path / "repository", link, target))

    assert "\n" not in str(caught.value)
    assert not list((cache / "working-copies").glob("run-*"))


@pytest.mark.parametrize("target", ["MLproject", ".", "missing", "/nowhere/at/all"])
def test_link_inside_of_repository_or_to_nothing_is_accepted(target: str, tmp_path: Path, fetch: Fetch) -> None:
    copy = fetch(_repository(tmp_path / "repository", "link", target))
    assert str((copy.directory / "link").readlink()) == target


def _archive(file: Path, name: str, mode: int = 0) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        member = zipfile.ZipInfo("placeholder")
        member.external_attr = mode << 16
        archive.writestr(member, "/etc/passwd")
        archive.infolist()[0].filename = name
        archive.writestr("MLproject", "name: x")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("", 0),
        (".", 0),
        ("/etc/x", 0),
        ("../x", 0),
        ("a/../../x", 0),
        ("..\\x", 0),
        ("x/", stat.S_IFLNK | 0o777),
        ("link", stat.S_IFLNK | 0o777),
        ("device", stat.S_IFBLK | 0o666),
        ("device", stat.S_IFCHR | 0o666),
        ("pipe", stat.S_IFIFO | 0o666),
        ("socket", stat.S_IFSOCK | 0o666),
        ("MLproject/x", 0),
    ],
)
def test_hostile_member_of_archive_is_a_one_line_error(name: str, mode: int, tmp_path: Path, cache: Path) -> None:
    _archive(tmp_path / "p.zip", name, mode)
    with pytest.raises(FetchError) as caught:
        detect_source(str(tmp_path / "p.zip")).fetch(StopSignal(), lambda _: None)

    assert "\n" not in str(caught.value)
    assert not (cache / "working-copies" / "x").exists()
    assert not list((cache / "working-copies").glob("run-*"))


def test_member_with_half_of_a_utf16_pair_is_a_one_line_error(tmp_path: Path) -> None:
    _archive(tmp_path / "p.zip", "xyz")
    data = (tmp_path / "p.zip").read_bytes()
    # The flag for UTF-8, and the bytes of U+D800, in the local and in the central entry.
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.index(sign)
        data = data[: start + flags] + struct.pack("<H", 0x800) + data[start + flags + 2 :]
    (tmp_path / "p.zip").write_bytes(data.replace(b"xyz", b"\xed\xa0\x80"))
    with pytest.raises(FetchError) as caught:
        detect_source(str(tmp_path / "p.zip")).fetch(StopSignal(), lambda _: None)

    assert "\n" not in str(caught.value)
    str(caught.value).encode()


MALFORMED = [
    *("http://[::1/x", "https://[::1/x.zip", "ssh://[::1/x", "git+https://[x/y", "file://[::1/x", "file://[::1/x.zip"),
    *(
        "s3://[x/y.zip",
        "http://host:99999/x",
        "https://host:abc/x.zip",
        "http://\u2100.com/x",
        "zip://a::http://[x/y.zip",
    ),
    *(
        "\ud800",
        "https://host/\ud800",
        "https://host/\ud800.zip",
        "/tmp/\ud800",
        "host:\ud800",
        "a#\ud800",
        "\0",
        "http://",
    ),
]


@pytest.mark.parametrize("trusted", ["", "https://host/*"])
@pytest.mark.parametrize("uri", MALFORMED)
def test_malformed_address_is_a_one_line_error(uri: str, trusted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_TRUSTED_SOURCES", trusted)
    with pytest.raises(FetchError) as caught:
        detect_source(uri)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_version_with_half_of_a_utf16_pair_is_a_one_line_error() -> None:
    with pytest.raises(FetchError, match="is no version"):
        detect_source("https://host/x", "\ud800")
