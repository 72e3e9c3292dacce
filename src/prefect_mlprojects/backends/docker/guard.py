"""Stops a container if the run's process dies, from a separate guard process.

The guard reads ``done`` on its standard input once the container has ended; end of file without it means that the run's process
died. Docker's SDK is imported only then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from prefect_mlprojects._support.secrets import reveal_all
from prefect_mlprojects.backends.configuration import dump_config
from prefect_mlprojects.backends.containers.config import LocalConfig

_DONE = b"done\n"


@contextlib.contextmanager
def guarded(container_id: str, config: LocalConfig, grace: float) -> Iterator[None]:
    """Stops the container if this process dies within the context; `grace` is the grace period in seconds."""
    # Sent by the pipe, since it may hold the engine's key.
    engine = reveal_all({name: value for name, value in dump_config(config).items() if name.startswith("docker-")})
    job = {"container": container_id, "grace": grace, "path": sys.path, "engine": engine}
    program = (
        "import json, sys; job = json.loads(sys.stdin.buffer.readline()); sys.path[:] = job['path']; "
        "from prefect_mlprojects.backends.docker.guard import watch; watch(job)"
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    try:
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            process.stdin.write(_DONE)
            process.stdin.close()
        process.wait()


def watch(job: dict[str, object]) -> None:
    """Waits for end of file on standard input, and stops the container unless ``done`` was read before."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    from prefect_mlprojects.backends.containers.engine import connect

    engine = connect(LocalConfig.model_validate(job["engine"]))
    container = str(job["container"])
    with contextlib.suppress(Exception):
        engine.stop(container, timeout=int(float(str(job["grace"]))))
    with contextlib.suppress(Exception):
        engine.remove_container(container, force=True)
