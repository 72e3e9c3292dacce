"""The solution of a conda environment, written beside it, so that people can see and repeat it."""

from __future__ import annotations

import re
from pathlib import Path

import rattler
from rattler.lock import LockChannel, LockPlatform

from prefect_mlprojects._support.redaction import strip_user_info
from prefect_mlprojects.environments.conda.channels import public_url
from prefect_mlprojects.environments.conda.recipe import CondaRecipe

_URL = re.compile(r"(?:https?|s3|gcs|oci|file)://[^\s'\"]+")


def lock_file(location: Path) -> Path:
    """Where the solution of an environment lies: beside its folder."""
    return location.with_name(f"{location.name}.lock.yml")


def pip_lock_file(location: Path) -> Path:
    """Where the versions that the pip section got are written, in the format of a requirements file."""
    return location.with_name(f"{location.name}.requirements.txt")


def write_lock(location: Path, recipe: CondaRecipe, records: tuple[rattler.RepoDataRecord, ...]) -> Path:
    """Writes which conda packages an environment holds, from where and with their hashes, as a lock file of rattler.

    Pixi and ``rattler`` read the format (https://docs.rs/rattler_lock). Passwords and tokens are left out.

    Returns:
        The file.

    Raises:
        OSError: It can't be written.
    """
    platform = LockPlatform(recipe.configuration.subdir)
    lock = rattler.LockFile([platform])
    lock.set_channels("default", [LockChannel(public_url(url)) for url in recipe.channels])
    for record in records:
        lock.add_conda_package("default", platform, record)
    file = lock_file(location)
    lock.to_path(file)
    text = file.read_text(encoding="utf-8")
    clean = _URL.sub(lambda match: public_url(strip_user_info(match[0])), text)
    if clean != text:
        file.write_text(clean, encoding="utf-8")
    return file


def installed_by_pip(location: Path) -> frozenset[tuple[str, str]]:
    """The names and versions of Python packages in an environment that no conda package brought."""
    from importlib.metadata import distributions

    conda = {file.name for file in (location / "conda-meta").glob("*.json")}
    folders = [str(folder) for folder in (location / "lib").glob("python*/site-packages")]
    found = set()
    for distribution in distributions(path=folders):
        installer = (distribution.read_text("INSTALLER") or "").strip()
        name, version = distribution.metadata["Name"], distribution.version
        if name and installer != "conda" and not any(file.startswith(f"{name}-{version}-") for file in conda):
            found.add((str(name), str(version)))
    return frozenset(found)


def write_pip_lock(location: Path, packages: frozenset[tuple[str, str]]) -> None:
    """Writes which versions the pip section got.

    Raises:
        OSError: It can't be written.
    """
    lines = sorted(f"{name}=={version}\n" for name, version in packages)
    pip_lock_file(location).write_text("".join(lines), encoding="utf-8")
