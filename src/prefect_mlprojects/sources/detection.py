"""Which kind of source a URI names: one pure, ordered decision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prefect_mlprojects._redaction import mask_text
from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources.base import Source
from prefect_mlprojects.sources.folders import apply_subdirectory, nearest
from prefect_mlprojects.sources.local import LocalSource

ACCEPTED_FORMS = (
    "a local folder (absolute, relative to the working directory, or beginning with ~) or file:///path/to/folder, "
    "each with an optional #sub/directory"
)
"""What this version can fetch, for error messages."""

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+(?:://|::)")
_SCP_ADDRESS = re.compile(r"^[^/\s:]+@[^/\s:]+:.")


def detect_source(uri: str, version: str | None = None, *, base: Path | None = None) -> Source:
    """Recognises where a project is; looks at names and folders only, and changes nothing.

    A folder that exists wins over every other reading of the URI. ``#`` divides the folder from the subdirectory; a
    folder whose own name holds a ``#`` is found too.

    Args:
        uri: The project's URI as the user gave it; quotes around it are dropped, as MLflow drops them.
        version: A branch, tag or commit; None or empty for what is there.
        base: What relative paths are relative to; by default the working directory.

    Raises:
        FetchError: The URI has no form that this version accepts, the folder or its subdirectory does not exist or is
            not a folder, the subdirectory leads out of it, or a version was asked of a folder.
    """
    text = uri.strip().strip("'\"")
    shown = mask_text(text)
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
    found = next((reading for reading in _readings(text, base) if _exists(*reading)), None)
    if found is None:
        raise _nothing_there(text, shown, base)
    folder, subdirectory = found
    apply_subdirectory(folder, subdirectory, shown)
    if version:
        raise FetchError(
            f"A version ({version!r}) can only be asked of a git project, and {shown!r} is a local folder. "
            "Leave the version out to run the folder as it is.",
            uri=shown,
        )
    return LocalSource(folder=folder, subdirectory=subdirectory, uri=shown)


def _readings(text: str, base: Path) -> Iterator[tuple[Path, str]]:
    """The ways to divide a text into a folder and a subdirectory, likeliest first."""
    cuts = [match.start() for match in re.finditer("#", text)]
    for cut in cuts:
        folder = _local_path(text[:cut], base)
        if folder is not None:
            yield folder, text[cut + 1 :]
    whole = _local_path(text, base)
    if whole is not None:
        yield whole, ""


def _local_path(text: str, base: Path) -> Path | None:
    if text.lower().startswith("file://"):
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
        return folder.is_dir() and (folder / subdirectory.lstrip("/")).is_dir()
    except (OSError, ValueError):
        return False


def _nothing_there(text: str, shown: str, base: Path) -> FetchError:
    """Says as exactly as possible why no reading of the text is a folder."""
    readings = list(_readings(text, base))
    for folder, subdirectory in readings:
        if subdirectory and _exists(folder, ""):
            try:
                apply_subdirectory(folder, subdirectory, shown)
            except FetchError as error:
                return error
    whole = text.partition("#")[0]
    for folder, _ in readings:
        # os.path.isfile, unlike Path.is_file, is False for names that are too long.
        if os.path.isfile(folder) and not whole.lower().endswith(".zip"):  # noqa: PTH113
            return FetchError(
                f"{str(folder)!r} is a file, not a folder. Give the project's folder: {str(folder.parent)!r}.",
                uri=shown,
            )
    if whole.lower().startswith("file://"):
        if not readings:
            return FetchError(
                f"{shown!r} names another machine; a file:// URI has three slashes: file:///path.", uri=shown
            )
    elif whole.lower().endswith(".zip") or _SCHEME.match(whole) or _SCP_ADDRESS.match(whole):
        return FetchError(f"{shown!r} can't be fetched: this version runs {ACCEPTED_FORMS}.", uri=shown)
    folder = readings[0][0] if readings else Path(whole)
    return FetchError(f"The project folder {str(folder)!r} does not exist{nearest(folder)}", uri=shown)
