"""How the user has set up pip and uv: where packages come from, and what decides which of them are chosen.

A Python environment is made by uv where MLflow uses pip, and the result is to be the same. uv does not read pip's
settings, so those that name indexes, proxies and certificates are handed to uv in its own words, unless the user has
set uv up as well.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from prefect_mlprojects._support.process.run import ToolResult, run_tool
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments.python.requirements import digest_file
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal

# Settings that would send an installation elsewhere than into the environment being built, or install something else.
_MISLEADING = frozenset(
    (
        *(
            "PIP_TARGET",
            "PIP_PREFIX",
            "PIP_ROOT",
            "PIP_USER",
            "PIP_PYTHON",
            "PIP_DRY_RUN",
            "PIP_REQUIREMENT",
            "PIP_EDITABLE",
        ),
        *(
            "UV_SYSTEM_PYTHON",
            "UV_PYTHON",
            "UV_PROJECT",
            "UV_PROJECT_ENVIRONMENT",
            "UV_WORKING_DIR",
            "UV_WORKING_DIRECTORY",
        ),
        *("UV_TARGET", "UV_PREFIX", "UV_NO_SYNC", "UV_FROZEN", "UV_LOCKED", "UV_ISOLATED", "UV_DRY_RUN", "UV_ENV_FILE"),
        *("UV_VENV_SEED", "UV_VENV_CLEAR", "UV_VENV_RELOCATABLE", "UV_NO_EDITABLE"),
        *("VIRTUALENV_PYTHON", "VIRTUALENV_SYSTEM_SITE_PACKAGES", "VIRTUALENV_CLEAR"),
    )
)

# Settings that decide which packages are chosen or how they are built, so they are part of an environment's key.
# Addresses of indexes are not: they hold passwords, and an index's mirror has the same packages.
_DECIDING = (
    *("PIP_PRE", "PIP_NO_BINARY", "PIP_ONLY_BINARY", "PIP_NO_DEPS", "PIP_NO_BUILD_ISOLATION"),
    *(
        "UV_PRERELEASE",
        "UV_RESOLUTION",
        "UV_EXCLUDE_NEWER",
        "UV_NO_BINARY",
        "UV_NO_BUILD",
        "UV_NO_SOURCES",
        "UV_TORCH_BACKEND",
    ),
)
_DECIDING_FILES = ("PIP_CONSTRAINT", "UV_CONSTRAINT", "UV_OVERRIDE")

_UV_INDEX_SETTINGS = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_CONFIG_FILE",
)


def build_variables(environ: Mapping[str, str], activated: Mapping[str, str]) -> dict[str, str]:
    """The variables of an installer: the environment being built as activated, and the user's settings that fit.

    Returns:
        The whole environment of the installer.
    """
    variables = {name: value for name, value in activated.items() if name not in _MISLEADING}
    # There is nobody to answer a question: not pip's, nor git's for a password.
    variables.setdefault("GIT_TERMINAL_PROMPT", "0")
    variables["PIP_NO_INPUT"] = "1"
    variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    variables["PYTHONUNBUFFERED"] = "1"
    for name, value in uv_settings_from_pip(environ).items():
        variables.setdefault(name, value)
    return variables


def uv_arguments(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Options for uv that stand for pip's settings which uv knows no variable for."""
    return (
        ("--no-index",) if _is_true(_pip_settings(environ).get("no-index", "")) and not _has_uv_indexes(environ) else ()
    )


def uv_settings_from_pip(environ: Mapping[str, str]) -> dict[str, str]:
    """Pip's settings, from its variables and files, in uv's words.

    With more than one index uv is told to choose versions as pip does, the best of all indexes, instead of from the
    first index that has the package.

    Returns:
        Variables for uv. Indexes are left out when the user has named some to uv.
    """
    pip = _pip_settings(environ)
    found: dict[str, str] = {}
    if not _has_uv_indexes(environ):
        found["UV_DEFAULT_INDEX"] = pip.get("index-url", "")
        found["UV_EXTRA_INDEX_URL"] = " ".join(pip.get("extra-index-url", "").split())
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match" if found["UV_EXTRA_INDEX_URL"] else ""
        found["UV_FIND_LINKS"] = ",".join(link for link in pip.get("find-links", "").split() if _is_usable_link(link))
    found["UV_INSECURE_HOST"] = " ".join(pip.get("trusted-host", "").split())
    found["UV_HTTP_TIMEOUT"] = pip.get("timeout") or pip.get("default-timeout", "")
    found["UV_CONSTRAINT"] = " ".join(pip.get("constraint", "").split())
    found["UV_PRERELEASE"] = "allow" if _is_true(pip.get("pre", "")) else ""
    found["SSL_CERT_FILE"] = pip.get("cert", "")
    found["SSL_CLIENT_CERT"] = pip.get("client-cert", "")
    if proxy := pip.get("proxy", ""):
        found["ALL_PROXY"] = proxy if "://" in proxy else f"http://{proxy}"
    return {name: value for name, value in found.items() if value}


def deciding_settings(environ: Mapping[str, str], manager: str, project: Path) -> tuple[str, ...]:
    """What of the user's settings decides an environment's content, for its key.

    Returns:
        Texts to hash.
    """
    facts = [f"{name}={environ[name]}" for name in _DECIDING if environ.get(name)]
    for name in _DECIDING_FILES:
        facts.extend(f"{name} {digest_file(Path(file))}" for file in environ.get(name, "").split())
    if manager == "uv":
        configuration = uv_configuration(project)
        if configuration is not None:
            facts.append(f"uv configuration {digest_file(configuration)}")
    return tuple(facts)


def uv_configuration(directory: Path) -> Path | None:
    """The configuration file that uv reads when it works in a folder.

    See https://docs.astral.sh/uv/concepts/configuration-files/.

    Args:
        directory: The folder, absolute.

    Returns:
        The nearest ``uv.toml``, or ``pyproject.toml`` with a ``[tool.uv]`` table, there or above; None when there is
        none.
    """
    for folder in (directory, *directory.parents):
        if (folder / "uv.toml").is_file():
            return folder / "uv.toml"
        try:
            if b"[tool.uv" in (folder / "pyproject.toml").read_bytes():
                return folder / "pyproject.toml"
        except OSError:
            continue
    return None


def _has_uv_indexes(environ: Mapping[str, str]) -> bool:
    if any(environ.get(name) for name in _UV_INDEX_SETTINGS):
        return True
    home = _user_configuration(environ)
    return any(
        path.is_file() for path in (home / "uv" / "uv.toml", Path("/etc/uv/uv.toml"), Path("/etc/xdg/uv/uv.toml"))
    )


def _user_configuration(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".config")


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Pip's settings, from its files and variables; see https://pip.pypa.io/en/stable/topics/configuration/."""
    settings: dict[str, str] = {}
    named = environ.get("PIP_CONFIG_FILE")
    if named != os.devnull:
        home = Path(environ.get("HOME") or "~").expanduser()
        files = [
            *(
                Path(folder) / "pip" / "pip.conf"
                for folder in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
                if folder
            ),
            *(Path("/etc/pip.conf"), home / ".pip" / "pip.conf", home / "Library/Application Support/pip/pip.conf"),
            *(_user_configuration(environ) / "pip" / "pip.conf", *((Path(named),) if named else ())),
        ]
        for file in files:
            settings.update(_read_pip_file(file))
    settings.update(
        {
            name[4:].lower().replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("PIP_") and value
        }
    )
    return settings


def _read_pip_file(file: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
        # pip itself will complain of it; uv does not read it.
        return {}
    values: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            values.update({name.replace("_", "-"): value for name, value in parser.items(section)})
    return values


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


def _is_usable_link(link: str) -> bool:
    """Whether uv takes a ``find-links`` value; unlike pip, it fails on a folder that is not there."""
    scheme = urlsplit(link).scheme
    return Path(urlsplit(link).path).exists() if scheme in ("", "file") else True


def uv_executable() -> str:
    """The path of the ``uv`` program that comes with the ``uv`` package, or else of one on PATH.

    Raises:
        EnvironmentBuildError: There is none.
    """
    from uv import find_uv_bin

    try:
        return find_uv_bin()
    except FileNotFoundError as error:
        found = shutil.which("uv")
        if found is not None:
            return found
        raise EnvironmentBuildError(
            "The program uv is missing although the Python package uv is installed; run "
            "'pip install --force-reinstall uv'.",
            manager="uv",
        ) from error


def downloadable_version(request: str, environ: Mapping[str, str]) -> str | None:
    """The newest version of a Python that uv knows how to download; uv's list is built in, so no network is asked.

    Returns:
        The version, or None when uv knows none or the user has forbidden downloads (``UV_PYTHON_DOWNLOADS=never``).
    """
    if environ.get("UV_PYTHON_DOWNLOADS") == "never" or environ.get("UV_NO_PYTHON_DOWNLOADS"):
        return None
    lines: list[str] = []
    command = [uv_executable(), "python", "list", "--only-downloads", "--offline", "--output-format", "json", request]
    result = run_tool(command, cwd=None, env=build_variables(environ, environ), report=lines.append, stop=StopSignal())
    if result.exit_code != 0:
        return None
    # Warnings come on stderr, which shares the lines.
    document = next((line for line in lines if line.startswith("[")), "[]")
    try:
        offers = json.loads(document)
    except ValueError:
        return None
    versions = [
        offer["version_parts"]
        for offer in offers
        if offer.get("implementation") == "cpython" and offer.get("variant", "default") == "default"
    ]
    newest = max(((v["major"], v["minor"], v["patch"]) for v in versions), default=None)
    return None if newest is None else "{}.{}.{}".format(*newest)


def download_python(
    version: str, environ: Mapping[str, str], report: Callable[[str], None], stop: StopSignal
) -> ToolResult:
    """Lets uv download a Python into the folder where it keeps them.

    Returns:
        How uv ended.
    """
    variables = build_variables(environ, environ)
    # uv would put a link to it into ~/.local/bin, which is not asked for.
    variables["UV_PYTHON_INSTALL_BIN"] = "0"
    command = [uv_executable(), "python", "install", "--color", "never", version]
    return run_tool(command, cwd=None, env=variables, report=lambda line: report(redact(line)), stop=stop)
