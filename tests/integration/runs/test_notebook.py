"""``run()`` in a notebook, where an event loop runs already."""

from __future__ import annotations

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
