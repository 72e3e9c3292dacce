from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_mlprojects.environments.python.interpreters import (
    Interpreter,
    current_interpreter,
    find_interpreter,
    interpreter_allowed,
    list_interpreters,
    uv_python_directory,
)

MACHINE = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
CURRENT = "{}.{}.{}".format(*sys.version_info[:3])


def fake_python(path: Path) -> Path:
    """A file where pyenv or uv have a Python; it can't be run, and the search must not try."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The variables of a machine that has no Pythons except the running one."""
    return {
        "HOME": str(tmp_path),
        "PATH": str(tmp_path / "path"),
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv"),
    }


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "interpreters.json"


@pytest.mark.parametrize(
    ("request_", "version", "allowed"),
    [
        ("3.11.7", "3.11.7", True),
        ("3.11.7", "3.11.8", False),
        ("3.1", "3.11.7", False),
        ("3.11", "3.11.7", True),
        ("3", "3.11.7", True),
        ("3", "2.7.18", False),
        (">=3.10,<3.12", "3.11.7", True),
        (">=3.10,<3.12", "3.12.0", False),
        ("~=3.10.2", "3.10.13", True),
        ("==3.11.*", "3.11.7", True),
    ],
)
def test_version_request_allows_matching_interpreters_only(request_: str, version: str, allowed: bool) -> None:
    assert interpreter_allowed(request_, version) is allowed


def test_missing_request_and_current_version_select_running_python(machine: dict[str, str], probes: Path) -> None:
    assert find_interpreter(None, machine, probes) == current_interpreter()
    assert find_interpreter(CURRENT, machine, probes) == current_interpreter()
    assert current_interpreter().version == CURRENT
    assert not (current_interpreter().path.parent.parent / "pyvenv.cfg").exists()


def test_newest_pyenv_or_uv_match_is_found_without_being_run(
    machine: dict[str, str], probes: Path, tmp_path: Path
) -> None:
    for version in ("3.7.9", "3.7.16", "3.7.16t", "3.7-dev", "pypy3.7-7.3", "my-env"):
        fake_python(tmp_path / "pyenv/versions" / version / "bin/python")
    (tmp_path / "pyenv/versions/3.7.99/bin").mkdir(parents=True)
    for name in (
        f"cpython-3.7.20-linux-{MACHINE}-gnu",
        "cpython-3.7.21-linux-riscv-gnu",
        f"cpython-3.7.22+freethreaded-linux-{MACHINE}-gnu",
        f"pypy-3.7.23-linux-{MACHINE}-gnu",
        f"cpython-3.7-linux-{MACHINE}-gnu",
    ):
        fake_python(tmp_path / "uv" / name / "bin/python3")
    uvs = Interpreter(tmp_path / f"uv/cpython-3.7.20-linux-{MACHINE}-gnu/bin/python3", "3.7.20", "uv")
    assert find_interpreter("3.7", machine, probes) == uvs
    assert find_interpreter("3.7.9", machine, probes) == Interpreter(
        tmp_path / "pyenv/versions/3.7.9/bin/python", "3.7.9", "pyenv"
    )
    assert find_interpreter("<3.7.20", machine, probes) == Interpreter(
        tmp_path / "pyenv/versions/3.7.16/bin/python", "3.7.16", "pyenv"
    )
    for missing in ("3.7.99", "3.7.21", "3.6", "4", ">=3.99"):
        assert find_interpreter(missing, machine, probes) is None
    assert [found.version for found in list_interpreters(machine, probes)] == [CURRENT, "3.7.16", "3.7.9", "3.7.20"]


def test_uv_python_directory_follows_environment_variables(tmp_path: Path) -> None:
    assert uv_python_directory({"UV_PYTHON_INSTALL_DIR": "/u"}) == Path("/u")
    assert uv_python_directory({"XDG_DATA_HOME": "/data"}) == Path("/data/uv/python")
    assert uv_python_directory({}) == Path.home() / ".local/share/uv/python"


def installed_python(root: Path) -> Path:
    """A Python of its own: a copy of the running one's executable beside a link to its library."""
    base = current_interpreter().path.resolve()
    executable = root / "bin" / f"python3.{sys.version_info[1]}"
    executable.parent.mkdir(parents=True)
    shutil.copy2(base, executable)
    (root / "lib").symlink_to(base.parent.parent / "lib")
    return executable


def test_interpreter_on_path_is_probed_once_until_changed(
    machine: dict[str, str], probes: Path, tmp_path: Path
) -> None:
    executable = installed_python(tmp_path / "opt")
    (executable.parent / "python").symlink_to(executable)
    machine["PATH"] = os.pathsep.join((str(tmp_path / "nowhere"), "", str(executable.parent)))
    found = Interpreter(executable, CURRENT, "PATH")
    assert list_interpreters(machine, probes) == (current_interpreter(), found)
    ((name, (stamp, version)),) = json.loads(probes.read_text()).items()
    assert (name, version) == (str(executable), CURRENT)

    # What is remembered is believed …
    probes.write_text(json.dumps({name: [stamp, "3.7.1"]}))
    assert find_interpreter("3.7", machine, probes) == Interpreter(executable, "3.7.1", "PATH")
    # … until the file changes.
    os.utime(executable)
    assert find_interpreter("3.7", machine, probes) is None


@pytest.mark.parametrize("garbage", ["", "[]", "{", '{"x": 1}', "null"])
def test_corrupt_probe_cache_is_ignored(machine: dict[str, str], probes: Path, tmp_path: Path, garbage: str) -> None:
    executable = installed_python(tmp_path / "opt")
    machine["PATH"] = str(executable.parent)
    probes.parent.mkdir()
    probes.write_text(garbage.replace("x", str(executable)))
    assert [found.version for found in list_interpreters(machine, probes)] == [CURRENT, CURRENT]


def test_unwritable_probe_cache_does_not_prevent_listing(machine: dict[str, str], tmp_path: Path) -> None:
    executable = installed_python(tmp_path / "opt")
    machine["PATH"] = str(executable.parent)
    (tmp_path / "file").touch()
    assert len(list_interpreters(machine, tmp_path / "file" / "interpreters.json")) == 2


def test_virtual_environment_python_resolves_to_base(machine: dict[str, str], probes: Path, tmp_path: Path) -> None:
    executable = installed_python(tmp_path / "opt")
    subprocess.run([executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    machine["PATH"] = str(tmp_path / "venv" / "bin")
    assert list_interpreters(machine, probes)[1:] == (Interpreter(executable, CURRENT, "PATH"),)


def test_shims_are_not_run_and_strangers_are_passed_over(machine: dict[str, str], probes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "python3.9").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    shutil.copy2("/bin/echo", folder / "python3.10")
    (folder / "python3.11").write_bytes(b"\x7fELF, but not really")
    (folder / "python3.12").symlink_to(tmp_path / "nothing")
    (folder / "python3").mkdir()
    for name in ("python3.9", "python3.11"):
        (folder / name).chmod(0o755)
    assert list_interpreters(machine, probes) == (current_interpreter(),)
    assert not (tmp_path / "was-run").exists()
    assert {version for _, version in json.loads(probes.read_text()).values()} == {None}
