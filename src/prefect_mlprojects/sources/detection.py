"""Which kind of source a URI names: one pure, ordered decision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.base import Source, apply_subdirectory, nearest_folder
from prefect_mlprojects.sources.git.credentials import GitCredentialsLookup
from prefect_mlprojects.sources.git.source import GitSource
from prefect_mlprojects.sources.git.urls import GitUrl, parse_git_url
from prefect_mlprojects.sources.local import LocalSource, check_trusted
from prefect_mlprojects.sources.zip_archive import ZipSource

ACCEPTED_FORMS = (
    "a local folder (absolute, relative to the working directory, or beginning with ~) or file:///path; "
    "a git repository as https://, http://, ssh://, git://, git+https://…, file:///path or [user@]host:path; "
    "or a .zip archive, local or behind any protocol of fsspec (https://, s3://, gs://, …); "
    "each with an optional #sub/directory"
)
"""What can be fetched, for error messages."""

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+(?:://|::)")


def detect_source(
    uri: str,
    version: str | None = None,
    *,
    base: Path | None = None,
    git_credentials: GitCredentialsLookup | None = None,
) -> Source:
    """Recognises where a project is; looks at names and folders only, and changes nothing.

    The order: a folder or zip archive that exists here; a ``.zip`` elsewhere; a git repository. ``#`` divides the place from
    the subdirectory, which may begin and end with a slash; a folder whose own name holds a ``#`` is found too. A folder runs in place, but as a git repository when it
    is a bare one, when a version of it is asked for, or when it is the top of one and named by ``git+file://``.

    Args:
        uri: The project's URI as the user gave it; quotes around it are dropped, as MLflow drops them.
        version: A branch, tag or commit; None or empty for what is there (a folder) or the default branch (a repository).
        base: What relative paths are relative to; by default the working directory.
        git_credentials: Finds credentials for git repositories; None leaves that to git.

    Raises:
        FetchError: The URI has no form that is accepted, the folder or its subdirectory does not exist or is not a folder, the
            subdirectory leads out of it, a version was asked of a plain folder or a zip archive, or the source is not trusted.
    """
    text = uri.strip().strip("'\"")
    shown = redact(text)
    try:
        base = base or Path.cwd()
    except FileNotFoundError:
        raise FetchError(
            f"{shown!r} can't be found: the working directory does not exist any more.", uri=shown
        ) from None
    if not text or "\0" in text:
        raise FetchError(
            f"The project's URI {shown!r} is {'empty' if not text else 'not a path'}. Give {ACCEPTED_FORMS}.", uri=shown
        )
    version = version or None
    _check_version(version, shown)
    source = (
        _folder(text, shown, version, base, git_credentials)
        or _local_zip(text, shown, version, base)
        or _elsewhere(text, shown, version, git_credentials)
    )
    if source is None:
        raise _nothing_there(text, shown, base)
    return source


def _check_version(version: str | None, shown: str) -> None:
    if version is not None and (version.startswith("-") or any(ord(letter) < 33 for letter in version)):
        raise FetchError(f"{version!r} is no version of {shown!r}: name a branch, a tag or a commit.", uri=shown)


def _folder(
    text: str, shown: str, version: str | None, base: Path, credentials: GitCredentialsLookup | None
) -> Source | None:
    found = next((reading for reading in _readings(text, base) if _exists(*reading)), None)
    bare = next((reading for reading in _readings(text, base) if _is_bare(reading[0])), None)
    if bare is not None and (found is None or found[0] == bare[0]):
        check_trusted(str(bare[0]), shown)
        return GitSource(GitUrl(bare[0].as_uri()), bare[1], version, shown, credentials)
    if found is None:
        return _version_only(text, shown, version, base, credentials)
    folder, subdirectory = found
    apply_subdirectory(folder, subdirectory, shown)
    check_trusted(str(folder), shown)
    if version is None:
        if text.lower().startswith("git+") and (folder / ".git").exists():
            return GitSource(GitUrl(folder.as_uri()), subdirectory, None, shown, credentials)
        return LocalSource(folder=folder, subdirectory=subdirectory, uri=shown)
    top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), None)
    if top is None:
        raise FetchError(
            f"A version ({version!r}) can only be asked of a git project, and {shown!r} is a local folder that is in no git "
            "repository. Leave the version out to run the folder as it is.",
            uri=shown,
        )
    below = folder.relative_to(top) / subdirectory
    return GitSource(GitUrl(top.as_uri()), "" if str(below) == "." else below.as_posix(), version, shown, credentials)


def _version_only(
    text: str, shown: str, version: str | None, base: Path, credentials: GitCredentialsLookup | None
) -> Source | None:
    """A repository whose subdirectory is in the version that is asked for, but not in the checkout."""
    if version is None and not text.lower().startswith("git+"):
        return None
    for folder, subdirectory in _readings(text, base):
        if subdirectory and _exists(folder, "") and (folder / ".git").exists():
            check_trusted(str(folder), shown)
            return GitSource(GitUrl(folder.as_uri()), subdirectory, version, shown, credentials)
    return None


def _local_zip(text: str, shown: str, version: str | None, base: Path) -> Source | None:
    for file, subdirectory in _readings(text, base):
        # os.path.isfile, unlike Path.is_file, is False for names that are too long.
        if file.suffix.lower() == ".zip" and os.path.isfile(file):  # noqa: PTH113
            check_trusted(str(file), shown)
            _refuse_version_of_zip(version, shown)
            return ZipSource(file, subdirectory, shown)
    return None


def _elsewhere(text: str, shown: str, version: str | None, credentials: GitCredentialsLookup | None) -> Source | None:
    place, _, subdirectory = text.partition("#")
    subdirectory = subdirectory.strip("/")
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme == "file":
        return None
    if scheme and not scheme.startswith("git+") and urlsplit(place).path.lower().endswith(".zip"):
        check_trusted(place, shown)
        _refuse_version_of_zip(version, shown)
        return ZipSource(place, subdirectory, shown)
    url = parse_git_url(place)
    if url is None or (url.scp and place.lower().endswith(".zip")):
        return None
    check_trusted(url.url, shown)
    return GitSource(url, subdirectory, version, shown, credentials)


def _refuse_version_of_zip(version: str | None, shown: str) -> None:
    if version is not None:
        raise FetchError(
            f"A version ({version!r}) can only be asked of a git project, and {shown!r} is a zip archive.", uri=shown
        )


def _is_bare(folder: Path) -> bool:
    """Returns whether a folder is a bare repository, by what git itself looks for."""
    try:
        return (folder / "HEAD").is_file() and (folder / "objects").is_dir() and (folder / "refs").is_dir()
    except (OSError, ValueError):
        return False


def _readings(text: str, base: Path) -> Iterator[tuple[Path, str]]:
    """The ways to divide a text into a folder and a subdirectory, likeliest first."""
    cuts = [match.start() for match in re.finditer("#", text)]
    for cut in cuts:
        folder = _local_path(text[:cut], base)
        if folder is not None:
            yield folder, text[cut + 1 :].strip("/")
    whole = _local_path(text, base)
    if whole is not None:
        yield whole, ""


def _local_path(text: str, base: Path) -> Path | None:
    if text.lower().startswith(("file://", "git+file://")):
        parts = urlsplit(text.replace("#", "%23").replace("?", "%3F"))
        if parts.netloc not in ("", "localhost"):
            return None
        text = unquote(parts.path)
    if not text:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        # "~name" of a user that does not exist: an ordinary name.
        path = Path(text)
    # abspath, as MLflow: ".." is taken off the text, and symbolic links keep the name that the user gave.
    return Path(os.path.abspath(base / path))  # noqa: PTH100


def _exists(folder: Path, subdirectory: str) -> bool:
    try:
        return folder.is_dir() and (folder / subdirectory).is_dir()
    except (OSError, ValueError):
        return False


def _nothing_there(text: str, shown: str, base: Path) -> FetchError:
    """Says as exactly as possible why no reading of the text is a source."""
    readings = list(_readings(text, base))
    for folder, subdirectory in readings:
        if subdirectory and _exists(folder, ""):
            try:
                apply_subdirectory(folder, subdirectory, shown)
            except FetchError as error:
                return error
    whole = text.partition("#")[0]
    for folder, _ in readings:
        if os.path.isfile(folder):  # noqa: PTH113
            return FetchError(
                f"{str(folder)!r} is a file, not a folder. Give the project's folder: {str(folder.parent)!r}.",
                uri=shown,
            )
    if whole.lower().startswith("file://"):
        if not readings:
            return FetchError(
                f"{shown!r} names another machine; a file:// URI has three slashes: file:///path.", uri=shown
            )
    elif whole.lower().endswith(".zip"):
        return FetchError(f"The zip archive {str(readings[0][0])!r} does not exist.", uri=shown)
    elif _SCHEME.match(whole):
        return FetchError(f"{shown!r} can't be fetched. Give {ACCEPTED_FORMS}.", uri=shown)
    folder = readings[0][0] if readings else Path(whole)
    return FetchError(f"The project folder {str(folder)!r} does not exist{nearest_folder(folder)}", uri=shown)
