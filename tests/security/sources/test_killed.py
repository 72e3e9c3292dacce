"""Keys and tokens of a process that is killed are removed by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefect_mlprojects._support.process_folders import sweep_private_folders

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nm4rker\n-----END OPENSSH PRIVATE KEY-----"

GIT = f"""
import sys
from prefect_mlprojects.sources import detect_source
from prefect_mlprojects.sources.git import GitCredentials
from prefect_mlprojects.types import StopSignal
key = GitCredentials(ssh_private_key={KEY!r}, known_hosts="m4rker")
detect_source("ssh://git@127.0.0.1:1/x", git_credentials=lambda url: key).fetch(StopSignal(), print)
"""
CONDA = """
import os, time
from prefect_mlprojects.environments.conda.solving import credentials_file, take_credentials
with credentials_file(take_credentials(["https://u:m4rker@host/channel"]), os.environ):
    time.sleep(60)
"""
KUBERNETES = """
import json, time
from prefect_mlprojects.backends.kubernetes.config import connect, parse_kubernetes_config
data = "bTRya2Vy"
user = {"name": "u", "user": {"client-certificate-data": data, "client-key-data": data}}
context = {"name": "c", "context": {"cluster": "k", "user": "u"}}
cluster = {"name": "k", "cluster": {"server": "https://127.0.0.1:1", "certificate-authority-data": data}}
kubeconfig = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "c"}
try:
    connect(parse_kubernetes_config({"kubeconfig": json.dumps(kubeconfig)}))
finally:
    time.sleep(60)
"""
DOCKER = """
import time
from prefect_mlprojects.backends.containers.engine import EngineAddress, EngineConnection, _tls
connection = EngineConnection(host="tcp://h:1", client_certificate="m4rker", client_key="m4rker")
try:
    _tls(EngineAddress("tcp://h:1", "test", connection=connection))
finally:
    time.sleep(60)
"""


@pytest.mark.parametrize("phase", ["git", "conda", "kubernetes", "docker"])
def test_keys_of_killed_process_are_removed_by_next_start(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, cache = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nsleep 60\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(cache))
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code = {"git": GIT, "conda": CONDA, "kubernetes": KUBERNETES, "docker": DOCKER}[phase]
    old = os.umask(0)
    try:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    finally:
        os.umask(old)
    private = cache / "private"

    def keys() -> list[Path]:
        return [file for file in private.rglob("*") if file.is_file() and b"m4rker" in file.read_bytes()]

    deadline = time.monotonic() + 60
    while not keys():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    sweep_private_folders()
    kept = keys()
    modes = {file.stat().st_mode & 0o077 for file in kept} | {private.stat().st_mode & 0o077}
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep_private_folders()

    assert kept, "a living process loses its keys"
    assert modes == {0}
    assert list(private.iterdir()) == []
    assert list(temporary.iterdir()) == []
