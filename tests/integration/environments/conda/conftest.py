"""A conda channel that is made on the spot, with a real Python in it: the files of the Python that runs the tests."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import os
import platform
import struct
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

VERSION = "{}.{}.{}".format(*sys.version_info[:3])
MINOR = "{}.{}".format(*sys.version_info[:2])
MACHINES = {"x86_64": "64", "aarch64": "aarch64", "arm64": "arm64", "ppc64le": "ppc64le"}
SUBDIR = ("osx-" if sys.platform == "darwin" else "linux-") + MACHINES[platform.machine()]

_LEFT_OUT = frozenset(
    (
        *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "site-packages"),
        *("dist-packages", "__pycache__", "__phello__"),
    )
)


def zstandard(data: bytes) -> bytes:
    """A Zstandard frame that holds data uncompressed (RFC 8878, raw blocks), which takes no time to make."""
    block = 128 * 1024
    frame = bytearray(struct.pack("<IB", 0xFD2FB528, 0xE0) + struct.pack("<Q", len(data)))
    pieces = [data[start : start + block] for start in range(0, len(data), block)] or [b""]
    for number, piece in enumerate(pieces):
        header = (len(piece) << 3) | (number == len(pieces) - 1)
        frame += struct.pack("<I", header)[:3] + piece
    return bytes(frame)


@dataclass
class Content:
    """The files of a package."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    executables: set[str] = field(default_factory=set)
    prefixed: set[str] = field(default_factory=set)

    @staticmethod
    def of(files: Mapping[str, str | bytes], prefixed: Iterable[str] = ()) -> Content:
        data: dict[str, bytes | Path] = {}
        for path, text in files.items():
            data[path] = text.encode() if isinstance(text, str) else text
        return Content(data, executables={path for path in data if path.startswith("bin/")}, prefixed=set(prefixed))


PLACEHOLDER = "/conda_placeholder_placehold_placehold"


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    archive.addfile(info, io.BytesIO(data))


def _tar(content: Content) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, source in content.files.items():
            data = source.read_bytes() if isinstance(source, Path) else source
            _add(archive, name, data, 0o755 if name in content.executables else 0o644)
        for name, target in content.links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def _paths(content: Content) -> list[dict[str, Any]]:
    """The package's ``info/paths.json``; see https://docs.conda.io/projects/conda-build/en/stable/resources/package-spec.html."""
    paths: list[dict[str, Any]] = []
    for name, source in content.files.items():
        data = source.read_bytes() if isinstance(source, Path) else source
        entry = {
            "_path": name,
            "path_type": "hardlink",
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_in_bytes": len(data),
        }
        if name in content.prefixed:
            entry |= {"file_mode": "text", "prefix_placeholder": PLACEHOLDER}
        paths.append(entry)
    empty = hashlib.sha256(b"").hexdigest()
    paths.extend({"_path": name, "path_type": "softlink", "sha256": empty} for name in content.links)
    return paths


@dataclass
class CondaChannel:
    """A channel in a folder."""

    folder: Path

    @property
    def url(self) -> str:
        return self.folder.as_uri()

    def add(
        self,
        name: str,
        version: str = "1.0",
        content: Content | None = None,
        *,
        depends: Iterable[str] = (),
        noarch: str | None = None,
        build: str = "0",
        suffix: str = ".conda",
        entry_points: Iterable[str] = (),
    ) -> None:
        """Makes a package and lists it."""
        content = content or Content()
        subdir = "noarch" if noarch else SUBDIR
        index = {
            "name": name,
            "version": version,
            "build": build,
            "build_number": 0,
            "depends": list(depends),
            "subdir": subdir,
            "timestamp": 1_700_000_000_000,
            **({"noarch": noarch} if noarch else {}),
        }
        info = {
            "info/index.json": json.dumps(index).encode(),
            "info/paths.json": json.dumps({"paths": _paths(content), "paths_version": 1}).encode(),
            "info/files": "".join(f"{path}\n" for path in (*content.files, *content.links)).encode(),
        }
        if entry_points:
            link = {"noarch": {"type": "python", "entry_points": list(entry_points)}, "package_metadata_version": 1}
            info["info/link.json"] = json.dumps(link).encode()
        metadata = Content({**info})
        folder = self.folder / subdir
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}-{version}-{build}{suffix}"
        if suffix == ".conda":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
                archive.writestr(f"pkg-{name}-{version}-{build}.tar.zst", zstandard(_tar(content)))
                archive.writestr(f"info-{name}-{version}-{build}.tar.zst", zstandard(_tar(metadata)))
        else:
            both = Content({**info, **content.files}, content.links, content.executables)
            file.write_bytes(bz2.compress(_tar(both), 1))
        data = file.read_bytes()
        record = {
            **index,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "md5": hashlib.md5(data).hexdigest(),
        }
        self._list(subdir, file.name, record)

    def _list(self, subdir: str, file: str, record: dict[str, Any]) -> None:
        for each in (SUBDIR, "noarch"):
            path = self.folder / each / "repodata.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            repodata: dict[str, Any] = {
                "info": {"subdir": each},
                "packages": {},
                "packages.conda": {},
                "removed": [],
                "repodata_version": 1,
            }
            if path.exists():
                repodata = json.loads(path.read_text())
            if each == subdir:
                repodata["packages.conda" if file.endswith(".conda") else "packages"][file] = record
            path.write_text(json.dumps(repodata))


def python_content() -> Content:
    """The Python that runs the tests, without what no test needs."""
    content = Content()
    base = Path(sys.base_prefix)
    library = Path(sysconfig.get_path("stdlib"))
    for folder, names, files in os.walk(library):
        names[:] = [name for name in names if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in files:
            file = Path(folder, name)
            if not name.startswith("_test") and not file.is_symlink():
                content.files[f"lib/python{MINOR}/{file.relative_to(library).as_posix()}"] = file
    shared = sysconfig.get_config_var("INSTSONAME")
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and shared and (base / "lib" / shared).exists():
        content.files[f"lib/{shared}"] = base / "lib" / shared
    content.files[f"bin/python{MINOR}"] = Path(os.path.realpath(base / "bin" / f"python{MINOR}"))
    content.executables.add(f"bin/python{MINOR}")
    content.links |= {"bin/python": f"python{MINOR}", "bin/python3": f"python{MINOR}"}
    return content


def pip_content() -> Content:
    """The pip that virtualenv carries, as a noarch package."""
    from virtualenv.seed.wheels.embed import get_embed_wheel

    wheel = get_embed_wheel("pip", MINOR)
    assert wheel is not None
    content = Content()
    with zipfile.ZipFile(wheel.path) as archive:
        for name in archive.namelist():
            if not name.endswith("/"):
                content.files[f"site-packages/{name}"] = archive.read(name)
    return content


@pytest.fixture(scope="session")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> CondaChannel:
    """A channel with Python and pip; tests must not add to it."""
    channel = CondaChannel(tmp_path_factory.mktemp("conda") / "pythons")
    channel.add("python", VERSION, python_content(), build="0_cpython")
    entry = "pip = pip._internal.cli.main:main"
    channel.add("pip", "25.0", pip_content(), depends=["python >=3.8"], noarch="python", entry_points=[entry])
    return channel


@pytest.fixture
def channel(tmp_path: Path) -> CondaChannel:
    """An empty channel that a test fills."""
    made = CondaChannel(tmp_path / "channel")
    made.add("empty", noarch="generic")
    return made


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("CONDA", "RATTLER_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


class CondaKit:
    """What tests of conda environments need besides a workshop."""

    Content = Content
    VERSION = VERSION
    MINOR = MINOR
    SUBDIR = SUBDIR
    PLACEHOLDER = PLACEHOLDER

    @staticmethod
    def yaml(channels: Iterable[CondaChannel | str], *dependencies: str, more: str = "") -> str:
        """The text of a conda file."""
        urls = [channel if isinstance(channel, str) else channel.url for channel in channels]
        lines = ["name: demo", "channels:", *(f"  - {url}" for url in urls), "dependencies:"]
        lines += [f"  - {dependency}" for dependency in dependencies]
        return "\n".join(lines) + "\n" + more


@pytest.fixture
def conda() -> CondaKit:
    return CondaKit()
