"""Ends a container whose run's process died: a process of its own, which waits for that and does nothing else.

It is told ``done`` on its standard input when the container has ended; the input's end without that word means that the run's
process is gone, however it ended. Docker's SDK is imported only then.
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
    """Has the container ended when this process dies within the context.

    Args:
        container_id: The container.
        config: The backend's configuration.
        grace: Seconds between asking and killing.
    """
    # By the pipe, since the engine's key may be in it.
    engine = reveal_all({name: value for name, value in dump_config(config).items() if name.startswith("docker-")})
    facts = {"container": container_id, "grace": grace, "path": sys.path, "engine": engine}
    program = (
        "import json, sys; facts = json.loads(sys.stdin.buffer.readline()); sys.path[:] = facts['path']; "
        "from prefect_mlprojects.backends.docker.guard import watch; watch(facts)"
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
            process.stdin.write(json.dumps(facts).encode() + b"\n")
            process.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            process.stdin.write(_DONE)
            process.stdin.close()
        process.wait()


def watch(facts: dict[str, object]) -> None:
    """Waits for the end of standard input, and ends the container unless that was announced.

    Args:
        facts: ``container``, ``grace``, and the configuration's part about the ``engine``.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    from prefect_mlprojects.backends.containers.engine import connect

    engine = connect(LocalConfig.model_validate(facts["engine"]))
    container = str(facts["container"])
    with contextlib.suppress(Exception):
        engine.stop(container, timeout=int(float(str(facts["grace"]))))
    with contextlib.suppress(Exception):
        engine.remove_container(container, force=True)
