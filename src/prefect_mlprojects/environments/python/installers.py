"""The installers uv, virtualenv and pip: the user's settings for them, and their steps of a build.

uv builds environments where MLflow uses pip, with the same result. uv does not read pip's settings, so those for
indexes, proxies and certificates are translated for uv, unless the user has configured uv as well.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from prefect_mlprojects._support.files import write_private
from prefect_mlprojects._support.process.run import ToolResult, run_tool
from prefect_mlprojects._support.process_folders import private_folder
from prefect_mlprojects._support.redaction import holds_secret, redact
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.environments import Build
from prefect_mlprojects.environments.cache import Report
from prefect_mlprojects.environments.python.files import digest_credentials, digest_file, read_toml
from prefect_mlprojects.environments.python.interpreters import Interpreter
from prefect_mlprojects.environments.python.requirements import RequirementSet, expand_variables
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.sources.git import credential_settings
from prefect_mlprojects.sources.git.program import configure
from prefect_mlprojects.types import StopSignal

if TYPE_CHECKING:
    from prefect_mlprojects.environments.python import PythonSpecification

# Settings that would install something else, or into another folder than the environment.
_MISLEADING = re.compile(
    r"PIP_(TARGET|PREFIX|ROOT|USER|PYTHON|DRY_RUN|REQUIREMENT|EDITABLE)|VIRTUALENV_(PYTHON|SYSTEM_SITE_PACKAGES|CLEAR)"
    r"|UV_(SYSTEM_PYTHON|PYTHON|PROJECT(_ENVIRONMENT)?|WORKING_DIR(ECTORY)?|TARGET|PREFIX|NO_SYNC|FROZEN|LOCKED|ISOLATED"
    r"|DRY_RUN|ENV_FILE|VENV_(SEED|CLEAR|RELOCATABLE)|NO_EDITABLE)"
)

# Settings that determine which packages are chosen or how they are built, and so belong to the cache key. Addresses of
# indexes don't: they hold passwords, and a mirror has the same packages.
_KEY_SETTINGS = (
    *("PIP_PRE", "PIP_NO_BINARY", "PIP_ONLY_BINARY", "PIP_NO_DEPS", "PIP_NO_BUILD_ISOLATION", "UV_PRERELEASE"),
    *("UV_RESOLUTION", "UV_EXCLUDE_NEWER", "UV_NO_BINARY", "UV_NO_BUILD", "UV_NO_SOURCES", "UV_TORCH_BACKEND"),
)
_KEY_FILES = ("PIP_CONSTRAINT", "UV_CONSTRAINT", "UV_OVERRIDE")
_UV_INDEX_LOGIN = re.compile(r"UV_INDEX_\w+_(USERNAME|PASSWORD)")
_UV_INDEX_SETTING = re.compile(r"UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CONFIG_FILE)")


def build_variables(
    environ: Mapping[str, str], activated: Mapping[str, str], *, with_indexes: bool = True
) -> dict[str, str]:
    """Returns an installer's variables: those of the activated environment with the user's settings that apply."""
    variables = {name: value for name, value in activated.items() if not _MISLEADING.fullmatch(name)}
    # Nobody can answer a question: not pip's, nor git's for a password.
    fixed = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    settings = uv_settings_from_pip(environ, with_indexes=with_indexes)
    return {"GIT_TERMINAL_PROMPT": "0", **settings, **variables, **fixed}


def uv_arguments(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Returns uv's options for those of pip's settings that no variable of uv expresses."""
    no_index = _is_true(_pip_settings(environ).get("no-index", "")) and not _has_uv_indexes(environ)
    return ("--no-index",) if no_index else ()


def uv_settings_from_pip(environ: Mapping[str, str], *, with_indexes: bool = True) -> dict[str, str]:
    """Translates pip's settings to variables of uv, without indexes if the user has configured some for uv."""
    # Lists have one item a line in a file.
    pip = {name: " ".join(value.split()) for name, value in _pip_settings(environ).items()}
    proxy = pip.get("proxy", "")
    found = {
        "UV_INSECURE_HOST": pip.get("trusted-host"),
        "UV_HTTP_TIMEOUT": pip.get("timeout") or pip.get("default-timeout"),
        "UV_CONSTRAINT": pip.get("constraint"),
        "UV_PRERELEASE": "allow" if _is_true(pip.get("pre", "")) else None,
        "SSL_CERT_FILE": pip.get("cert"),
        "SSL_CLIENT_CERT": pip.get("client-cert"),
        "ALL_PROXY": proxy if "://" in proxy or not proxy else f"http://{proxy}",
    }
    if not _has_uv_indexes(environ):
        links = pip.get("find-links", "").split()
        found["UV_FIND_LINKS"] = ",".join(filter(_is_usable_link, links))
        if with_indexes:
            found |= {"UV_DEFAULT_INDEX": pip.get("index-url"), "UV_EXTRA_INDEX_URL": pip.get("extra-index-url")}
            # As pip does: the best version of all indexes, not that of the first index that has the package.
            found["UV_INDEX_STRATEGY"] = "unsafe-best-match" if pip.get("extra-index-url") else None
    return {name: value for name, value in found.items() if value}


def key_settings(environ: Mapping[str, str], manager: str, project: Path) -> tuple[str, ...]:
    """Returns the user's settings that belong to the cache key."""
    texts = [f"{name}={environ[name]}" for name in _KEY_SETTINGS if environ.get(name)]
    for name in _KEY_FILES:
        texts.extend(f"{name} {digest_file(Path(file))}" for file in environ.get(name, "").split())
    if manager == "uv" and (configuration := uv_configuration(project)) is not None:
        texts.append(f"uv configuration {digest_file(configuration)}")
    return (*texts, *digest_credentials(index_credentials(environ)))


def index_credentials(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the user's settings for pip and uv that hold credentials for an index."""
    urls = [_pip_settings(environ).get(name, "") for name in ("index-url", "extra-index-url", "find-links")]
    urls += [environ[name] for name in sorted(environ) if _UV_INDEX_SETTING.fullmatch(name)]
    own = [environ[name] for name in sorted(environ) if _UV_INDEX_LOGIN.fullmatch(name)]
    return (*filter(holds_secret, urls), *filter(None, own))


def uv_configuration(directory: Path) -> Path | None:
    """Returns the file that uv reads: https://docs.astral.sh/uv/concepts/configuration-files/."""
    for folder in (directory, *directory.parents):
        if (folder / "uv.toml").is_file():
            return folder / "uv.toml"
        if (folder / "pyproject.toml").is_file():
            document = read_toml(folder / "pyproject.toml")
            tools = document.get("tool") if isinstance(document, dict) else None
            if isinstance(tools, dict) and "uv" in tools:
                return folder / "pyproject.toml"
    return None


def _has_uv_indexes(environ: Mapping[str, str]) -> bool:
    folders = (_user_configuration(environ), Path("/etc"), Path("/etc/xdg"))
    named = any(value and _UV_INDEX_SETTING.fullmatch(name) for name, value in environ.items())
    return named or any((folder / "uv" / "uv.toml").is_file() for folder in folders)


def _user_configuration(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".config")


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns pip's settings from its files and variables; see https://pip.pypa.io/en/stable/topics/configuration/."""
    found: dict[str, str] = {}
    named = environ.get("PIP_CONFIG_FILE")
    if named != os.devnull:
        home = Path(environ.get("HOME") or "~").expanduser()
        shared = filter(None, environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":"))
        files = [
            *(Path(folder) / "pip" / "pip.conf" for folder in shared),
            *(Path("/etc/pip.conf"), home / ".pip" / "pip.conf", home / "Library/Application Support/pip/pip.conf"),
            *(_user_configuration(environ) / "pip" / "pip.conf", *((Path(named),) if named else ())),
        ]
        for file in files:
            found.update(_read_pip_file(file))
    variables = ((name, value) for name, value in environ.items() if name.startswith("PIP_") and value)
    return found | {name[4:].lower().replace("_", "-"): value for name, value in variables}


def _read_pip_file(file: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}  # pip itself will report it; uv does not read it
    sections = [section for section in ("global", "install") if parser.has_section(section)]
    return {name.replace("_", "-"): value for section in sections for name, value in parser.items(section)}


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


def _is_usable_link(link: str) -> bool:
    """Returns whether uv accepts a ``find-links`` value; unlike pip, it fails on a missing folder."""
    scheme = split_url(link).scheme
    return Path(split_url(link).path).exists() if scheme in ("", "file") else True


def uv_executable() -> str:
    """Returns the path of the ``uv`` package's program, or else of one on PATH; raises an `EnvironmentBuildError`."""
    from uv import find_uv_bin

    try:
        return find_uv_bin()
    except FileNotFoundError as error:
        if (found := shutil.which("uv")) is not None:
            return found
        message = "The program uv is missing from the Python package uv; run 'pip install --force-reinstall uv'."
        raise EnvironmentBuildError(message, manager="uv") from error


def downloadable_version(request: str, environ: Mapping[str, str]) -> str | None:
    """Returns the newest matching Python on uv's built-in list of downloads, unless the user has forbidden them."""
    if environ.get("UV_PYTHON_DOWNLOADS") == "never" or environ.get("UV_NO_PYTHON_DOWNLOADS"):
        return None
    lines: list[str] = []
    command = [uv_executable(), "python", "list", "--only-downloads", "--offline", "--output-format", "json", request]
    result = run_tool(command, cwd=None, env=build_variables(environ, environ), report=lines.append, stop=StopSignal())
    try:
        # Warnings come on stderr, which shares the lines.
        offers = json.loads(next(line for line in lines if line.startswith("["))) if result.exit_code == 0 else []
    except (StopIteration, ValueError):
        return None
    versions = [
        tuple(offer["version_parts"][part] for part in ("major", "minor", "patch"))
        for offer in offers
        if offer.get("implementation") == "cpython" and offer.get("variant", "default") == "default"
    ]
    return "{}.{}.{}".format(*max(versions)) if versions else None


def download_python(version: str, environ: Mapping[str, str], report: Report, stop: StopSignal) -> ToolResult:
    """Makes uv download a Python into the folder where it keeps them."""
    # By default uv would put a link to it into ~/.local/bin.
    variables = build_variables(environ, environ) | {"UV_PYTHON_INSTALL_BIN": "0"}
    command = [uv_executable(), "python", "install", "--color", "never", version]
    return _run_redacted(command, None, variables, report, stop)


def _run_redacted(
    command: Sequence[str], cwd: Path | None, env: Mapping[str, str], report: Report, stop: StopSignal
) -> ToolResult:
    result = run_tool(command, cwd=cwd, env=env, report=lambda line: report(redact(line)), stop=stop)
    return ToolResult(result.exit_code, tuple(map(redact, result.output_tail)))


def run_step(build: Build, step: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Runs an installer in the project's folder, with the project's settings; `step` is what it does, for an error."""
    build.check_stop()
    folder = build.project.directory
    try:
        result = _run_redacted(command, folder, variables, build.report, build.stop)
    except OSError as error:
        cause = f"{command[0]} could not be started in {folder}: {error.strerror or error}"
        raise build.failure(cause) from error
    build.check_stop()
    if result.exit_code != 0:
        cause = f"{build.manager} failed {step} (exit code {result.exit_code})."
        raise build.failure(cause, result.output_tail)


def build_with_uv(
    build: Build, specification: PythonSpecification, interpreter: Interpreter, activated: Mapping[str, str]
) -> None:
    """Builds an environment with uv."""
    contents, python = specification.contents, str(interpreter.path)
    variables = build_variables(os.environ, activated)
    if contents.locked is not None:
        command = [uv_executable(), "sync", "--color", "never", "--frozen", "--no-dev", "--no-editable"]
        local = (package.name for package in contents.locked if package.installed and package.path.is_dir())
        command += [f"--reinstall-package={name}" for name in local]
        command += ["--no-python-downloads", *uv_arguments(os.environ), "--python", python]
        sync_variables = {**variables, "UV_PROJECT_ENVIRONMENT": str(build.location)}
        del sync_variables["VIRTUAL_ENV"]  # uv would warn that it is not the project's .venv
        run_step(build, "installing what uv.lock says", command, sync_variables)
    else:
        command = [uv_executable(), "venv", "--quiet", "--color", "never", "--no-project", "--no-python-downloads"]
        run_step(build, "creating it", [*command, "--python", python, str(build.location)], variables)
    _seed(build, interpreter.version, variables)
    # With a lock both are empty.
    install_with_uv(build, "build_dependencies", contents.build, activated)
    install_with_uv(build, "dependencies", contents.run, activated)


def build_with_virtualenv(
    build: Build, specification: PythonSpecification, interpreter: Interpreter, activated: Mapping[str, str]
) -> None:
    """Builds an environment with virtualenv and pip."""
    contents = specification.contents
    # virtualenv is installed with this package, so it runs with our own interpreter and variables.
    command = [sys.executable, "-m", "virtualenv", "--no-periodic-update", "--python", str(interpreter.path)]
    run_step(build, "creating it", [*command, str(build.location)], build_variables(os.environ, os.environ))
    installer = [_python(build), "-m", "pip", "install", "--progress-bar", "off"]
    if specification.private:
        installer.append("--no-cache-dir")  # a cached package would be given to somebody with another password, or none
    variables = build_variables(os.environ, activated)
    _install(build, "build_dependencies", contents.build, installer, variables)
    _install(build, "dependencies", contents.run, installer, variables)


def install_with_uv(build: Build, name: str, requirements: RequirementSet, activated: Mapping[str, str]) -> None:
    """Installs requirements with uv; an option that uv ignores in a file, which only a remote one may hold, is an error."""
    installer = [uv_executable(), "pip", "install", "--color", "never", "--python", _python(build)]
    # uv reuses the wheel of a local folder until its pyproject.toml, setup.py or setup.cfg changes.
    names = [package.name for package in requirements.local_packages if not package.editable]
    if requirements.private or index_credentials(os.environ):
        installer.append(
            "--refresh"
        )  # an index that asks for a password must see this one before its cached pages are used
    installer += ["--reinstall"] if None in names else [f"--reinstall-package={name}" for name in names]
    ignored: list[str] = []

    def report(line: str) -> None:
        build.report(line)
        if "Ignoring unsupported option" in line:
            ignored.append(redact(line))

    variables = _uv_variables(requirements, activated)
    _install(replace(build, report=report), name, requirements, [*installer, *uv_arguments(os.environ)], variables)
    if ignored:
        cause = "a requirements file has an option that uv does not have; use --env-manager virtualenv"
        raise build.failure(cause, tuple(ignored))


def _uv_variables(requirements: RequirementSet, activated: Mapping[str, str]) -> dict[str, str]:
    """Returns uv's variables with the options of a requirements file; only a strategy that the user set stays."""
    # As with pip, an index in a file replaces those of pip's settings.
    has_index = any(line.startswith("-i ") for line in requirements.lines)
    configured = build_variables(os.environ, activated, with_indexes=not has_index)
    options = dict(requirements.variables)
    if "UV_INDEX_STRATEGY" in configured:
        options.pop("UV_INDEX_STRATEGY", None)
    if "UV_INSECURE_HOST" in options:
        options["UV_INSECURE_HOST"] += f" {configured.get('UV_INSECURE_HOST', '')}"
    return configured | options


def _python(build: Build) -> str:
    return str(build.location / "bin" / "python")


def _install(
    build: Build, name: str, requirements: RequirementSet, installer: list[str], variables: Mapping[str, str]
) -> None:
    if not requirements.key_inputs:
        return
    text = requirements.file_text([link.as_uri() for link in requirements.links], "constraints.txt")
    text, git_variables = take_git_credentials(text, variables)
    # A requirement's URL, or an index's, may hold a password, so that the file is not kept with the environment.
    with private_folder() as folder:
        file = folder / f"{name}.txt"
        write_private(file, text)
        write_private(folder / "constraints.txt", "".join(f"{line}\n" for line in requirements.constraints))
        run_step(build, f"installing the {name.replace('_', ' ')}", [*installer, "-r", str(file)], git_variables)


_GIT_LOGIN = re.compile(r"(?P<scheme>git\+https?)://(?P<login>[^@/\s]+)@(?P<host>[^/\s]+)")


def take_git_credentials(text: str, variables: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Removes user names and passwords from ``git+https://`` URLs, which other users would see in the list of processes.

    Returns the text, and the variables with settings by which git finds them. A host's second login stays in its URL.
    """
    logins: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        origin = f"{match['scheme'].removeprefix('git+')}://{match['host']}"
        login = expand_variables(match["login"])
        return f"{match['scheme']}://{match['host']}" if logins.setdefault(origin, login) == login else match[0]

    text = _GIT_LOGIN.sub(take, text)
    settings, found = [], dict(variables)
    for number, (origin, login) in enumerate(logins.items()):
        user, _, password = login.partition(":")
        more, credentials = credential_settings(origin, unquote(user), unquote(password), number)
        settings += credentials
        found |= more
    configure(found, settings)
    return text, found


def _seed(build: Build, python_version: str, variables: Mapping[str, str]) -> None:
    """Installs virtualenv's pip (and setuptools for old Pythons); else ``pip`` would be another environment's."""
    from virtualenv.seed.wheels.embed import get_embed_wheel

    minor = python_version.rpartition(".")[0]
    names = ("pip",) if int(minor.partition(".")[2]) >= 12 else ("pip", "setuptools")
    wheels = [get_embed_wheel(name, minor) for name in names]
    if paths := [str(wheel.path) for wheel in wheels if wheel is not None]:
        command = [uv_executable(), "pip", "install", "--quiet", "--color", "never", "--no-index", "--no-deps"]
        run_step(build, "installing pip", [*command, "--python", _python(build), *paths], variables)
