"""Finds the Python interpreters on PATH, pyenv's and uv's; cheaply, since every run does it.

pyenv and uv name a Python's folder after its version. An interpreter on PATH is run once to get its version, which is
cached with the file's size and modification time. Scripts, such as the shims of pyenv and asdf, are skipped: they may
run anything. The package python-discovery does not find pyenv's versions outside of PATH, and takes 0.3 s to say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from prefect_mlprojects._support.files import list_directory, write_atomically
from prefect_mlprojects.environments.activation import read_json

InterpreterSource: TypeAlias = Literal["current", "PATH", "pyenv", "uv"]

# The most specific name first, so that messages say python3.11 rather than python.
_EXECUTABLE_NAMES = (*(f"python3.{minor}" for minor in range(6, 25)), "python3", "python")
_EXACT_VERSION = re.compile(r"^\d+\.\d+\.\d+$")
_VERSION_REQUEST = re.compile(r"^\d+(\.\d+){0,2}$")
_UV_NAME = re.compile(r"^cpython-(?P<version>\d+\.\d+\.\d+)-(?P<system>[^-]+)-(?P<machine>[^-]+)-")
_PROBE = (
    "import json, platform, sys; print(json.dumps([platform.python_implementation(), '%d.%d.%d' % sys.version_info[:3],"
    " sys.prefix == getattr(sys, 'base_prefix', sys.prefix), 't' in getattr(sys, 'abiflags', '')]))"
)
_PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Interpreter:
    """A Python interpreter that environments can be made from, with its version ("3.11.7") and where it was found."""

    path: Path
    version: str
    source: InterpreterSource

    @property
    def parts(self) -> tuple[int, ...]:
        """The version as numbers, to compare."""
        return tuple(int(number) for number in self.version.split("."))

    def __str__(self) -> str:
        return f"{self.version} ({self.path})"


def current_interpreter() -> Interpreter:
    """Returns the interpreter of this process; of a virtual environment, the one that it was made from."""
    # sys._base_executable would say it, but in Python 3.10 it names the environment's own.
    path = _base_of_environment(Path(sys.executable)) if sys.executable else Path(sys.base_prefix, "bin", "python3")
    return Interpreter(path, "{}.{}.{}".format(*sys.version_info[:3]), "current")


def find_interpreter(request: str | None, environ: Mapping[str, str], probes: Path) -> Interpreter | None:
    """Finds the newest interpreter that "3.11.7", "3.11" or a PEP 440 range allows; for None, the running one."""
    current = current_interpreter()
    if request is None or request == current.version:
        return current
    allowed = [each for each in list_interpreters(environ, probes) if interpreter_allowed(request, each.version)]
    return max(allowed, key=lambda each: each.parts, default=None)


def list_interpreters(environ: Mapping[str, str], probes: Path) -> tuple[Interpreter, ...]:
    """Returns each interpreter once: the running one, those on PATH, pyenv's, uv's; `probes` caches PATH's versions."""
    found: dict[str, Interpreter] = {}
    on_path = _on_path(environ, _Probes(probes))
    for interpreter in (current_interpreter(), *on_path, *_of_pyenv(environ), *_of_uv(environ)):
        found.setdefault(os.path.realpath(interpreter.path), interpreter)
    return tuple(found.values())


def interpreter_allowed(request: str, version: str) -> bool:
    """Returns whether a request allows a Python version."""
    if _VERSION_REQUEST.match(request):
        return f"{version}.".startswith(f"{request}.")
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(request).contains(version)


def _of_pyenv(environ: Mapping[str, str]) -> Iterator[Interpreter]:
    root = Path(environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    for folder in _folders(root / "versions"):
        executable = folder / "bin" / "python"
        if _EXACT_VERSION.match(folder.name) and executable.exists():
            yield Interpreter(executable, folder.name, "pyenv")


def _of_uv(environ: Mapping[str, str]) -> Iterator[Interpreter]:
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    for folder in _folders(uv_python_directory(environ)):
        match = _UV_NAME.match(folder.name)
        executable = folder / "bin" / "python3"
        if match and match["machine"] == machine and executable.exists():
            yield Interpreter(executable, match["version"], "uv")


def uv_python_directory(environ: Mapping[str, str]) -> Path:
    """Returns the folder of the Pythons that uv downloads (https://docs.astral.sh/uv/reference/storage/)."""
    default = Path(environ.get("XDG_DATA_HOME") or "~/.local/share") / "uv" / "python"
    return Path(environ.get("UV_PYTHON_INSTALL_DIR") or default).expanduser()


def _folders(parent: Path) -> list[Path]:
    return [Path(entry.path) for entry in list_directory(parent) if entry.is_dir()]


def _on_path(environ: Mapping[str, str], probes: _Probes) -> Iterator[Interpreter]:
    seen: set[str] = set()
    for folder in filter(None, (environ.get("PATH") or os.defpath).split(os.pathsep)):
        # Testing each name is faster than listing a folder such as /usr/bin.
        for executable in (Path(folder, name) for name in _EXECUTABLE_NAMES if os.access(Path(folder, name), os.X_OK)):
            base = _base_of_environment(executable)
            resolved = os.path.realpath(base)
            if resolved not in seen and (version := probes.version(base, resolved)) is not None:
                yield Interpreter(base, version, "PATH")
            seen.add(resolved)
    probes.save()


def _base_of_environment(executable: Path) -> Path:
    """Returns the interpreter that a virtual environment's Python was made from; any other Python itself."""
    try:
        text = (executable.parent.parent / "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return executable
    values = dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    home, version = values.get("home"), values.get("version_info") or values.get("version") or ""
    if not home:
        return executable
    named = Path(home, "python" + ".".join(version.split(".")[:2]))
    return named if named.exists() else Path(home, "python3")


class _Probes:
    """The versions that interpreters reported, cached in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        self._answers = read_json(file)

    def version(self, path: Path, resolved: str) -> str | None:
        """Returns the version of a CPython that environments can be made from; None for anything else."""
        try:
            status = Path(resolved).stat()
        except OSError:
            return None
        stamp = f"{status.st_size}@{status.st_mtime_ns}"
        answer = self._answers.get(resolved)
        if not (isinstance(answer, list) and len(answer) == 2 and answer[0] == stamp):
            answer = [stamp, _probe(path, resolved)]
            self._answers[resolved] = answer
            self._changed = True
        return answer[1] if isinstance(answer[1], str) else None

    def save(self) -> None:
        """Writes new answers; without write permission the interpreters are run again the next time."""
        if self._changed:
            with contextlib.suppress(OSError):
                write_atomically(self._file, json.dumps(self._answers, indent=1, sort_keys=True))


def _probe(path: Path, resolved: str) -> str | None:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    command = [str(path), "-I", "-S", "-c", _PROBE]
    try:
        with Path(resolved).open("rb") as file:
            if file.read(2) == b"#!":
                return None
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=True
        )
        implementation, version, is_base, free_threaded = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return str(version) if implementation == "CPython" and is_base and not free_threaded else None
