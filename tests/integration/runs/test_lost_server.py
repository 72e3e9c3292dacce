"""An interrupted run ends within seconds although its Prefect server is gone or does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefect_mlprojects.server.record import read_record, stop_process

COMMAND = "from prefect_mlprojects.cli import main; main()"
SCRIPT = "import sys; from prefect_mlprojects import run; run(sys.argv[2], 'sleep', env_manager='local')"


@pytest.mark.parametrize(
    ("code", "loss", "interrupt", "exit_codes"),
    [
        (COMMAND, signal.SIGKILL, signal.SIGINT, {130}),
        (COMMAND, signal.SIGSTOP, signal.SIGTERM, {130}),
        (SCRIPT, signal.SIGKILL, signal.SIGINT, {1, 130, -signal.SIGINT}),
    ],
)
def test_interrupted_client_ends_without_its_server(
    code: str, loss: signal.Signals, interrupt: signal.Signals, exit_codes: set[int], greet: str, tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    variables = {"PREFECT_MLPROJECTS_SERVER_DIR": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "MLFLOW_RUN_ID")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", greet, "-e", "sleep", "--env-manager", "local"],
        cwd=tmp_path,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    record = None
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        record = read_record(folder)
        assert record is not None
        os.kill(record.pid, loss)
        process.send_signal(interrupt)
        interrupted = time.monotonic()
        _, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - interrupted
    finally:
        process.kill()
        process.wait()
        if record is not None:
            if loss == signal.SIGSTOP:
                os.kill(record.pid, signal.SIGCONT)
            stop_process(record)
    assert process.returncode in exit_codes, errors
    assert seconds < 30, errors
    for dump in ("httpx", "Error logging to API", "EventsWorker"):
        assert dump not in errors
    if code == COMMAND:
        assert "Traceback" not in errors
        assert "was cancelled" in errors
        assert "does not answer and may show the flow run as running" in errors
    from mlflow.tracking import MlflowClient

    (run,) = MlflowClient(variables["MLFLOW_TRACKING_URI"]).search_runs(["0"])
    assert run.info.status == "KILLED"
