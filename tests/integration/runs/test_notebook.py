"""``run()`` in a notebook, where an event loop runs already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CELL = """
from prefect_mlprojects import run
submitted = run({greet!r}, env_manager="local", parameters={{"name": "notebook"}})
print(submitted.get_status())
"""


def test_notebook_cell_runs_project_and_shows_output(greet: str, workspace: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    notebook.cells.append(nbformat.v4.new_code_cell(CELL.format(greet=greet)))  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": workspace}})
    client.execute()
    output = "".join(each.get("text", "") for each in notebook.cells[0].outputs if each["output_type"] == "stream")
    assert "hello notebook" in output
    assert "FINISHED" in output


LIVE = """
from prefect_mlprojects import SubmittedRun, run
live = run({project!r}, env_manager="local", parameters={{"mark": "<b>&"}}, synchronous=False)
_ = live.run_id
live
"""
AGAIN = """
open("go", "w").close()
assert live.wait()
import time
time.sleep(3)
SubmittedRun.attach(live.flow_run_id)
"""


def test_notebook_display_follows_the_run(workspace: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    project = workspace / "live"
    project.mkdir()
    (project / "MLproject").write_text(
        "name: live\nentry_points:\n  main:\n    parameters: {mark: string}\n"
        f'    command: "until test -e {workspace}/go; do sleep 0.2; done; python log.py"\n'
    )
    (project / "log.py").write_text("import mlflow\nmlflow.log_metric('val_loss', 0.25)\n")
    notebook: Any = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    for cell in (LIVE.format(project=str(project)), AGAIN):
        notebook.cells.append(nbformat.v4.new_code_cell(cell))  # type: ignore[no-untyped-call]
    seen: list[str] = []

    def displays(cell: int) -> list[Any]:
        # Prefect's log, by rich, is displayed, too.
        outputs = notebook.cells[cell].outputs
        return [each for each in outputs if "table" in each.get("data", {}).get("text/html", "")]

    class Client(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data"):
                seen.append(msg["content"]["data"].get("text/html", ""))
            return super().process_message(msg, cell, cell_index)

    Client(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": workspace}}).execute()
    (shown,) = displays(0)
    assert any("RUNNING" in each for each in seen)
    # The first cell's display, after a later cell has waited for the run.
    for words in ("FINISHED", "live/main", "mark = &lt;b&gt;&amp;", "val_loss = 0.25"):
        assert words in shown["data"]["text/html"]
    assert shown["data"]["text/plain"].startswith("<LocalSubmittedRun live/main FINISHED")
    (attached,) = displays(1)
    assert "val_loss = 0.25" in attached["data"]["text/html"]


def test_ipython_terminal_shows_one_line(greet: str, workspace: Path) -> None:
    code = f"from prefect_mlprojects import run; r = run({greet!r}, env_manager='local')"
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", "--no-banner", "--simple-prompt", "-i", "-c", code]
    done = subprocess.run(command, input="r\n", capture_output=True, text=True, timeout=240, cwd=workspace)
    assert "<LocalSubmittedRun greet/main FINISHED" in done.stdout
    assert "<div>" not in done.stdout
