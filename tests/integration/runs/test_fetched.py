"""Runs of projects that were fetched, and of changed checkouts."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.git import git

from prefect_mlprojects import run
from prefect_mlprojects.exceptions import FetchError, RunFailed

Read = Callable[[str], Any]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "MLproject").write_text(
        "name: fetched\nentry_points:\n  main:\n    parameters: {who: {type: string, default: world}}\n"
        "    command: echo hello {who} from $(cat word) && pwd > $OUT && ls >> $OUT\n"
    )
    (folder / "sub" / "word").write_text("first")
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def test_run_of_git_version_records_commit_and_cleans_up(
    repository: Path, workspace: Path, tracked: Read, prefect_state: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(workspace / "out"))
    sha = git(repository, "rev-parse", "HEAD")
    (repository / "sub" / "word").write_text("second")
    git(repository, "commit", "-qam", "second")

    done = run(f"{repository.as_uri()}#sub", version=sha, env_manager="local")

    folder, *files = (workspace / "out").read_text().split()
    assert files == ["MLproject", "word"]
    assert not Path(folder).exists(), "the working copy is removed at the end"
    tags = tracked(str(done.run_id)).data.tags
    assert tags["mlflow.source.git.commit"] == sha
    assert tags["mlflow.source.git.repoURL"] == repository.as_uri()
    assert tags["mlflow.source.name"] == f"{repository.as_uri()}#sub"
    labels = prefect_state(done.flow_run_id).labels
    assert (labels["git.commit"], labels["git.repository"]) == (sha, repository.as_uri())
    assert prefect_state(done.flow_run_id).name == "fetched/main"


def test_second_run_of_commit_reuses_environment_with_package(
    repository: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = workspace / "cache", workspace / "out"
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(cache))
    monkeypatch.setenv("OUT", str(out))
    files = {
        "pyproject.toml": (
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "tiny"\nversion = "1.0"\n'
        ),
        "backend.py": (
            "import os, zipfile\n\ndef build_wheel(folder, config_settings=None, metadata_directory=None):\n"
            "    name, info = 'tiny-1.0-py3-none-any.whl', 'tiny-1.0.dist-info/'\n"
            "    with zipfile.ZipFile(os.path.join(folder, name), 'w') as wheel:\n"
            "        wheel.write('tiny.py')\n"
            "        wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n')\n"
            "        wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
            "        wheel.writestr(info + 'RECORD', '')\n    return name\n"
        ),
        "tiny.py": "VALUE = 'one'\n",
        "sub/MLproject": (
            "python_env: python_env.yaml\nentry_points:\n  main:\n"
            "    command: cd / && python -c 'import tiny; print(tiny.VALUE, tiny.__file__)' > $OUT\n"
        ),
        "sub/python_env.yaml": "dependencies: [--no-index, -e ..]\n",
    }
    for name, text in files.items():
        (repository / name).write_text(text)
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "a package")
    found = []
    for value in ("one", "one", "two"):
        (repository / "tiny.py").write_text(f"VALUE = '{value}'\n")
        git(repository, "commit", "-qam", value, "--allow-empty")
        run(f"{repository.as_uri()}#sub", version=git(repository, "rev-parse", "HEAD"))
        found.append(out.read_text().split())
    assert [value for value, _ in found] == ["one", "one", "two"]
    assert found[0] == found[1]
    assert all(Path(file).is_relative_to(cache / "environments") for _, file in found)
    assert len([folder for folder in (cache / "environments").iterdir() if folder.name != ".locks"]) == 2


def test_run_of_dirty_checkout_stores_patch(
    repository: Path, workspace: Path, tracked: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(workspace / "out"))
    (repository / "sub" / "word").write_bytes(b"changed\r\nno end \xff")
    patches = []
    for wanted in ("true", "false"):
        monkeypatch.setenv("PREFECT_MLPROJECTS_LOG_DIFF", wanted)
        done = run(str(repository / "sub"), env_manager="local")
        found = tracked(str(done.run_id))
        assert found.data.tags["mlflow.source.git.dirty"] == "true"
        patches.append(Path(found.info.artifact_uri.removeprefix("file://")) / "source" / "uncommitted-changes.patch")

    assert patches[0].is_file()
    assert not patches[1].exists()
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(repository), str(other))
    git(other, "apply", str(patches[0]))
    assert (other / "sub" / "word").read_bytes().startswith(b"changed\r\n")


def test_cli_run_of_dirty_checkout_stores_patch(
    repository: Path, workspace: Path, tracked: Read, mlprojects: Callable[..., Any]
) -> None:
    (repository / "sub" / "word").write_text("changed")
    done = mlprojects(
        "run", f"{repository}#sub", "--env-manager", "local", "--json", env={"OUT": str(workspace / "out")}
    )

    assert done.returncode == 0, done.stderr
    found = tracked(json.loads(done.stdout)["run_id"])
    folder = Path(found.info.artifact_uri.removeprefix("file://"))
    assert "+changed" in (folder / "source" / "uncommitted-changes.patch").read_text()


def test_look_at_a_project_without_leaving_its_files(
    repository: Path, workspace: Path, mlprojects: Callable[..., Any], tmp_path: Path
) -> None:
    cache = {"PREFECT_MLPROJECTS_CACHE_DIR": str(tmp_path / "cache")}
    uri = f"git+{repository.as_uri()}#sub"
    for command in (("describe", uri), ("plan", uri, "--env-manager", "local"), ("validate", uri)):
        done = mlprojects(*command, env=cache)
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache" / "working-copies").iterdir()) == []


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that has ``data.csv``."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "data.csv").write_text("1,2\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_are_removed_with_the_run_unless_a_storage_dir_is_given(
    site: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT", str(workspace / "out"))
    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text(
        "entry_points:\n  main:\n    parameters: {data: path, code: {type: int, default: 0}}\n"
        "    command: cp {data} $OUT && echo {data} >> $OUT && exit {code}\n"
    )

    def downloaded(**options: Any) -> Path:
        parameters = {"data": f"{site}/data.csv", **options.pop("parameters", {})}
        run(str(project), parameters=parameters, env_manager="local", **options)
        return used_file()

    def used_file() -> Path:
        content, path = (workspace / "out").read_text().splitlines()
        assert content == "1,2"
        return Path(path)

    assert not downloaded().exists()
    with pytest.raises(RunFailed):
        downloaded(parameters={"code": 3})
    assert not used_file().exists()
    with pytest.raises(FetchError, match="no such file"):
        downloaded(parameters={"data": f"{site}/missing.csv"})
    assert list((tmp_path / "cache" / "working-copies").iterdir()) == []
    kept = downloaded(storage_dir=workspace / "storage")
    assert kept.is_relative_to(workspace / "storage")
    assert kept.read_text() == "1,2\n"


def test_run_of_zip_archive_succeeds(
    workspace: Path, tracked: Read, tmp_path: Path, mlprojects: Callable[..., Any]
) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("MLproject", "name: zipped\nentry_points:\n  main: {command: 'echo from a zip'}\n")
    done = mlprojects("run", str(tmp_path / "p.zip"), "--env-manager", "local")

    assert (done.returncode, done.stdout) == (0, "from a zip\n"), done.stderr


def test_failed_fetch_exits_without_traceback(
    workspace: Path, mlprojects: Callable[..., Any], repository: Path
) -> None:
    done = mlprojects("run", repository.as_uri(), "--version", "no-such-branch", "--env-manager", "local")

    assert done.returncode == 2
    assert "has no branch, tag or commit 'no-such-branch'" in done.stderr
    assert "Traceback" not in done.stderr
