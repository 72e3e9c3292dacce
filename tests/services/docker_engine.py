"""A Docker engine and a registry of the test session's own; nothing of the machine's Docker is used or touched."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

from tests.services.waiting import free_port

USER, PASSWORD = "tester", "pa55"
# bcrypt of the password: what docker-registry's htpasswd takes.
_HTPASSWD = base64.b64decode(
    "JDJiJDEwJHR5M0JINVFyLklMdjBzLnBad1lEeHVBS0xHVkZiLktQMTMxSXJubUJ5alBCN1hpUksxZjNl"
).decode()


def start_engine(folder: Path) -> str:
    """Starts ``dockerd`` in a folder, unless it runs there, and returns its address.

    Without bridge and firewall rules: containers have the host's network or none, and the machine stays as it is.
    """
    address = f"unix://{folder / 'docker.sock'}"
    folder.mkdir(parents=True, exist_ok=True)
    if _answers(address):
        return address
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                "dockerd",
                *("--host", address, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "dockerd.pid"), "--bridge=none", "--iptables=false", "--ip6tables=false"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(process.pid))
    deadline = time.monotonic() + 60
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd did not start: {(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.1)
    return address


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
        if project:
            text = b"name: carried\nentry_points:\n  main: {command: pwd}\n"
            info = tarfile.TarInfo("carried/MLproject")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    repository, _, tag = name.rpartition(":")
    settings = ["ENV PATH=/bin", *(["WORKDIR /carried"] if project else []), *(changes or [])]
    client.import_image_from_data(data.getvalue(), repository=repository, tag=tag, changes=settings)
    return name


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
