"""Pythons that this machine does not have, and that uv can download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping

from prefect_mlprojects._support.process.run import ToolResult, run_tool
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.environments.installers import build_variables
from prefect_mlprojects.exceptions import EnvironmentBuildError
from prefect_mlprojects.types import StopSignal


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
