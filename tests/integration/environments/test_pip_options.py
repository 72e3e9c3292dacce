"""Every option of a requirements file has the same effect under uv and under pip, or is an error under uv."""

from __future__ import annotations

import hashlib
import io
import os
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import EnvironmentManagerName

MANAGERS: tuple[EnvironmentManagerName, ...] = ("uv", "virtualenv")
INFO = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
BACKEND = """\
import os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    file = "{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, file), "w") as wheel:
        wheel.writestr("{name}.py", "")
        info = "{name}-{version}.dist-info/"
        wheel.writestr(info + "METADATA", {info!r})
        wheel.writestr(info + "WHEEL", {wheel!r})
        wheel.writestr(info + "RECORD", "")
    return file

build_editable = build_wheel
"""
BUILD_SYSTEM = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def source(name: str, version: str) -> dict[str, str]:
    """The files of a source distribution that needs nothing to be built."""
    info = INFO.format(name=name, version=version)
    return {
        "pyproject.toml": f'{BUILD_SYSTEM}[project]\nname = "{name}"\nversion = "{version}"\n',
        "PKG-INFO": info,
        "backend.py": BACKEND.format(name=name, version=version, info=info, wheel=WHEEL),
    }


def distribution(folder: Path, name: str, version: str, *, wheel: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if wheel:
        file, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{name}.py", "")
            archive.writestr(f"{info}/METADATA", INFO.format(name=name, version=version))
            archive.writestr(f"{info}/WHEEL", WHEEL)
            archive.writestr(f"{info}/RECORD", "")
        return file
    file = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for path, text in source(name, version).items():
            member = tarfile.TarInfo(f"{name}-{version}/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


@pytest.fixture
def shelf(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of distributions: links of one kind, two indexes, and a repository; nothing else is set up for pip and uv."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_")) and name != "UV_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workshop.root / "none"))
    root = Path(workshop.root) / "shelf"
    links = root / "the links"
    for name, version, wheel in (
        *(("alpha", "1.0", True), ("alpha", "2.0rc1", True), ("beta", "1.0", True), ("beta", "2.0", False)),
        *(("gamma", "1.0", True), ("gamma", "1.0", False)),
    ):
        distribution(links, name, version, wheel=wheel)
    for index, versions in {"first": ("1.0",), "second": ("3.0",)}.items():
        for version in versions:
            file = distribution(root / index / "alpha", "alpha", version, wheel=True)
            (file.parent / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    repository = root / "repository"
    repository.mkdir()
    for path, text in source("delta", "1.0").items():
        (repository / path).write_text(text)
    for command in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")):
        subprocess.run(["git", *command], cwd=repository, check=True)
    return root


def installed(workshop: Any, manager: EnvironmentManagerName, files: Mapping[str, str]) -> set[str]:
    """The packages that the managers install from ``requirements.txt``, besides those of an empty environment."""
    project = workshop.project({"python_env.yaml": "dependencies: [-r requirements.txt]\n", **files}, f"of-{manager}")
    environment = workshop.prepare(project, manager)
    listed = workshop.run(environment, "python -m pip list --format freeze --disable-pip-version-check")
    return {line for line in listed.split() if line.partition("==")[0] not in ("pip", "setuptools", "wheel")}


LINKS = "--no-index\n--find-links '{shelf}/the links'\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINKS + "alpha\nbeta\n", {"alpha==1.0", "beta==2.0"}),
        (LINKS + "--pre\nalpha\n", {"alpha==2.0rc1"}),
        (LINKS + "--only-binary=alpha,beta\nalpha\nbeta\n", {"alpha==1.0", "beta==1.0"}),
        (LINKS + "--only-binary :all:\nbeta\n", {"beta==1.0"}),
        (LINKS + "--use-feature=fast-deps\nalpha\n", {"alpha==1.0"}),
        (LINKS + "-c limits.txt\nbeta\n", {"beta==1.0"}),
        (LINKS + "-r more/pre.txt\nalpha\n", {"alpha==2.0rc1"}),
        (LINKS + "--find-links no/such/folder\nalpha\n", {"alpha==1.0"}),
        ("-i file://{shelf}/first --extra-index-url file://{shelf}/second\nalpha\n", {"alpha==3.0"}),
        ("-i file://{shelf}/second\n--extra-index-url file://{shelf}/first\nalpha\n", {"alpha==3.0"}),
        ("-i file://{shelf}/second\n-i file://{shelf}/first\nalpha\n", {"alpha==1.0"}),
        ("--extra-index-url file://{shelf}/second\n--index-url file://{shelf}/first\nalpha\n", {"alpha==1.0"}),
    ],
)
def test_pip_option_has_same_effect_with_every_manager(
    workshop: Any, shelf: Path, text: str, expected: set[str]
) -> None:
    files = {"requirements.txt": text.format(shelf=shelf), "limits.txt": "beta<2\n", "more/pre.txt": "--pre\n"}
    for manager in MANAGERS:
        assert installed(workshop, manager, files) == expected, manager


@pytest.mark.parametrize("manager", MANAGERS)
def test_editable_git_repository_is_installed(workshop: Any, shelf: Path, manager: EnvironmentManagerName) -> None:
    text = f"--no-index\n-e git+file://{shelf}/repository#egg=delta\n"
    project = workshop.project({"python_env.yaml": "dependencies: [-r requirements.txt]\n", "requirements.txt": text})
    environment = workshop.prepare(project, manager)
    script = "import delta, importlib.metadata as m; print(m.version('delta'))"
    assert workshop.run(environment, f'python -c "{script}"') == "1.0"


def test_no_binary_option_builds_from_source(workshop: Any, shelf: Path) -> None:
    text = LINKS.format(shelf=shelf) + "--no-binary gamma\ngamma\n"
    for manager in MANAGERS:
        workshop.lines.clear()
        assert installed(workshop, manager, {"requirements.txt": text}) == {"gamma==1.0"}
        assert any("Building" in line or "Preparing metadata" in line for line in workshop.lines), manager


def test_index_in_requirements_overrides_configured_index(
    workshop: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{shelf}/second")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{shelf}/second")
    for manager in MANAGERS:
        text = f"--index-url file://{shelf}/first\nalpha\n"
        assert installed(workshop, manager, {"requirements.txt": text}) == {"alpha==1.0"}
        text = f"--extra-index-url file://{shelf}/first\nalpha\n"
        assert installed(workshop, manager, {"requirements.txt": text}) == {"alpha==3.0"}


def test_configured_links_count_beside_those_of_a_file(
    workshop: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", f"{shelf}/second/alpha")
    for manager in MANAGERS:
        found = installed(workshop, manager, {"requirements.txt": LINKS.format(shelf=shelf) + "alpha\nbeta<2\n"})
        assert found == {"alpha==3.0", "beta==1.0"}


@pytest.mark.parametrize("text", ["--require-hashes\nalpha==1.0 {good}\nbeta==1.0\n", "alpha==1.0 {good}\nbeta==1.0\n"])
def test_single_hash_requires_hashes_for_all_requirements(workshop: Any, shelf: Path, text: str) -> None:
    wheel = shelf / "the links/alpha-1.0-py3-none-any.whl"
    good = f"--hash=sha256:{'0' * 64} \\\n  --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    for manager in MANAGERS:
        with pytest.raises(EnvironmentBuildError, match="beta"):
            installed(workshop, manager, {"requirements.txt": LINKS.format(shelf=shelf) + text.format(good=good)})
        alone = LINKS.format(shelf=shelf) + f"alpha==1.0 {good}\n"
        assert installed(workshop, manager, {"requirements.txt": alone}) == {"alpha==1.0"}
        with pytest.raises(EnvironmentBuildError, match="beta"):
            installed(workshop, manager, {"requirements.txt": alone.replace("alpha", "beta")})


@pytest.fixture
def untrusted(shelf: Path) -> Iterator[str]:
    """An index behind a certificate that nobody signed."""
    key, certificate = shelf / "key.pem", shelf / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    options = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(shelf)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"localhost:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_trusted_host_skips_certificate_verification(
    workshop: Any, untrusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for manager in MANAGERS:
        index = f"--index-url https://{untrusted}/second\nalpha\n"
        with pytest.raises(EnvironmentBuildError, match="alpha"):
            installed(workshop, manager, {"requirements.txt": index})
        trusted = f"--trusted-host other.example\n--trusted-host {untrusted}\n{index}"
        assert installed(workshop, manager, {"requirements.txt": trusted}) == {"alpha==3.0"}


@pytest.mark.parametrize("text", ["--prefer-binary\nbeta\n", "beta==2.0 --config-settings a=b\n"])
def test_option_unsupported_by_uv_error_suggests_virtualenv(workshop: Any, shelf: Path, text: str) -> None:
    files = {"requirements.txt": LINKS.format(shelf=shelf) + text}
    with pytest.raises(EnvironmentBuildError, match="--env-manager virtualenv") as caught:
        installed(workshop, "uv", files)
    assert "requirements.txt:3" in str(caught.value)
    assert workshop.leftovers() == []
    assert installed(workshop, "virtualenv", files) in ({"beta==1.0"}, {"beta==2.0"})


def test_unsupported_option_in_remote_file_is_rejected(workshop: Any, shelf: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(shelf)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (shelf / "remote.txt").write_text("--prefer-binary\nalpha\n")
    try:
        text = LINKS.format(shelf=shelf) + f"-r http://127.0.0.1:{server.server_address[1]}/remote.txt\n"
        with pytest.raises(EnvironmentBuildError, match="--env-manager virtualenv") as caught:
            installed(workshop, "uv", {"requirements.txt": text})
        assert "--prefer-binary" in str(caught.value)
        assert workshop.leftovers() == []
        assert installed(workshop, "virtualenv", {"requirements.txt": text}) == {"alpha==1.0"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
