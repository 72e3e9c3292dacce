"""A Docker engine and a registry for the test session; the machine's own Docker is neither used nor changed."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Any

from tests.services.waiting import free_port

# Nothing else has this password: tests search for it.
USER, PASSWORD = "tester", "registry-7d1f0c52a94e4b6f"
# bcrypt of the password: what docker-registry's htpasswd takes.
_HTPASSWD = base64.b64decode(
    "JDJ5JDA1JHR5eEJINVFyS0xJdjBzcFp3UFlEeHVuT0FJRGMucGZuMzhPSUFlZ09qalJ4YzFta2pDLkNL"
).decode()


def start_engine(folder: Path) -> str:
    """Starts ``dockerd`` in a folder, unless it runs there, and returns its address on this machine.

    It listens on a TCP port, too, whose address is in the file ``tcp.address``, with the certificates of the folder ``tls``.

    Without bridge and firewall rules: containers have the host's network or none, and the machine stays as it is.
    """
    address = f"unix://{folder / 'docker.sock'}"
    folder.mkdir(parents=True, exist_ok=True)
    if _answers(address):
        return address
    certificates, port = _make_certificates(folder / "tls"), free_port()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                "dockerd",
                *("--host", address, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "dockerd.pid"), "--bridge=none", "--iptables=false", "--ip6tables=false"),
                *("--host", f"tcp://127.0.0.1:{port}", "--tlsverify", f"--tlscacert={certificates / 'ca.pem'}"),
                *(f"--tlscert={certificates / 'cert.pem'}", f"--tlskey={certificates / 'key.pem'}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(process.pid))
    (folder / "tcp.address").write_text(f"tcp://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd did not start: {(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.1)
    return address


def _make_certificates(folder: Path) -> Path:
    """One certificate for all parts: it is its own authority, the engine's, and the client's."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=digitalSignature,keyCertSign"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "ca.pem").write_bytes((folder / "cert.pem").read_bytes())
    return folder


def stop_engine(folder: Path) -> None:
    """Stops what ``start_engine`` and ``start_registry`` started in a folder."""
    for name in ("registry.pid", "pid"):
        file = folder / name
        if not file.exists():
            continue
        pid = int(file.read_text())
        file.unlink()
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
        deadline = time.monotonic() + 30
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    subprocess.run(["umount", "-R", str(folder / "data")], check=False, capture_output=True)


def start_registry(folder: Path) -> str:
    """Starts Debian's ``docker-registry`` on loopback with basic authentication, unless it runs; returns ``host:port``."""
    known = folder / "registry.address"
    if known.exists() and _listens(int(known.read_text().rpartition(":")[2])):
        return known.read_text()
    port = free_port()
    (folder / "htpasswd").write_text(f"{USER}:{_HTPASSWD}\n")
    (folder / "registry.yml").write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\n"
        f"auth: {{htpasswd: {{realm: tests, path: {folder / 'htpasswd'}}}}}\n"
    )
    with (folder / "registry.log").open("ab") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "registry.yml")],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "registry.pid").write_text(str(process.pid))
    deadline = time.monotonic() + 30
    while not _listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "registry.log").read_text()[-2000:])
        time.sleep(0.05)
    known.write_text(f"127.0.0.1:{port}")
    return known.read_text()


def import_busybox(client: Any, name: str, *, project: bool = False, changes: list[str] | None = None) -> str:
    """Makes an image of Debian's busybox-static; with ``project``, its working directory holds an MLproject file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        _add_busybox(archive)
        if project:
            text = b"name: carried\nentry_points:\n  main: {command: pwd}\n"
            info = tarfile.TarInfo("carried/MLproject")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    repository, _, tag = name.rpartition(":")
    settings = ["ENV PATH=/bin", *(["WORKDIR /carried"] if project else []), *(changes or [])]
    client.import_image_from_data(data.getvalue(), repository=repository, tag=tag, changes=settings)
    return name


def _add_busybox(archive: tarfile.TarFile) -> None:
    busybox = Path("/bin/busybox").read_bytes()
    info = tarfile.TarInfo("bin/busybox")
    info.size, info.mode = len(busybox), 0o755
    archive.addfile(info, io.BytesIO(busybox))
    for applet in (
        "sh",
        "cat",
        "echo",
        "env",
        "false",
        "id",
        "ls",
        "mkdir",
        "printf",
        "pwd",
        "sleep",
        "touch",
        "true",
        "yes",
    ):
        link = tarfile.TarInfo(f"bin/{applet}")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        archive.addfile(link)
    for folder in ("tmp", "etc"):
        info = tarfile.TarInfo(folder)
        info.type, info.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(info)


def import_python(client: Any, name: str) -> str:
    """Makes an image of the Python that runs the tests: its standard library, the C libraries it needs, bash, and busybox.

    Packages are not in it; mount ``sysconfig.get_path("purelib")`` for those, of which ``prefect`` finds its program.
    """
    repository, _, tag = name.rpartition(":")
    bash = Path(shutil.which("bash") or "/bin/bash").resolve()
    binary, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    own = [each for each in library.rglob("*.so") if "site-packages" not in each.parts]
    extensions = [*own, *Path(sysconfig.get_path("purelib")).glob("greenlet/*.so")]
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        _add_busybox(archive)
        archive.add(binary, str(binary))
        archive.add(bash, "/bin/bash")
        for needed in _c_libraries([binary, bash, *(each for each in extensions if "tkinter" not in each.name)]):
            # Where the loader finds them: by their own path, which may be a symbolic link.
            archive.add(needed.resolve(), str(needed))
        archive.add(library, str(library), filter=_belongs_to_python)
        script = b'#!/bin/sh\nexec python -m prefect "$@"\n'
        info = tarfile.TarInfo("bin/prefect")
        info.size, info.mode = len(script), 0o755
        archive.addfile(info, io.BytesIO(script))
        for program in ("python", "python3"):
            link = tarfile.TarInfo(f"bin/{program}")
            link.type, link.linkname = tarfile.SYMTYPE, str(binary)
            archive.addfile(link)
    paths = sorted({str(each.parent) for each in _c_libraries([binary])})
    client.import_image_from_data(
        data.getvalue(),
        repository=repository,
        tag=tag,
        changes=["ENV PATH=/bin", f"ENV LD_LIBRARY_PATH={':'.join(paths)}", f"ENV PYTHONHOME={sys.base_prefix}"],
    )
    return name


def _c_libraries(files: list[Path]) -> list[Path]:
    output = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    found = {Path(os.path.normpath(each)) for each in re.findall(r"(?:=> )?(/\S+) \(0x", output)}
    # What packages need besides: parts of the C library in files of their own.
    folders = {each.parent for each in found if each.name == "libc.so.6"}
    parts = ("librt.so.1", "libpthread.so.0", "libdl.so.2", "libutil.so.1", "libgcc_s.so.1", "libnss_files.so.2")
    return sorted(found | {folder / name for folder in folders for name in parts if (folder / name).exists()})


def _belongs_to_python(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    left_out = {"test", "tests", "idlelib", "tkinter", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
    parts = info.name.split("/")
    return None if left_out & set(parts) or any(part.startswith("config-") for part in parts) else info


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(address.removeprefix("unix://")) == 0


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
