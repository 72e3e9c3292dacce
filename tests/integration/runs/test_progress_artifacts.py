"""Long works in Prefect's UI: their progress artifacts."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.prefect_api import api
from tests.services.waiting import wait_for

from prefect_mlprojects import run
from prefect_mlprojects.server.process import ServerAddress

PIECES = 12


@pytest.fixture
def slow_file() -> Iterator[str]:
    """The address of a file that takes some seconds to come."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(PIECES * 1_000_000))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            for _ in range(PIECES):
                self.wfile.write(b"x" * 1_000_000)
                time.sleep(0.5)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/weights.bin"
        server.shutdown()


def test_long_download_updates_progress_artifact(
    slow_file: str, workspace: Path, prefect_server: ServerAddress
) -> None:
    project = workspace / "project"
    project.mkdir()
    (project / "MLproject").write_text(
        "name: reads\nentry_points:\n  main: {parameters: {data: path}, command: 'wc -c < {data}'}\n"
    )

    def artifacts(flow_run_id: str) -> list[dict[str, Any]]:
        question = {
            "flow_runs": {"id": {"any_": [flow_run_id]}},
            "artifacts": {"type": {"any_": ["progress"]}},
        }
        found: list[dict[str, Any]] = api(prefect_server.api_url).post("/artifacts/filter", json=question).json()
        return found

    def log(flow_run_id: str) -> list[str]:
        question = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}}
        return [each["message"] for each in api(prefect_server.api_url).post("/logs/filter", json=question).json()]

    handle = run(str(project), parameters={"data": slow_file}, env_manager="local", synchronous=False)
    (early,) = wait_for(lambda: artifacts(handle.flow_run_id), "the artifact")
    assert 0 < early["data"] < 100
    assert handle.wait()
    (last,) = artifacts(handle.flow_run_id)
    assert (last["data"], last["description"]) == (100, f"downloading {slow_file}")
    assert last["task_run_id"]

    # The same on the embedded server, which no variable names: nothing that a thread tells goes astray.
    code = (
        "import sys\nfrom prefect_mlprojects import run\n"
        "print(run(sys.argv[1], parameters={'data': sys.argv[2]}, env_manager='local').flow_run_id)\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(project), f"{slow_file}?again"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    flow_run_id = done.stdout.split()[-1]
    assert any(line.endswith(f"of {PIECES},000,000") for line in log(flow_run_id))
    assert [each["data"] for each in artifacts(flow_run_id)] == [100]
