"""Real conda environments, solved and installed from a channel that the tests make."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from prefect_mlprojects.environments.managers import environment_manager, list_environments, prune_environments
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal


def lock_file(location: Path) -> Path:
    """The file beside an environment that names its packages."""
    return location.with_name(f"{location.name}.lock.yml")


def failure(workshop: Any, project: Any) -> str:
    with pytest.raises(EnvironmentBuildError) as caught:
        workshop.prepare(project, "conda")
    assert caught.value.manager == "conda"
    assert workshop.leftovers() == []
    return caught.value.message


def test_python_with_packages_is_installed_and_reused(workshop: Any, conda: Any, pythons: Any, channel: Any) -> None:
    tool = {"bin/tool": f"#!{conda.PLACEHOLDER}/bin/python\nimport sys; print('tool of', sys.prefix)\n"}
    channel.add("tool", "1.2", conda.Content.of(tool, ["bin/tool"]), depends=["python"], suffix=".tar.bz2")
    text = conda.yaml([channel, pythons], f"python={conda.MINOR}", "tool=1.*")
    project = workshop.project({"conda.yaml": text})
    manager = environment_manager("conda")
    planned = manager.plan(project)
    assert not planned.ready
    assert not (workshop.cache / "environments").exists()
    environment = workshop.prepare(project, "conda")
    assert not environment.reused
    location = environment.plan.location
    assert location == planned.location
    assert environment.plan.python_version == conda.VERSION
    assert environment.plan.description == f"conda, Python {conda.VERSION}, 2 conda packages (conda.yaml)"
    assert workshop.run(environment, "python -c 'import sys, ssl; print(sys.prefix)'") == str(location)
    assert workshop.run(environment, "tool") == f"tool of {location}"
    assert workshop.run(environment, "command -v pip; pip --version").startswith(f"{location}/bin/pip\npip 2")
    assert any("tool" in line and line.startswith("Installing") for line in workshop.lines)
    again = workshop.prepare(project, "conda")
    assert again.reused
    assert again.plan.location == location
    assert manager.plan(project).ready


def test_lock_file_is_written_next_to_environment(workshop: Any, conda: Any, pythons: Any, channel: Any) -> None:
    channel.add("data", "3.1", conda.Content.of({"share/data.txt": "42"}), noarch="generic")
    project = workshop.project({"conda.yaml": conda.yaml([channel, pythons], "python", "data")})
    environment = workshop.prepare(project, "conda")
    lock = lock_file(environment.plan.location)
    assert lock.parent == environment.plan.location.parent
    text = lock.read_text()
    assert f"{channel.folder}/noarch/data-3.1-0.conda" in text
    assert "sha256" in text
    from rattler import LockFile

    names = LockFile.from_path(lock).default_environment()
    assert names is not None
    (records,) = names.conda_repodata_records().values()
    assert {record.name.normalized for record in records} == {"python", "pip", "data"}
    workshop.prepare(project, "conda", rebuild=True)
    prune_environments(everything=True)


def test_activation_is_honoured(
    workshop: Any, conda: Any, channel: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {
        "etc/conda/activate.d/b.sh": 'export LIST="${LIST:-none}:$CONDA_PREFIX"\nexport FUN="a\nb"\n',
        "etc/conda/activate.d/a.sh": "echo noise\nLOCAL=1\nexport FIRST=yes\nunset GONE\nset --\n",
        "etc/conda/env_vars.d/pkg.json": json.dumps({"FROM_PACKAGE": "package", "BOTH": "package"}),
        "bin/hello": "#!/bin/sh\necho hello $BOTH\n",
    }
    channel.add("scripts", content=conda.Content.of(files))
    text = conda.yaml([channel], "scripts", more="variables:\n  BOTH: file\n  NUMBER: 3\n")
    project = workshop.project({"conda.yaml": text})
    old = tmp_path / "old"
    (old / "etc/conda/deactivate.d").mkdir(parents=True)
    (old / "etc/conda/deactivate.d/x.sh").write_text("unset OLD\n")
    (old / "conda-meta").mkdir()
    (old / "conda-meta/state").write_text(json.dumps({"env_vars": {"OLD_STATE": "1"}}))
    for name, value in {"LIST": "mine", "GONE": "1", "OLD": "1", "OLD_STATE": "1", "PYTHONPATH": "/ours"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONDA_PREFIX", str(old))
    monkeypatch.setenv("CONDA_PREFIX_1", "/opt/base")
    monkeypatch.setenv("PATH", f"{old}/bin{os.pathsep}{os.environ['PATH']}")
    before = dict(os.environ)
    environment = workshop.prepare(project, "conda")
    assert dict(os.environ) == before
    variables = environment.variables
    location = str(environment.plan.location)
    assert variables["CONDA_PREFIX"] == variables["CONDA_DEFAULT_ENV"] == location
    assert variables["CONDA_SHLVL"] == "1"
    folders = variables["PATH"].split(os.pathsep)
    assert folders[0] == f"{location}/bin"
    assert str(old / "bin") not in folders
    assert str(Path(sys.prefix, "bin")) not in folders
    assert variables["LIST"] == f"mine:{location}"
    assert (variables["FIRST"], variables["FUN"]) == ("yes", "a\nb")
    assert (variables["FROM_PACKAGE"], variables["BOTH"], variables["NUMBER"]) == ("package", "file", "3")
    gone = ("GONE", "OLD", "OLD_STATE", "LOCAL", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX_1")
    assert not set(gone) & set(variables)
    assert not [name for name in variables if name.startswith("mlprojects") or "COOKIE" in name]
    assert environment.plan.python_version is None
    assert workshop.run(environment, "hello") == "hello file"
    assert workshop.prepare(project, "conda").reused


def test_failing_activation_script_is_named(workshop: Any, conda: Any, channel: Any) -> None:
    channel.add("bad", content=conda.Content.of({"etc/conda/activate.d/bad.sh": "echo no licence >&2\nexit 3\n"}))
    project = workshop.project({"conda.yaml": conda.yaml([channel], "bad")})
    with pytest.raises(EnvironmentBuildError, match=r"activation scripts \(bad.sh\).*exit code 3.*\n.*\n  no licence"):
        workshop.prepare(project, "conda")
    assert prune_environments(everything=True).kept == ()


def test_pip_section_is_installed_into_environment(workshop: Any, kit: Any, conda: Any, pythons: Any) -> None:
    more = "  - pip:\n    - -r deps/requirements.txt\n    - -e ./live\n"
    text = conda.yaml([pythons], "python", more=more)
    files = {
        **kit.package("tiny"),
        **kit.package("live"),
        "conda.yaml": text,
        "deps/requirements.txt": "--no-index\n./tiny\n",
    }
    project = workshop.project(files)
    environment = workshop.prepare(project, "conda")
    location = environment.plan.location
    assert environment.plan.description.endswith("1 conda package, 2 of pip (conda.yaml)")
    assert workshop.run(environment, "tiny-hello") == "hello from one"
    assert workshop.run(environment, "python -c 'import tiny; print(tiny.__file__)'").startswith(f"{location}/lib/")
    assert location.with_name(f"{location.name}.requirements.txt").read_text() == "live==1.0\ntiny==1.0\n"
    assert any("Building tiny" in line or "building tiny" in line for line in workshop.lines)
    (project.directory / "deps/requirements.txt").write_text("--no-index\n")
    other = workshop.prepare(project, "conda")
    assert other.plan.key != environment.plan.key


def test_failing_pip_section_reports_its_last_lines(workshop: Any, kit: Any, conda: Any, pythons: Any) -> None:
    text = conda.yaml([pythons], "python", more="  - pip:\n    - --no-index\n    - ./tiny\n")
    project = workshop.project({**kit.package("tiny"), "conda.yaml": text, "tiny/fail": "no compiler here"})
    message = failure(workshop, project)
    assert "conda failed installing the pip section" in message
    assert "no compiler here" in message


def test_package_conflict_reports_solver_error(workshop: Any, conda: Any, channel: Any) -> None:
    channel.add("lib", "1.0")
    channel.add("lib", "2.0")
    channel.add("one", depends=["lib >=2"])
    channel.add("two", depends=["lib <2"])
    project = workshop.project({"conda.yaml": conda.yaml([channel], "one", "two")})
    message = failure(workshop, project)
    assert f"no set of packages fits {project.directory}/conda.yaml in the channels {channel.url}" in message
    assert "lib >=2" in message
    assert "lib <2" in message


def test_unknown_package_is_named(workshop: Any, conda: Any, channel: Any) -> None:
    project = workshop.project({"conda.yaml": conda.yaml([channel], "nope>=3")})
    assert "No candidates were found for nope >=3" in failure(workshop, project)


@pytest.mark.parametrize("url", ["file:///nowhere/channel", "http://user:geheim@127.0.0.1:9/t/tk-1234/channel"])
def test_unreachable_channel_is_named_without_credentials(
    workshop: Any, conda: Any, channel: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDA_REMOTE_MAX_RETRIES", "0")
    project = workshop.project({"conda.yaml": conda.yaml([channel, url], "empty")})
    message = failure(workshop, project)
    public = url.replace("user:geheim@", "").replace("/t/tk-1234", "")
    assert f"the channel {public} can't be reached" in message
    assert "geheim" not in message + "".join(workshop.lines)
    assert "tk-1234" not in message + "".join(workshop.lines)


def test_invalid_match_spec_is_reported_with_file_and_line(workshop: Any, conda: Any, channel: Any) -> None:
    project = workshop.project({"conda.yaml": conda.yaml([channel], "empty", "lib>=1..*0")})
    with pytest.raises(EnvironmentBuildError, match=r"conda.yaml:6: 'lib>=1..\*0' is not a conda dependency"):
        environment_manager("conda").plan(project)


def test_channels_come_from_the_settings_and_their_order_counts(
    workshop: Any, conda: Any, channel: Any, tmp_path: Path
) -> None:
    channel.add("lib", "1.0")
    other = type(channel)(tmp_path / "mirror/team/other")
    other.add("lib", "2.0")
    other.add("noarch", noarch="generic")
    condarc = tmp_path / "home/.condarc"
    condarc.write_text(f"channels: [{channel.url}, team/other]\ncustom_channels:\n  team: {tmp_path}/mirror\n")
    project = workshop.project({"conda.yaml": "dependencies: [lib]\n"})

    def version() -> str:
        environment = workshop.prepare(project, "conda")
        (meta,) = (environment.plan.location / "conda-meta").glob("lib-*.json")
        return str(json.loads(meta.read_text())["version"])

    assert version() == "1.0"
    condarc.write_text(condarc.read_text() + "channel_priority: disabled\n")
    assert version() == "2.0"
    (project.directory / "conda.yaml").write_text("dependencies: [team/other::lib]\n")
    condarc.write_text(condarc.read_text().replace("priority: disabled", "priority: strict"))
    assert version() == "2.0"
    condarc.write_text(f"channel_alias: file://{tmp_path}/mirror\n")
    (project.directory / "conda.yaml").write_text("channels: [team/other, nodefaults]\ndependencies: [lib]\n")
    assert version() == "2.0"


def test_virtual_packages_can_be_overridden(
    workshop: Any, conda: Any, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel.add("gpu", depends=["__cuda >=12"])
    project = workshop.project({"conda.yaml": conda.yaml([channel], "gpu")})
    monkeypatch.setenv("CONDA_OVERRIDE_CUDA", "11.8")
    assert "__cuda" in failure(workshop, project)
    monkeypatch.setenv("CONDA_OVERRIDE_CUDA", "12.4")
    assert (workshop.prepare(project, "conda").plan.location / "conda-meta").is_dir()


def test_stop_request_interrupts_installation(workshop: Any, conda: Any, channel: Any) -> None:
    files = {f"share/many/{number}.txt": str(number) for number in range(5000)}
    channel.add("many", content=conda.Content.of(files))
    project = workshop.project({"conda.yaml": conda.yaml([channel], "many")})
    stop = StopSignal()

    def report(line: str) -> None:
        if line.startswith("Installing many"):
            threading.Thread(target=stop.request, args=["somebody"]).start()

    with pytest.raises(EnvironmentBuildError, match=r"was stopped \(somebody\)"):
        workshop.prepare(project, "conda", stop=stop, report=report)
    assert [environment for environment in list_environments() if environment.complete] == []
    assert len(list((workshop.prepare(project, "conda").plan.location / "share/many").iterdir())) == 5000


def test_corrupt_package_is_named(workshop: Any, conda: Any, channel: Any) -> None:
    channel.add("data", content=conda.Content.of({"share/data.txt": "42" * 1000}))
    (file,) = channel.folder.glob("*/data-1.0-0.conda")
    file.write_bytes(file.read_bytes().replace(b"4242", b"4343"))
    project = workshop.project({"conda.yaml": conda.yaml([channel], "data")})
    message = failure(workshop, project)
    assert "a package could not be installed: failed to fetch data-1.0-0.conda" in message
    assert "checksum" in message
