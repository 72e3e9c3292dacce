"""Finds the packages that a script and its own modules import, and the requirements that install them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect_mlprojects._support.documents import read_limited

_PROBE = """\
import json
from importlib.metadata import packages_distributions, version
found = {}
for name, parts in packages_distributions().items():
    part = sorted(parts, key=lambda each: (each.lower().replace("-", "_") != name.lower(), each))[0]
    try:
        found[name] = [part, version(part)]
    except Exception:
        pass
import sys
print(json.dumps([list(sys.version_info[:3]), found]))
"""
_PROBE_SECONDS = 30

# Where the name that a program imports is not that of the package, for those that are not installed here.
_PACKAGES = {
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "Crypto": "pycryptodome",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "fitz": "PyMuPDF",
    "git": "GitPython",
    "imblearn": "imbalanced-learn",
    "jose": "python-jose",
    "jwt": "PyJWT",
    "kafka": "kafka-python",
    "magic": "python-magic",
    "MySQLdb": "mysqlclient",
    "OpenSSL": "pyOpenSSL",
    "PIL": "pillow",
    "psycopg2": "psycopg2-binary",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "usb": "pyusb",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}
_MAX_MODULES = 500  # of the project's own


def imported_names(script: Path, folder: Path) -> list[str]:
    """Returns the names that a script imports, itself or by the project's own modules; those of the standard library not."""
    names: set[str] = set()
    seen: set[Path] = set()
    pending = [script]
    while pending and len(seen) < _MAX_MODULES:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        for module in _imports(file):
            own = [*_own_modules(module, (file.parent, script.parent, folder, folder / "src"))]
            pending += own
            names |= set() if own else {module.partition(".")[0]}
    return sorted(names - sys.stdlib_module_names - {"__main__", ""}, key=str.lower)


def _imports(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(read_limited(file))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots, module = "." * node.level, node.module or ""
            yield f"{dots}{module}"
            yield from (
                f"{dots}{module}{'.' if module else ''}{each.name}" for each in node.names if node.level or module
            )


def _own_modules(module: str, folders: tuple[Path, ...]) -> Iterator[Path]:
    """Yields the project's files that a module's name stands for; a relative name begins at the first folder."""
    level = len(module) - len(module.lstrip("."))
    if level:
        folders, module = (Path(os.path.normpath(folders[0] / Path(*[".."] * (level - 1)))),), module[level:]
    parts = module.split(".") if module else []
    for folder in folders:
        for end in range(len(parts), 0, -1):
            base = folder.joinpath(*parts[:end])
            found = [each for each in (base.with_suffix(".py"), base / "__init__.py") if each.is_file()]
            if found or (base.is_dir() and end == len(parts) and any(base.glob("*.py"))):
                yield from found
                return


def installed_packages(environ: Mapping[str, str]) -> tuple[str, dict[str, tuple[str, str]]]:
    """Returns the version of the Python that PATH finds, and its packages: the name to import, that of the package, its version."""
    python = shutil.which("python", path=environ.get("PATH")) or sys.executable
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=True,
            env=dict(environ),
        )
        version, found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return "{}.{}".format(*sys.version_info[:2]), {}
    return "{}.{}".format(*version[:2]), {name: (part, number) for name, (part, number) in found.items()}


def requirements(names: list[str], installed: Mapping[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Returns the requirement of each imported name, with the version installed here, and the names that are not installed."""
    lines, missing = [], []
    for name in names:
        if name in installed:
            package, version = installed[name]
            lines.append(f"{package}=={version.partition('+')[0]}")
        else:
            lines.append(_PACKAGES.get(name, name.replace("_", "-")))
            missing.append(name)
    return sorted(set(lines), key=str.lower), missing
