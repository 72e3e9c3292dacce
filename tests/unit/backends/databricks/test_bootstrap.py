"""The script that runs on the driver: what needs no workspace."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.backends.databricks import bootstrap
from prefect_mlprojects.backends.databricks.execution import parse_chunk

FILE = Path(bootstrap.__file__)


def test_it_is_python_of_old_runtimes_and_needs_nothing_installed() -> None:
    tree = ast.parse(FILE.read_text(), feature_version=(3, 8))

    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names <= sys.stdlib_module_names


def job(folder: Path, files: dict[str, str], **fields: Any) -> dict[str, Any]:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"project/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    path = folder / "code.tar.gz"
    path.write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    return {"archive": str(path), "sha256": digest, "variables": {}, "output": str(folder / "output"), **fields}


def run(folder: Path, job: dict[str, Any], **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "tmp").mkdir()
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder / "tmp"), **variables}
    return subprocess.run(
        [sys.executable, str(FILE), json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )


@pytest.mark.parametrize(
    ("command", "code"), [("true", 0), ("exit 3", 3), ("kill -9 $$", 137), ("no-such-program", 127)]
)
def test_it_passes_the_exit_code_on_and_leaves_nothing(tmp_path: Path, command: str, code: int) -> None:
    done = run(tmp_path, job(tmp_path, {"a": ""}, command=command))

    assert done.returncode == code
    assert json.loads((tmp_path / "output/exit.json").read_text()) == {"exit_code": code, "problem": ""}
    assert list((tmp_path / "tmp").iterdir()) == []


def test_it_passes_both_streams_on_in_order(tmp_path: Path) -> None:
    done = run(tmp_path, job(tmp_path, {"a": "content"}, command="cat a; echo ß >&2; printf '\\377'"))

    assert done.stdout.startswith("content")
    assert done.stderr == "ß\n"
    pieces = [piece for file in sorted((tmp_path / "output").glob("0*")) for piece in parse_chunk(file.read_bytes())]
    assert b"".join(data for stream, data in pieces if stream == "stdout") == b"content\xff"
    assert b"".join(data for stream, data in pieces if stream == "stderr") == "ß\n".encode()


def test_command_runs_in_driver_python_with_cluster_libraries(tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "cluster_library.py").write_text("")
    wanted = job(tmp_path, {"a": ""}, command="python -c 'import cluster_library, sys; print(sys.executable)'")
    # As a driver does it: the file's text is executed in a Python that has the cluster's libraries on its path.
    driver = "import sys; sys.path.append({!r}); sys.argv = ['x', {!r}]; exec(compile(open({!r}).read(), 'x', 'exec'))"

    done = subprocess.run(
        [sys.executable, "-c", driver.format(str(libraries), json.dumps(wanted), str(FILE))],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin"},
    )

    assert done.stdout.strip() == sys.executable, done.stderr


def test_background_process_of_command_is_killed_at_exit(tmp_path: Path) -> None:
    command = "(trap '' TERM; exec sleep 600) & echo $! > \"$HOME/pid\"; sleep 0.2"

    done = run(tmp_path, job(tmp_path, {"a": ""}, command=command), HOME=str(tmp_path))

    assert done.returncode == 0
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sha256": "0" * 64}, "is damaged"), ({"archive": "/nowhere.tar.gz"}, "can't be read on the driver")],
)
def test_unusable_archive_is_reported_without_traceback(tmp_path: Path, change: dict[str, str], message: str) -> None:
    done = run(tmp_path, {**job(tmp_path, {"a": ""}, command="true"), **change})

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert message in json.loads((tmp_path / "output/exit.json").read_text())["problem"]


def test_output_that_can_not_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    done = run(tmp_path, job(tmp_path, {"a": ""}, command="echo fine", output=str(tmp_path / "file/below")))

    assert done.returncode == 0
    assert done.stdout == "fine\n"
    assert "no live output" in done.stderr


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        ("3.11.7", "3.11", True),
        ("3.11.7", "3.11.7", True),
        ("3.11.7", "3.1", False),
        ("3.11.7", "3.12", False),
        ("3.11.7", ">=3.10", True),
        ("3.11.7", ">=3.12", False),
    ],
)
def test_python_version_request_accepts_matching_versions_only(own: str, wanted: str, expected: bool) -> None:
    assert bootstrap.fits(own, wanted) is expected


@pytest.mark.parametrize("data", [b"out 5\nabc", b"out", b"out 3", b"junk\nabc"])
def test_half_a_chunk_is_left_for_later(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int() raises it too
        list(parse_chunk(data))
