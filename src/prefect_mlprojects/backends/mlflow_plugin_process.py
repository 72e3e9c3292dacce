"""The process that an MLflow backend plugin runs in; see ``mlflow_plugins``.

Usage: ``python -m prefect_mlprojects.backends.mlflow_plugin_process DESCRIPTOR``, with the request in the environment. Reports
go to DESCRIPTOR, a JSON text a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


class _Stopped(BaseException):
    """SIGTERM came."""


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def main(descriptor: int) -> int:
    """Runs the plugin that the request names; returns the exit code."""
    from prefect_mlprojects.backends.mlflow_plugins import REQUEST_VARIABLE, plugin_entry_points

    os.set_inheritable(descriptor, False)
    request: dict[str, Any] = json.loads(os.environ.pop(REQUEST_VARIABLE))
    sys.path[:] = request["path"]

    def report(**values: Any) -> None:
        os.write(descriptor, json.dumps(values).encode() + b"\n")

    submitted: Any = None
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        plugin = plugin_entry_points()[request["plugin"]].load()()
        submitted = plugin.run(
            request["project"],
            request["entry_point"],
            request["parameters"],
            None,
            request["backend_config"],
            os.environ["MLFLOW_TRACKING_URI"],
            _experiment_id(request),
        )
        report(run_id=str(submitted.run_id))
        succeeded = bool(submitted.wait())
    except _Stopped:
        if submitted is not None:
            submitted.cancel()
            report(cancelled=True)
        return 128 + signal.SIGTERM
    except Exception as error:
        report(error=f"{type(error).__name__}: {error}")
        raise
    status = submitted.get_status()
    report(succeeded=succeeded, status=_STATUS_NAMES.get(status, str(status)))
    return 0 if succeeded else 1


# mlflow.entities.RunStatus; plugins return its numbers or its names.
_STATUS_NAMES = {1: "RUNNING", 2: "SCHEDULED", 3: "FINISHED", 4: "FAILED", 5: "KILLED"}


def _experiment_id(request: dict[str, Any]) -> str:
    from prefect_mlprojects._support.secrets import Secret
    from prefect_mlprojects.tracking import Tracker

    return Tracker().resolve_experiment(
        Secret(os.environ["MLFLOW_TRACKING_URI"]), request["experiment_name"], request["experiment_id"]
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
