"""Remote files and folders that ``path`` parameters name: downloaded whole, or not at all."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from prefect_mlprojects import settings
from prefect_mlprojects._support.progress import ProgressSink, progress_sink
from prefect_mlprojects._support.redaction import redact
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.sources.downloads.cache import DownloadCache, StoppedError
from prefect_mlprojects.sources.downloads.remote_files import check_unchanged, fetch_item, look_at
from prefect_mlprojects.types import StopSignal

FetchArtifact: TypeAlias = Callable[[str, Path], Path]
"""Downloads what MLflow keeps into an empty folder and returns the local file or folder; it raises what MLflow raises."""

MLFLOW_SCHEMES = ("runs", "models", "mlflow-artifacts", "dbfs", "uc-volume")
"""What MLflow downloads; everything else is left to ``fsspec``."""

_PARALLEL = 4
_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
_REPORT_SECONDS = 2.0

_PASSING_STATUSES = frozenset((408, 425, 429))

# Broken connections that the drivers (aiohttp, botocore, fsspec) do not raise as OSError.
_PASSING_ERRORS = frozenset(
    {
        "ClientPayloadError",
        "ClientConnectionError",
        "ServerDisconnectedError",
        "EndpointConnectionError",
        "ConnectionClosedError",
        "ReadTimeoutError",
        "IncompleteReadError",
        "FSTimeoutError",
        "TimeoutError",
    }
)

_EXTRAS: Mapping[str, str] = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
    "adl": "azure",
}


def download_all(
    uris: Mapping[str, str],
    directory: Path,
    *,
    report: Callable[[str], None],
    stop: StopSignal,
    fetch_artifact: FetchArtifact | None = None,
) -> dict[str, Path]:
    """Downloads several remote files or folders at the same time; when one fails, the others are stopped and removed.

    Args:
        uris: Remote URIs by parameter name.
        directory: Where they go, each in a new folder; it is created if it does not exist.
        report: Takes lines about the progress, from any thread.
        stop: Asks for the end.
        fetch_artifact: Downloads what MLflow keeps, such as ``runs:/``; None refuses it.

    Returns:
        The local files and folders by parameter name, absolute.

    Raises:
        FetchError: One of them could not be downloaded, or a stop was requested.
    """
    if not uris:
        return {}
    inner = StopSignal()
    forget = stop.on_request(lambda: inner.request(stop.reason or "the run was stopped"))
    try:
        with ThreadPoolExecutor(min(_PARALLEL, len(uris)), thread_name_prefix="download") as pool:
            jobs: dict[str, Future[Path]] = {
                name: pool.submit(
                    copy_context().run,
                    download,
                    uri,
                    directory,
                    report=report,
                    stop=inner,
                    fetch_artifact=fetch_artifact,
                )
                for name, uri in uris.items()
            }
            done, _ = wait(jobs.values(), return_when=FIRST_EXCEPTION)
            failure = next((error for job in done if (error := job.exception()) is not None), None)
            if failure is not None:
                inner.request("another download failed")
    finally:
        forget()
    if failure is None:
        return {name: job.result() for name, job in jobs.items()}
    for job in jobs.values():
        if job.exception() is None:
            shutil.rmtree(job.result().parent, ignore_errors=True)
    raise failure


def download(
    uri: str,
    directory: Path,
    *,
    report: Callable[[str], None],
    stop: StopSignal,
    fetch_artifact: FetchArtifact | None = None,
) -> Path:
    """Downloads one remote file or folder; a download that fails or is stopped leaves nothing behind.

    Passing errors are tried again, and sizes are compared with what the store announced.

    Args:
        uri: Where it is: any protocol that ``fsspec`` knows, or ``runs:/``, ``models:/``, ``mlflow-artifacts:/``, ``dbfs:/``.
        directory: Where it goes, into a new folder; it is created when it does not exist.
        report: Takes lines about the progress.
        stop: Asks for the end.
        fetch_artifact: Downloads what MLflow keeps, such as ``runs:/``; None refuses it.

    Returns:
        The local file or folder, absolute, under its remote name.

    Raises:
        FetchError: There is no such file, the store refused or broke off, no driver for it is installed, or the disk is
            full or read-only.
    """
    job = _Download(uri, report, stop, fetch_artifact, progress_sink())
    try:
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    except OSError as error:
        raise FetchError(
            f"{job.shown} can't be downloaded to {str(directory)!r}: {error.strerror or error}. "
            "Name a folder that can be written as the storage directory.",
            uri=job.shown,
        ) from None
    try:
        fetched = job.run(partial)
        whole = partial.with_name(partial.name.replace(".partial-", "download-"))
        partial.rename(whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return whole / fetched.relative_to(partial)


@dataclass(frozen=True)
class _Download:
    uri: str
    report: Callable[[str], None]
    stop: StopSignal
    fetch_artifact: FetchArtifact | None
    progress: ProgressSink

    @property
    def shown(self) -> str:
        return redact(self.uri)

    def run(self, folder: Path) -> Path:
        self.report(f"downloading {self.shown}")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self.stop.requested:
                    raise StoppedError
                fetch = self._by_mlflow if self._scheme in MLFLOW_SCHEMES else self._by_fsspec
                return self._while_not_stopped(fetch, folder)
            except StoppedError:
                raise SourceUnavailableError(
                    f"The download of {self.shown} was stopped: {self.stop.reason}.", uri=self.shown
                ) from None
            except FetchError:
                raise
            except Exception as error:  # noqa: BLE001 - drivers raise whatever they like; the type is made one here
                if attempt == _ATTEMPTS or not _may_pass(error):
                    raise self._failure(error) from None
                self.report(f"downloading {self.shown} broke off ({_words(error)}); trying again")
            shutil.rmtree(folder)
            folder.mkdir()
            self.stop.wait(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    @property
    def _scheme(self) -> str:
        return urlsplit(self.uri).scheme.lower()

    def _by_fsspec(self, folder: Path) -> Path:
        item = look_at(self.uri, self.shown)
        name = _local_name(self.uri)
        target = folder / name

        def fetch(place: Path) -> None:
            fetch_item(item, place, _progress(self))

        key = item.key
        cache = DownloadCache(settings.cache_directory() / "downloads")
        if key is None or not cache.is_usable():
            fetch(target)
            return target

        def fetch_shared(place: Path) -> None:
            fetch(place)
            check_unchanged(item, self.shown)

        if cache.hand_out(key, name, target, fetch_shared, self.report, self.stop):
            self.report(f"{self.shown} has been downloaded before and is unchanged")
        return target

    def _by_mlflow(self, folder: Path) -> Path:
        if self.fetch_artifact is None:
            raise FetchError(
                f"{self.shown} can't be downloaded here: only a run can download what MLflow keeps.", uri=self.shown
            )
        return self.fetch_artifact(self.uri, folder)

    def _while_not_stopped(self, fetch: Callable[[Path], Path], folder: Path) -> Path:
        """Runs what may wait for a network in a thread, and leaves that alone when a stop is requested."""
        result: Future[Path] = Future()
        woken = threading.Event()
        forget = self.stop.on_request(woken.set)

        def work() -> None:
            try:
                result.set_result(fetch(folder))
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
                result.set_exception(error)
            finally:
                woken.set()
                if self.stop.requested:
                    shutil.rmtree(folder, ignore_errors=True)

        threading.Thread(target=work, name="download", daemon=True).start()
        woken.wait()
        forget()
        if not result.done():
            raise StoppedError
        return result.result()

    def _failure(self, error: Exception) -> FetchError:
        if isinstance(error, ImportError):
            extra = _EXTRAS.get(self._scheme)
            advice = f'pip install "prefect-mlprojects[{extra}]"' if extra else _words(error)
            return SourceUnavailableError(
                f"{self.shown} can't be downloaded: no driver for it is installed. {advice}", uri=self.shown
            )
        if isinstance(error, FileNotFoundError):
            return FetchError(f"{self.shown} can't be downloaded: there is no such file or folder.", uri=self.shown)
        return SourceUnavailableError(f"{self.shown} can't be downloaded: {_words(error)}", uri=self.shown)


def _progress(job: _Download, *, whole: bool = True) -> Any:
    """A callback of fsspec that reports now and then, and ends the transfer when a stop is requested."""
    from fsspec.callbacks import Callback

    class Progress(Callback):  # type: ignore[misc]  # fsspec has no types
        """Counts bytes of a file, or files of a folder."""

        last_report = time.monotonic()

        def call(self, *_arguments: Any, **_named: Any) -> None:
            if job.stop.requested:
                raise StoppedError
            if whole and self.size and self.value:
                job.progress(f"downloading {job.shown}", min(self.value / self.size, 1.0))
            now = time.monotonic()
            if now - self.last_report > _REPORT_SECONDS and self.value:
                self.last_report = now
                of = f" of {self.size:,}" if self.size else ""
                job.report(f"downloading {job.shown}: {self.value:,}{of}")

        def branched(self, *_arguments: Any, **_named: Any) -> Any:
            return _progress(job, whole=False)

    return Progress()


def _local_name(uri: str) -> str:
    name = PurePosixPath(unquote(urlsplit(uri).path)).name
    # What no file system takes; and no name may be one of ours or hidden.
    return re.sub(r"[\0/]", "_", name).lstrip(".")[:200] or "download"


def _may_pass(error: Exception) -> bool:
    if isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
    ):
        return False
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUSES
    return type(error).__name__ in _PASSING_ERRORS


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of a driver carries; each has its own name for it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    return None


def _words(error: Exception) -> str:
    text = redact(str(error).strip()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
