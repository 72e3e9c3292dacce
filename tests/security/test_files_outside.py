"""Fetched projects, and those whose files are sent away, that name files of the machine they are read on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from prefect_mlprojects import ExecutionException
from prefect_mlprojects._support.secrets import Secret
from prefect_mlprojects.environments.managers import check_environment
from prefect_mlprojects.exceptions import ParameterError, ProjectSpecError
from prefect_mlprojects.request import RunRequest
from prefect_mlprojects.request.check import RunSecrets, check_request, context_before_run
from prefect_mlprojects.sources import WorkingCopy
from prefect_mlprojects.spec import load_project
from prefect_mlprojects.spec.entry_points import lint

MARK = "canary-5b1f"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file beside the fetched project, which its author wants to read."""
    file = tmp_path / "databrickscfg"
    file.write_text(f"[{MARK}]\ntoken = {MARK}\n{MARK} : : {MARK}\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pyproject.toml").write_text(f"[project]\nname = {MARK}\n")
    return file


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "fetched" / "sub"
    folder.mkdir(parents=True)
    (folder / "MLproject").write_text("name: stranger\nentry_points:\n  main:\n    command: 'true'\n")
    return folder


def write_links(folder: Path, secret: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        content = content.replace("SECRET", str(secret)).replace("PACKAGE", str(secret.parent / "package"))
        if content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_text(content)


def problems_of(folder: Path, root: Path | None) -> str:
    """Returns all that ``mlprojects validate`` says about a working copy."""
    text = "\n".join(map(str, lint(folder, root=root)))
    try:
        return text + "\n".join(map(str, check_environment(load_project(folder, root=root))))
    except ProjectSpecError as error:
        return f"{text}\n{error}"


ENVIRONMENTS = {
    "requirement": {"python_env.yaml": "dependencies: ['-r SECRET']"},
    "relative": {"python_env.yaml": "dependencies: ['-r ../../databrickscfg']"},
    "long-option": {"python_env.yaml": "dependencies: ['--requirement=SECRET']"},
    "short-option": {"python_env.yaml": "dependencies: ['--requirem SECRET']"},
    "no-blank": {"python_env.yaml": "dependencies: ['-rSECRET']"},
    "url": {"python_env.yaml": "dependencies: ['-r file://SECRET']"},
    "upper-case-url": {"python_env.yaml": "dependencies: ['-r FILE://SECRET']"},
    "encoded-url": {"python_env.yaml": "dependencies: ['-r file://%2FSECRET']"},
    "constraint": {"python_env.yaml": "dependencies: ['-c SECRET']"},
    "build": {"python_env.yaml": "build_dependencies: ['-r SECRET']"},
    "nested": {"python_env.yaml": "dependencies: ['-r a.txt']", "a.txt": "-r SECRET\n"},
    "link": {"python_env.yaml": "dependencies: ['-r a.txt']", "a.txt": "-> SECRET"},
    "environ": {"python_env.yaml": "dependencies: ['-r a.txt']", "a.txt": "-> /proc/self/environ"},
    "find-links": {"python_env.yaml": "dependencies: ['-f SECRET']"},
    "package": {"python_env.yaml": "dependencies: ['PACKAGE']"},
    "editable": {"python_env.yaml": "dependencies: ['-e PACKAGE']"},
    "direct": {"python_env.yaml": "dependencies: ['x @ file://PACKAGE']"},
    "repository": {"python_env.yaml": "dependencies: ['x @ git+file://PACKAGE@main']"},
    "conda-pip": {"conda.yaml": "dependencies: [python=3.11, {pip: ['-r SECRET']}]"},
    "conda-channel": {"conda.yaml": "channels: [PACKAGE]\ndependencies: [python=3.11]"},
    "conda-channel-url": {"conda.yaml": "dependencies: ['file://PACKAGE::python=3.11']"},
    "python-env-link": {"python_env.yaml": "-> SECRET"},
    "conda-link": {"conda.yaml": "-> SECRET"},
    "lock-link": {"pyproject.toml": "[project]\nname='a'\n", "uv.lock": "-> SECRET"},
    "pyproject-link": {"uv.lock": "version = 1\n", "pyproject.toml": "-> SECRET"},
    "lock-package": {
        "pyproject.toml": "[project]\nname='a'\n",
        "uv.lock": "version = 1\n[[package]]\nname='b'\nsource={editable='PACKAGE'}\n",
    },
    "named": {"MLproject": "python_env: SECRET\nentry_points: {main: {command: 'true'}}\n"},
    "named-relative": {"MLproject": "conda_env: ../../databrickscfg\nentry_points: {main: {command: 'true'}}\n"},
    "project-file": {"MLproject": "-> SECRET"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_file_outside_of_a_fetched_project_is_refused_and_not_read(name: str, project: Path, secret: Path) -> None:
    write_links(project, secret, ENVIRONMENTS[name])
    if "link" not in name and "file" not in name:
        # Reading it would take for ever.
        for file in [secret, secret.parent / "package" / "pyproject.toml"]:
            file.unlink()
            os.mkfifo(file)
    said = problems_of(project, project.parent)
    assert "out of the project's files" in said or "outside of the project's files" in said
    assert MARK not in said


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_file_outside_of_a_local_project_is_never_quoted(name: str, project: Path, secret: Path) -> None:
    if name in {"python-env-link", "conda-link", "project-file", "pyproject-link", "lock-link"} or "named" in name:
        return  # The user's own project, whose files may be links.
    write_links(project, secret, ENVIRONMENTS[name])
    assert MARK not in problems_of(project, None)


def test_file_of_the_same_repository_or_of_a_local_neighbour_is_read(project: Path) -> None:
    (project.parent / "common.txt").write_text("six==1.17.0\n")
    write_links(project, project, {"python_env.yaml": "dependencies: ['-r ../common.txt', '-e ../lib']"})
    (project.parent / "lib").mkdir()
    assert problems_of(project, project.parent) == ""
    assert problems_of(project, None) == ""
    assert "outside of the project's files" in problems_of(project, project)


def check(project: Path, root: Path | None, backend: str, **options: object) -> None:
    request = RunRequest(uri=str(project), backend=backend, **options)  # type: ignore[arg-type]
    copy = WorkingCopy(project, str(project), "git" if root else "local", "source", root=root)
    check_request(request, copy, context_before_run(request, Secret("databricks"), RunSecrets()))


def test_local_project_on_a_remote_backend_sends_no_file_from_outside(project: Path, secret: Path) -> None:
    options = {"backend_config": {"existing-cluster-id": "0-1-x"}}
    write_links(project, secret, {"python_env.yaml": "dependencies: ['-r SECRET']"})
    with pytest.raises(ExecutionException, match="outside of the project's files") as caught:
        check(project, None, "databricks", **options)
    assert MARK not in str(caught.value)
    write_links(project, secret, {"python_env.yaml": "-> SECRET"})
    with pytest.raises(ExecutionException, match="outside of the project's files") as caught:
        check(project, None, "databricks", **options)
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(
    "default",
    [
        "/etc/shadow",
        "../../databrickscfg",
        "file:///etc/hostname",
        "local:///etc/hostname",
        "simplecache::file:///etc/hostname",
    ],
)
def test_path_default_outside_of_a_fetched_project_is_not_mounted(
    default: str, project: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    parameter = f"p: {{type: path, default: '{default}'}}"
    content = f"entry_points: {{main: {{command: 'cat {{p}}', parameters: {{{parameter}}}}}}}\n"
    (project / "MLproject").write_text(content)
    # A command that runs here has the account of its user anyway.
    check(project, project.parent, "local")
    (project / "MLproject").write_text(f"{content}docker_env: {{image: busybox}}\n")
    with pytest.raises(ParameterError, match="outside of the project's files"):
        check(project, project.parent, "local")
    check(project, project.parent, "local", parameters={"p": "/etc/hostname"})
    check(project, None, "local")


def test_job_template_of_the_project_that_is_a_link_is_not_read(project: Path, secret: Path) -> None:
    from prefect_mlprojects.backends.kubernetes.config import load_template, parse_kubernetes_config

    (project / "job-template.yaml").symlink_to(secret)
    config = parse_kubernetes_config({"kube-job-template-path": "job-template.yaml"})
    with pytest.raises(ExecutionException, match="leads out of the project") as caught:
        load_template(config, project)
    assert MARK not in str(caught.value)


def test_device_in_a_package_does_not_hang_its_digest(project: Path) -> None:
    (project / "lib").mkdir()
    (project / "lib" / "setup.py").symlink_to("/dev/zero")
    (project / "python_env.yaml").write_text("dependencies: ['./lib']")
    assert problems_of(project, None) == ""
    assert replace(load_project(project), root=project).allows(project / "lib")
