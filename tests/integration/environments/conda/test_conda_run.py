"""A project with a conda.yaml, run by the command as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.services.prefect_api import client_variables

MLPROJECT = """\
name: demo
conda_env: conda.yaml
entry_points:
  main:
    parameters: {count: {type: int, default: 1}}
    command: "python show.py {count}"
"""
SHOW = "import os, sys; print(sys.argv[1], sys.prefix, os.environ['CONDA_PREFIX'], os.environ['ACTIVATED'])\n"


def test_conda_project_runs_and_reuses_its_environment(
    workshop: Any, conda: Any, pythons: Any, channel: Any, prefect_server: Any, tmp_path: Path
) -> None:
    channel.add("act", content=conda.Content.of({"etc/conda/activate.d/act.sh": "export ACTIVATED=yes\n"}))
    project = workshop.project(
        {"MLproject": MLPROJECT, "show.py": SHOW, "conda.yaml": conda.yaml([channel, pythons], "python", "act")}
    )
    environ = {
        **os.environ,
        **client_variables(prefect_server.api_url),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }

    def mlprojects(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect_mlprojects", *arguments]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    assert "(to be built)" in mlprojects("plan", str(project.directory)).stdout
    first, second = (
        mlprojects("run", str(project.directory)),
        mlprojects("run", str(project.directory), "-P", "count=2"),
    )
    (environment,) = json.loads(mlprojects("env", "list", "--json").stdout)
    location = environment["location"]
    assert first.stdout == f"1 {location} {location} yes\n"
    assert second.stdout == f"2 {location} {location} yes\n"
    assert "Building an environment: conda" in first.stderr
    assert "Installing python" not in first.stderr
    flow_run = next(line.split("/")[-1] for line in first.stderr.splitlines() if line.startswith("Flow run: "))
    assert "Installing python" in mlprojects("logs", flow_run).stdout
    assert "(reused)" in second.stderr
    assert environment["manager"] == "conda"
    assert "Removed 1 environments" in mlprojects("env", "prune", "--all").stdout
