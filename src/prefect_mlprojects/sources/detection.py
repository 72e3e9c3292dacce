"""Local folders as sources, and which kind of source a URI names: one pure, ordered decision."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prefect_mlprojects._support.files import list_directory, may_access
from prefect_mlprojects._support.redaction import redact_url
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.sources.base import (
    Source,
    SourceKind,
    WorkingCopy,
    apply_subdirectory,
    check_trusted,
    nearest_folder,
)
from prefect_mlprojects.sources.git import GitCredentialsLookup, GitUrl, parse_git_url
from prefect_mlprojects.sources.git.facts import find_repository, read_git_facts
from prefect_mlprojects.sources.git.source import GitSource
from prefect_mlprojects.sources.zip_archive import ZipSource
from prefect_mlprojects.types import StopSignal

_ACCEPTED_FORMS = (
    "a local folder (absolute, relative to the working directory, or beginning with ~) or file:///path; "
    "a git repository as https://, http://, ssh://, git://, git+https://…, file:///path or [user@]host:path; "
    "or a .zip archive, local or behind any protocol of fsspec (https://, s3://, gs://, …); "
    "each with an optional #sub/directory"
)
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+(?:://|::)")


@dataclass(frozen=True)
class LocalSource:
    """A folder of this machine, which runs in place."""

    folder: Path
    subdirectory: str
    uri: str

    @property
    def kind(self) -> SourceKind:
        """``local``."""
        return "local"

    def fetch(self, stop: StopSignal, report: Callable[[str], None]) -> WorkingCopy:
        """Returns the folder itself, with its commit if git is installed and knows it; see ``Source``."""
        if stop.requested:
            raise SourceUnavailableError(f"Fetching {self.uri!r} was stopped.", uri=self.uri)
        if not self.folder.is_dir():
            raise FetchError(f"The project folder {str(self.folder)!r} does not exist any more.", uri=self.uri)
        directory = apply_subdirectory(self.folder, self.subdirectory, self.uri)
        if not may_access(directory, os.R_OK | os.X_OK):
            raise SourceUnavailableError(
                f"The project folder {str(directory)!r} can't be read: permission denied. Check its owner and mode.",
                uri=self.uri,
            )
        facts = read_git_facts(directory, report)
        found = dataclasses.asdict(facts) if facts else {"source_name": str(directory)}
        return WorkingCopy(directory=directory, uri=self.uri, kind="local", **found)

    def remove(self, copy: WorkingCopy) -> None:
        """Does nothing: the folder is the user's own."""


def detect_source(
    uri: str,
    version: str | None = None,
    *,
    base: Path | None = None,
    git_credentials: GitCredentialsLookup | None = None,
) -> Source:
    """Detects the source that a URI names; only looks at names and folders.

    Precedence: an existing folder or zip archive; a remote ``.zip``; a git repository. ``#`` separates the subdirectory, which may
    begin and end with a slash; a folder with a ``#`` in its own name is found too. A folder runs in place, except as a git
    repository when it is a bare one, with a version, or when it is the top of one and named by ``git+file://``. Relative paths
    are relative to `base`, by default the working directory. Quotes around the URI are dropped, as in MLflow.

    Raises:
        FetchError: The URI has no accepted form, the folder or subdirectory does not exist or leads out of the project, a version
            was given for a plain folder or zip archive, or the source is not trusted.
    """
    text = uri.strip().strip("'\"")
    shown = redact_url(text)
    try:
        base = base or Path.cwd()
    except FileNotFoundError:
        raise FetchError(
            f"{shown!r} can't be found: the working directory does not exist any more.", uri=shown
        ) from None
    if problem := _malformed(text):
        raise FetchError(f"The project's URI {shown!r} is {problem}. Give {_ACCEPTED_FORMS}.", uri=shown)
    version = version or None
    if version is not None and (version.startswith("-") or re.search(r"[\x00-\x20\ud800-\udfff]", version)):
        raise FetchError(f"{version!r} is no version of {shown!r}: name a branch, a tag or a commit.", uri=shown)
    readings = list(_readings(text, base))
    source = (
        _folder(text, readings, shown, version, git_credentials)
        or _local_zip(readings, shown, version)
        or _remote(text, shown, version, git_credentials)
    )
    if source is None:
        raise _not_found(text, readings, shown)
    return source


def _malformed(text: str) -> str:
    """Returns what is wrong with a URI that is neither a path nor a URL, or ""."""
    if not text or "\0" in text:
        return "empty" if not text else "not a path"
    is_url = _SCHEME.match(text) is not None
    try:
        # A path may have bytes that are no text, which Python keeps as surrogates.
        text.encode(errors="strict" if is_url else "surrogateescape")
        if is_url:
            _ = urlsplit(text.partition("#")[0]).port
    except UnicodeError:
        return "no text: it has half of a UTF-16 pair"
    except ValueError as error:
        return f"no URL: {error}"
    return ""


_Reading = tuple[Path, str]
"""A folder and a subdirectory of it."""


def _folder(
    text: str, readings: list[_Reading], shown: str, version: str | None, credentials: GitCredentialsLookup | None
) -> Source | None:
    found = next((reading for reading in readings if _exists(*reading)), None)
    bare = next((reading for reading in readings if _is_bare(reading[0])), None)
    as_git = text.lower().startswith("git+")
    if bare is not None and (found is None or found[0] == bare[0]):
        check_trusted(str(bare[0]), shown)
        return GitSource(GitUrl(bare[0].as_uri()), bare[1], version, shown, credentials)
    if found is None:
        if version is None and not as_git:
            return None
        # The subdirectory may be in the requested version, but not in the checkout.
        repositories = (each for each in readings if each[1] and _exists(each[0]) and (each[0] / ".git").exists())
        if (found := next(repositories, None)) is None:
            return None
        check_trusted(str(found[0]), shown)
        return GitSource(GitUrl(found[0].as_uri()), found[1], version, shown, credentials)
    folder, subdirectory = found
    apply_subdirectory(folder, subdirectory, shown)
    check_trusted(str(folder), shown)
    if version is None:
        if as_git and (folder / ".git").exists():
            return GitSource(GitUrl(folder.as_uri()), subdirectory, None, shown, credentials)
        return LocalSource(folder, subdirectory, shown)
    top = find_repository(folder)
    if top is None:
        raise FetchError(
            f"A version ({version!r}) can only be asked of a git project, and {shown!r} is a local folder that is in no git "
            "repository. Leave the version out to run the folder as it is.",
            uri=shown,
        )
    below = folder.relative_to(top) / subdirectory
    return GitSource(GitUrl(top.as_uri()), "" if str(below) == "." else below.as_posix(), version, shown, credentials)


def _local_zip(readings: list[_Reading], shown: str, version: str | None) -> Source | None:
    for file, subdirectory in readings:
        # os.path.isfile, unlike Path.is_file, is False for names that are too long.
        if file.suffix.lower() == ".zip" and os.path.isfile(file):  # noqa: PTH113
            return _zip(file, subdirectory, shown, version)
    return None


def _remote(text: str, shown: str, version: str | None, credentials: GitCredentialsLookup | None) -> Source | None:
    address, _, subdirectory = text.partition("#")
    subdirectory = subdirectory.strip("/")
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    if scheme == "file":
        return None
    if scheme and not scheme.startswith("git+") and urlsplit(address).path.lower().endswith(".zip"):
        return _zip(address, subdirectory, shown, version)
    url = parse_git_url(address)
    if url is None or (url.scp and address.lower().endswith(".zip")):
        return None
    check_trusted(url.url, shown)
    return GitSource(url, subdirectory, version, shown, credentials)


def _zip(location: Path | str, subdirectory: str, shown: str, version: str | None) -> Source:
    check_trusted(str(location), shown)
    if version is not None:
        raise FetchError(
            f"A version ({version!r}) can only be asked of a git project, and {shown!r} is a zip archive.", uri=shown
        )
    return ZipSource(location, subdirectory, shown)


def _is_bare(folder: Path) -> bool:
    """Returns whether a folder is a bare repository, by the entries that git itself looks for, and not a project."""
    is_bare = _exists(folder, "objects") and _exists(folder, "refs") and (folder / "HEAD").is_file()
    return is_bare and not any(entry.name.lower() == "mlproject" for entry in list_directory(folder))


def _readings(text: str, base: Path) -> Iterator[_Reading]:
    """Yields the ways to split a text into a folder and a subdirectory, likeliest first."""
    for cut in (match.start() for match in re.finditer("#", text)):
        if (folder := _local_path(text[:cut], base)) is not None:
            yield folder, text[cut + 1 :].strip("/")
    if (folder := _local_path(text, base)) is not None:
        yield folder, ""


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
    # abspath, as MLflow: ".." is removed from the text, and symbolic links keep the name that the user gave.
    return Path(os.path.abspath(base / path))  # noqa: PTH100


def _exists(folder: Path, subdirectory: str = "") -> bool:
    try:
        return folder.is_dir() and (folder / subdirectory).is_dir()
    except (OSError, ValueError):
        return False


def _not_found(text: str, readings: list[_Reading], shown: str) -> FetchError:
    """Returns the most exact error for a text that names no source."""
    for folder, subdirectory in readings:
        if subdirectory and _exists(folder):
            try:
                apply_subdirectory(folder, subdirectory, shown)
            except FetchError as error:
                return error
    address = text.partition("#")[0].lower()
    file = next((folder for folder, _ in readings if os.path.isfile(folder)), None)  # noqa: PTH113 - as above
    folder = readings[0][0] if readings else Path(text.partition("#")[0])
    if file is not None:
        message = f"{str(file)!r} is a file, not a folder. Give the project's folder: {str(file.parent)!r}."
    elif address.startswith("file://") and not readings:
        message = f"{shown!r} names another machine; a file:// URI has three slashes: file:///path."
    elif address.endswith(".zip") and not address.startswith("file://"):
        message = f"The zip archive {str(folder)!r} does not exist."
    elif _SCHEME.match(address) and not address.startswith("file://"):
        message = f"{shown!r} can't be fetched. Give {_ACCEPTED_FORMS}."
    else:
        message = f"The project folder {str(folder)!r} does not exist{nearest_folder(folder)}"
    return FetchError(message, uri=shown)
