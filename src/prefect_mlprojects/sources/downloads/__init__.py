"""Downloads of remote files and folders, such as those of ``path`` parameters: complete or not at all."""

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
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from urllib.parse import unquote

from prefect_mlprojects._support.locks import LockStoppedError
from prefect_mlprojects._support.progress import ProgressSink, progress_sink
from prefect_mlprojects._support.redaction import redact, redact_url
from prefect_mlprojects._support.text import split_url
from prefect_mlprojects.exceptions import FetchError, SourceUnavailableError
from prefect_mlprojects.sources.base import checked_cache
from prefect_mlprojects.sources.downloads.files import DownloadCache, describe_remote, fetch_item, follow_redirects
from prefect_mlprojects.types import StopSignal

FetchArtifact: TypeAlias = Callable[[str, Path], Path]
"""Downloads an MLflow artifact into an empty folder and returns the local file or folder; raises MLflow's errors."""

_MLFLOW_SCHEMES = ("runs", "models", "mlflow-artifacts", "dbfs", "uc-volume")
_PARALLEL = 4
_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
_REPORT_SECONDS = 2.0
_SECONDS_TO_END = 0.5
_TRANSIENT_STATUSES = frozenset((408, 425, 429))

# Broken connections that the drivers (aiohttp, botocore, fsspec) do not raise as OSError.
_TRANSIENT_ERRORS = re.compile(
    "Client(Payload|Connection)Error|ServerDisconnectedError|EndpointConnectionError|ConnectionClosedError|"
    "ReadTimeoutError|IncompleteReadError|(FS)?TimeoutError"
)
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
_PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure"),
}


def download_all(
    uris: Mapping[str, str],
    directory: Path,
    *,
    report: Callable[[str], None],
    stop: StopSignal,
    fetch_artifact: FetchArtifact | None = None,
) -> dict[str, Path]:
    """Downloads concurrently by parameter name, each as ``download``; if one fails, stops and removes the others.

    Raises:
        FetchError: A download failed, or a stop was requested.
    """
    if not uris:
        return {}
    inner = StopSignal()
    forget = stop.on_request(lambda: inner.request(stop.reason or "the run was stopped"))
    fetch = partial(download, directory=directory, report=report, stop=inner, fetch_artifact=fetch_artifact)
    try:
        with ThreadPoolExecutor(min(_PARALLEL, len(uris)), thread_name_prefix="download") as pool:
            jobs = {name: pool.submit(copy_context().run, fetch, uri) for name, uri in uris.items()}
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
    check_redirect: Callable[[str], None] | None = None,
) -> Path:
    """Downloads a remote file or folder into a new folder in `directory`; returns its absolute path, with its remote name.

    The URI is of any protocol of ``fsspec``, or of an MLflow artifact (``runs:/``, ``models:/``, …) for `fetch_artifact`. Transient
    errors are retried, sizes are compared with the announced ones, and a download that fails or is stopped leaves nothing behind.
    `check_redirect` gets each address that a web server redirects to, before it is asked, and may raise a `FetchError`.

    Raises:
        FetchError: It does not exist, the store refused or broke off, its driver is not installed, the disk is full or
            read-only, or a stop was requested.
    """
    job = _Download(uri, report, stop, fetch_artifact, progress_sink(), check_redirect)
    try:
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    except OSError as error:
        raise FetchError(
            f"{job.shown} can't be downloaded to {str(directory)!r}: {error.strerror or error}. "
            "Set storage_dir to a folder that can be written.",
            uri=job.shown,
        ) from None
    try:
        fetched = job.run(partial)
        complete = partial.with_name(partial.name.replace(".partial-", "download-"))
        partial.rename(complete)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return complete / fetched.relative_to(partial)


class _StoppedError(Exception):
    """Raised when a stop is requested during a download."""


@dataclass(frozen=True)
class _Download:
    uri: str
    report: Callable[[str], None]
    stop: StopSignal
    fetch_artifact: FetchArtifact | None
    progress: ProgressSink
    check_redirect: Callable[[str], None] | None = None

    @property
    def shown(self) -> str:
        return redact_url(self.uri)

    def run(self, folder: Path) -> Path:
        self.report(f"downloading {self.shown}")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self.stop.requested:
                    raise _StoppedError
                fetch = self._by_mlflow if self._scheme in _MLFLOW_SCHEMES else self._by_fsspec
                return self._while_not_stopped(fetch, folder)
            except (_StoppedError, LockStoppedError):
                raise SourceUnavailableError(
                    f"The download of {self.shown} was stopped: {self.stop.reason}.", uri=self.shown
                ) from None
            except FetchError:
                raise
            except Exception as error:  # noqa: BLE001 - drivers raise any type; the final one is FetchError
                if attempt == _ATTEMPTS or not _is_transient(error):
                    raise self._failure(error) from None
                self.report(f"downloading {self.shown} broke off ({_sentence(error)}); trying again")
            shutil.rmtree(folder)
            folder.mkdir()
            self.stop.wait(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    @property
    def _scheme(self) -> str:
        return split_url(self.uri).scheme.lower()

    def _by_fsspec(self, folder: Path) -> Path:
        check, uri = self.check_redirect, self.uri
        if check is not None and self._scheme in ("http", "https"):
            uri = follow_redirects(uri, check)
        item = describe_remote(uri, self.shown, redirects=check is None)
        name = _local_name(self.uri)
        target = folder / name

        def fetch(path: Path) -> None:
            fetch_item(item, path, _progress(self))
            # An entry of the cache must be what its key says.
            if path != target and describe_remote(uri, self.shown, redirects=check is None).key != item.key:
                raise ConnectionError("it changed while it was downloaded")

        cache = DownloadCache(checked_cache(self.shown) / "downloads")
        if item.key is None or not cache.is_usable():
            fetch(target)
        elif cache.hand_out(item.key, name, target, fetch, self.report, self.stop):
            self.report(f"{self.shown} has been downloaded before and is unchanged")
        return target

    def _by_mlflow(self, folder: Path) -> Path:
        if self.fetch_artifact is None:
            raise FetchError(
                f"{self.shown} can't be downloaded here: only a run can download MLflow artifacts.", uri=self.shown
            )
        return self.fetch_artifact(self.uri, folder)

    def _while_not_stopped(self, fetch: Callable[[Path], Path], folder: Path) -> Path:
        """Runs a call that may block on the network in a thread, which is abandoned on a stop request."""
        result: Future[Path] = Future()
        woken = threading.Event()
        forget = self.stop.on_request(woken.set)

        def work() -> None:
            try:
                result.set_result(fetch(folder))
            except BaseException as error:  # noqa: BLE001 - it is raised in the waiting thread
                result.set_exception(error)
            finally:
                woken.set()
                if self.stop.requested:
                    shutil.rmtree(folder, ignore_errors=True)

        thread = threading.Thread(target=work, name="download", daemon=True)
        thread.start()
        woken.wait()
        forget()
        if not result.done():
            # Mostly it ends at its next chunk; only then is nothing written while the folder is removed.
            thread.join(_SECONDS_TO_END)
            raise _StoppedError
        return result.result()

    def _failure(self, error: Exception) -> FetchError:
        if isinstance(error, ImportError):
            extra = _EXTRAS.get(self._scheme)
            advice = f'pip install "prefect-mlprojects[{extra}]"' if extra else _sentence(error)
            cause = f"no driver for it is installed. {advice}"
        elif isinstance(error, FileNotFoundError):
            cause = "no such file or folder."
        else:
            cause = _sentence(error)
        kind = FetchError if isinstance(error, FileNotFoundError) else SourceUnavailableError
        return kind(f"{self.shown} can't be downloaded: {cause}", uri=self.shown)


def _progress(job: _Download, *, is_top: bool = True) -> Any:
    """Returns a callback of fsspec that reports at intervals, and ends the transfer on a stop request."""
    from fsspec.callbacks import Callback

    class Progress(Callback):  # type: ignore[misc]  # fsspec has no types
        """Counts bytes of a file, or files of a folder."""

        last_report = time.monotonic()

        def call(self, *_arguments: Any, **_named: Any) -> None:
            if job.stop.requested:
                raise _StoppedError
            if is_top and self.size and self.value:
                job.progress(f"downloading {job.shown}", min(self.value / self.size, 1.0))
            now = time.monotonic()
            if now - self.last_report > _REPORT_SECONDS and self.value:
                self.last_report = now
                of = f" of {self.size:,}" if self.size else ""
                job.report(f"downloading {job.shown}: {self.value:,}{of}")

        def branched(self, *_arguments: Any, **_named: Any) -> Any:
            return _progress(job, is_top=False)

    return Progress()


def _local_name(uri: str) -> str:
    name = PurePosixPath(unquote(split_url(uri).path)).name
    # No file system takes NUL or slashes; a leading dot would hide it, or make it look like one of ours.
    return re.sub(r"[\0/]", "_", name).lstrip(".")[:200] or "download"


def _is_transient(error: Exception) -> bool:
    if isinstance(error, _PERMANENT_ERRORS):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUSES
    return _TRANSIENT_ERRORS.fullmatch(type(error).__name__) is not None


def _http_status(error: Exception) -> int | None:
    """Returns the HTTP status of a driver's error; each driver has its own name for it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    # Lazily: aiohttp warns when its deprecated "code" is read.
    names = ((holder, name) for holder in (error, response) for name in ("status", "status_code", "code"))
    values = (getattr(holder, name, None) for holder, name in names)
    return next((value for value in values if isinstance(value, int) and 100 <= value < 600), None)


def _sentence(error: Exception) -> str:
    text = redact(str(error).strip()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
