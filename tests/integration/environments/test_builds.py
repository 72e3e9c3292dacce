"""Real environments, built by real tools from packages that need no index."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments import PreparedEnvironment
from prefect_mlprojects.environments.managers import environment_manager, list_environments, prune_environments
from prefect_mlprojects.environments.python.installers import downloadable_version
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import EnvironmentManagerName, StopSignal

MANAGERS: tuple[EnvironmentManagerName, ...] = ("uv", "virtualenv")
OFFLINE = {"python_env.yaml": "dependencies: [--no-index, ./tiny]\n"}


def offline_project(kit: Any, workshop: Any, **files: str) -> Any:
    return workshop.project({**kit.package("tiny"), **OFFLINE, **files})


@pytest.mark.parametrize("manager", MANAGERS)
def test_requirements_of_every_kind_are_installed(workshop: Any, kit: Any, manager: EnvironmentManagerName) -> None:
    project = workshop.project(
        {
            **kit.package("helper"),
            **kit.package("tiny"),
            **kit.package("live"),
            **kit.package("linked"),
            "python_env.yaml": (
                "build_dependencies: [--no-index, ./helper]\n"
                "dependencies:\n  - -r deps/requirements.txt\n  - -e ./live\n"
            ),
            "deps/requirements.txt": "--no-index\n-r more.txt  # beside this file\n-c limits.txt\n",
            "deps/more.txt": "./tiny\nlinked @ file://${DEMO_PROJECT}/linked\n",
            "deps/limits.txt": "six<1\n",
        }
    )
    os.environ["DEMO_PROJECT"] = str(project.directory)
    try:
        environment = workshop.prepare(project, manager)
    finally:
        del os.environ["DEMO_PROJECT"]
    assert not environment.reused
    assert environment.plan.description.startswith(f"{manager}, Python ")
    location = environment.plan.location
    script = "import sys, helper, tiny, live, linked; print(sys.prefix); print(live.__file__); print(tiny.__file__)"
    prefix, live, tiny = workshop.run(environment, f'python -c "{script}"').splitlines()
    assert Path(prefix) == location
    assert Path(live) == project.directory / "live/src/live.py"
    assert Path(tiny).is_relative_to(location)
    assert workshop.run(environment, "tiny-hello; echo $VIRTUAL_ENV") == f"hello from one\n{location}"
    assert workshop.run(environment, "command -v pip") == f"{location}/bin/pip"
    assert not (project.directory / ".venv").exists()


@pytest.mark.parametrize("manager", MANAGERS)
def test_second_prepare_reuses_environment_and_runs_nothing(
    workshop: Any, kit: Any, manager: EnvironmentManagerName
) -> None:
    project = offline_project(kit, workshop)
    first = workshop.prepare(project, manager)
    workshop.lines.clear()
    assert environment_manager(manager).plan(project) == first.plan
    second = workshop.prepare(project, manager)
    assert second.reused
    assert (second.plan, second.variables) == (first.plan, first.variables)
    assert workshop.lines == []
    assert (project.directory / "tiny/builds.log").read_text().count("built") == 1


@pytest.mark.parametrize("manager", MANAGERS)
def test_changed_code_of_a_local_package_is_installed(workshop: Any, kit: Any, manager: EnvironmentManagerName) -> None:
    project = offline_project(kit, workshop)
    first = workshop.prepare(project, manager)
    # Nothing else changes: uv would go on using the wheel that it made from the same pyproject.toml.
    code = project.directory / "tiny/src/tiny.py"
    code.write_text(code.read_text().replace("one", "two"))
    second = workshop.prepare(project, manager)
    assert second.plan.key != first.plan.key
    assert [workshop.run(each, "tiny-hello") for each in (first, second)] == ["hello from one", "hello from two"]


def test_identical_files_in_another_directory_share_environment(workshop: Any, kit: Any) -> None:
    files = {**kit.package("tiny"), **OFFLINE}
    first = workshop.prepare(workshop.project(files, "one"))
    second = workshop.prepare(workshop.project(files, "two"))
    assert second.reused
    assert second.plan.location == first.plan.location


def test_managers_do_not_share(workshop: Any) -> None:
    project = workshop.project({})
    assert len({workshop.prepare(project, manager).plan.key for manager in MANAGERS}) == 2


@pytest.mark.parametrize("manager", MANAGERS)
def test_project_without_environment_files_gets_empty_environment(
    workshop: Any, manager: EnvironmentManagerName
) -> None:
    environment = workshop.prepare(workshop.project({}), manager)
    assert environment.plan.python_version == "{}.{}.{}".format(*sys.version_info[:3])
    listed = workshop.run(environment, "python -m pip list --format freeze --disable-pip-version-check").split()
    assert {line.split("==")[0] for line in listed} <= {"pip", "setuptools", "wheel"}
    assert workshop.run(environment, "python -c 'import prefect_mlprojects' 2>&1 || true").endswith(
        "'prefect_mlprojects'"
    )


def test_conda_file_under_uv_installs_pip_section_and_warns(workshop: Any, kit: Any) -> None:
    conda = "dependencies:\n  - numpy=1.26\n  - pip\n  - pip:\n    - --no-index\n    - ./tiny\n"
    project = workshop.project({**kit.package("tiny"), "conda.yaml": conda.replace("  - pip\n", "")})
    environment = workshop.prepare(project)
    assert workshop.run(environment, "tiny-hello") == "hello from one"
    assert any("numpy=1.26" in warning for warning in environment.plan.warnings)


@pytest.mark.parametrize("manager", MANAGERS)
def test_unavailable_requirement_reports_resolver_error_and_leaves_nothing(
    workshop: Any, manager: EnvironmentManagerName
) -> None:
    project = workshop.project({"python_env.yaml": "dependencies: [--no-index, nosuchpackage==9.9]\n"})
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(project, manager)
    assert caught.value.manager == manager
    assert f"'demo' can't be built: {manager} failed installing the dependencies (exit code 1)" in str(caught.value)
    assert any("nosuchpackage" in line for line in caught.value.output_tail)
    assert "nosuchpackage" in str(caught.value)
    assert any("nosuchpackage" in line for line in workshop.lines)
    assert workshop.leftovers() == []


@pytest.mark.parametrize("manager", MANAGERS)
def test_build_on_full_disk_reports_full_disk(workshop: Any, kit: Any, manager: EnvironmentManagerName) -> None:
    project = offline_project(kit, workshop, **{"tiny/fail": "[Errno 28] No space left on device"})
    with pytest.raises(EnvironmentBuildError, match="The disk is full"):
        workshop.prepare(project, manager)
    assert workshop.leftovers() == []


def test_failed_build_is_retried_on_next_prepare(workshop: Any, kit: Any) -> None:
    project = offline_project(kit, workshop, **{"tiny/fail": "not today"})
    with pytest.raises(EnvironmentBuildError, match="not today"):
        workshop.prepare(project)
    (project.directory / "tiny/fail").unlink()
    assert workshop.run(workshop.prepare(project), "tiny-hello") == "hello from one"


def test_rebuild_replaces_environment_and_keeps_one_in_use(workshop: Any, kit: Any) -> None:
    project = offline_project(kit, workshop)
    first = workshop.prepare(project)
    again = workshop.prepare(project, rebuild=True)
    assert not again.reused
    assert again.plan.key == first.plan.key
    assert again.plan.location != first.plan.location
    assert workshop.run(first, "tiny-hello") == workshop.run(again, "tiny-hello") == "hello from one"
    assert workshop.prepare(project).plan.location == again.plan.location


def test_damaged_environment_is_rebuilt(workshop: Any, kit: Any) -> None:
    project = offline_project(kit, workshop)
    first = workshop.prepare(project)
    (first.plan.location / "bin" / "python").unlink()
    assert not environment_manager("uv").plan(project).ready
    assert workshop.run(workshop.prepare(project), "tiny-hello") == "hello from one"


def test_stopping_ends_the_build_and_leaves_nothing(workshop: Any, kit: Any) -> None:
    project = offline_project(kit, workshop, **{"tiny/hang": ""})
    stop = StopSignal()

    def report(line: str) -> None:
        if "Building tiny" in line:
            stop.request("cancelled in the UI")

    with pytest.raises(EnvironmentBuildError, match=r"was stopped \(cancelled in the UI\)"):
        workshop.prepare(project, stop=stop, report=report)
    assert workshop.leftovers() == []
    with pytest.raises(EnvironmentBuildError, match="was stopped"):
        workshop.prepare(project, stop=stop)


def test_prune_keeps_environment_in_use_and_removes_released_one(workshop: Any, kit: Any) -> None:
    environment = workshop.prepare(offline_project(kit, workshop))
    assert [kept.key for kept in prune_environments(everything=True).kept] == [environment.plan.key]
    (listed,) = list_environments()
    assert (listed.project, listed.location, listed.in_use) == ("demo", environment.plan.location, True)
    assert listed.size > 100_000
    kit.release_environment(environment)
    kit.release_environment(environment)
    assert [gone.key for gone in prune_environments(everything=True).removed] == [environment.plan.key]
    assert list_environments() == ()


def test_package_from_index_is_installed(workshop: Any) -> None:
    environment = workshop.prepare(workshop.project({"python_env.yaml": "dependencies: [iniconfig]\n"}))
    assert workshop.run(environment, "python -c 'import iniconfig; print(iniconfig.__name__)'") == "iniconfig"


@pytest.mark.parametrize("manager", MANAGERS)
def test_pip_variables_of_caller_apply_to_both_managers(
    workshop: Any, kit: Any, manager: EnvironmentManagerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "UV_DEFAULT_INDEX",
        "UV_INDEX",
        "UV_INDEX_URL",
        "UV_EXTRA_INDEX_URL",
        "UV_FIND_LINKS",
        "UV_CONFIG_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workshop.root / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_TARGET", str(workshop.root / "elsewhere"))
    environment = workshop.prepare(
        workshop.project({**kit.package("tiny"), "python_env.yaml": "dependencies: [./tiny]\n"}), manager
    )
    assert workshop.run(environment, "tiny-hello") == "hello from one"
    with pytest.raises(EnvironmentBuildError, match="iniconfig"):
        workshop.prepare(workshop.project({"python_env.yaml": "dependencies: [iniconfig]\n"}, "two"), manager)


@pytest.mark.parametrize("manager", MANAGERS)
def test_passwords_that_a_tool_prints_are_not_shown(workshop: Any, kit: Any, manager: EnvironmentManagerName) -> None:
    project = offline_project(kit, workshop, **{"tiny/fail": "can't reach https://user:s3cret@example.org/simple"})
    with pytest.raises(EnvironmentBuildError, match=r"https://user:\*\*\*@example.org/simple") as caught:
        workshop.prepare(project, manager)
    assert "s3cret" not in "\n".join((str(caught.value), *caught.value.output_tail, *workshop.lines))


def test_passwords_of_an_index_are_not_shown(workshop: Any) -> None:
    text = "dependencies:\n  - --index-url http://user:s3cret@127.0.0.1:9/simple\n  - nosuchpackage\n"
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(workshop.project({"python_env.yaml": text}))
    assert "127.0.0.1:9" in str(caught.value)
    assert "s3cret" not in "\n".join((str(caught.value), *caught.value.output_tail, *workshop.lines))


LOCKED = """\
[project]
name = "demo"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["tiny"]

[dependency-groups]
dev = ["helper"]

[tool.uv.sources]
tiny = { path = "tiny", editable = true }
helper = { path = "helper" }
"""


def test_locked_project_is_installed_from_uv_lock(workshop: Any, kit: Any) -> None:
    files = {**kit.package("tiny"), **kit.package("helper"), "pyproject.toml": LOCKED}
    project = workshop.project(files)
    kit.lock(project.directory)
    before = sorted(path.name for path in project.directory.iterdir())
    environment = workshop.prepare(project)
    assert environment.plan.description.endswith("locked by uv.lock")
    assert workshop.run(environment, "tiny-hello; command -v pip").splitlines() == [
        "hello from one",
        f"{environment.plan.location}/bin/pip",
    ]
    assert "helper" not in workshop.run(environment, "python -m pip list")
    assert sorted(path.name for path in project.directory.iterdir()) == before
    assert workshop.prepare(project).reused
    code = project.directory / "tiny/src/tiny.py"
    code.write_text(code.read_text().replace("one", "two"))
    changed = workshop.prepare(project)
    assert not changed.reused
    assert workshop.run(changed, "tiny-hello") == "hello from two"
    assert workshop.run(environment, "tiny-hello") == "hello from one"


def test_invalid_lock_reports_uv_error(workshop: Any) -> None:
    project = workshop.project({"pyproject.toml": "[project]\nname = 'demo'\n", "uv.lock": "version = 1\n"})
    with pytest.raises(EnvironmentBuildError, match=r"uv failed installing what uv.lock says"):
        workshop.prepare(project)
    assert workshop.leftovers() == []


@pytest.fixture
def no_pythons(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose only Python is the running one."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYENV_ROOT", str(workshop.root / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(workshop.root / "uv-pythons"))


@pytest.mark.usefixtures("no_pythons")
@pytest.mark.parametrize("manager", MANAGERS)
def test_unavailable_python_version_lists_found_interpreters(workshop: Any, manager: EnvironmentManagerName) -> None:
    project = workshop.project({"python_env.yaml": "# a comment\npython: '3.99'\n"})
    with pytest.raises(EnvironmentBuildError) as caught:
        environment_manager(manager).plan(project)
    message = str(caught.value)
    assert f"There is no Python 3.99, which {project.directory}/python_env.yaml:2 asks for." in message
    assert "{}.{}.{} (".format(*sys.version_info[:3]) in message
    assert "uv python install 3.99" in message


@pytest.mark.usefixtures("no_pythons")
def test_failed_python_download_reports_uv_error(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", f"file://{workshop.root}/no-mirror")
    project = workshop.project({"python_env.yaml": "python: '3.8'\n"})
    plan = environment_manager("uv").plan(project)
    assert plan.python_version == downloadable_version("3.8", os.environ)
    assert plan.python_version is not None
    assert plan.python_version.startswith("3.8.")
    assert "uv will download this Python" in plan.description
    with pytest.raises(EnvironmentBuildError, match=r"(?s)There is no Python 3.8.*uv could not download it.*no-mirror"):
        workshop.prepare(project)
    assert workshop.leftovers() == []
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    with pytest.raises(EnvironmentBuildError, match=r"There is no Python 3\.8"):
        environment_manager("uv").plan(project)


@pytest.mark.usefixtures("no_pythons")
def test_unavailable_python_patch_suggests_downloadable_version(workshop: Any) -> None:
    nearest = downloadable_version("3.8", os.environ)
    project = workshop.project({"python_env.yaml": "python: '3.8.99'\n"})
    with pytest.raises(EnvironmentBuildError) as caught:
        environment_manager("uv").plan(project)
    assert f"The nearest that can be had is {nearest}, which uv downloads: write {nearest} or 3.8" in str(caught.value)


@pytest.mark.parametrize("manager", MANAGERS)
def test_one_sided_python_range_in_conda_file_is_built(workshop: Any, manager: EnvironmentManagerName) -> None:
    minor = "{}.{}".format(*sys.version_info[:2])
    project = workshop.project({"conda.yaml": f"dependencies: ['python>={minor}.0', pip]\n"})
    environment = workshop.prepare(project, manager)
    assert workshop.run(environment, "python --version").startswith(f"Python {minor}.")


def test_prepared_environment_hides_tools_of_calling_environment(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", os.pathsep.join((scripts, os.environ["PATH"])))
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PYTHONPATH", str(workshop.root))
    (workshop.root / "leak.py").touch()
    environment: PreparedEnvironment = workshop.prepare(workshop.project({}))
    found = workshop.run(environment, "command -v pytest || echo none", cwd=Path("/"))
    assert found != f"{scripts}/pytest"
    assert workshop.run(environment, "python -c 'import leak' 2>&1 || true", cwd=Path("/")).endswith(
        "No module named 'leak'"
    )


def test_missing_project_directory_raises_build_error(workshop: Any, kit: Any) -> None:
    project = workshop.project({})
    project.directory.rmdir()
    with pytest.raises(EnvironmentBuildError, match="could not be started in"):
        workshop.prepare(project)
    assert workshop.leftovers() == []
