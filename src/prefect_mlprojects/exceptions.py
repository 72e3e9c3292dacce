"""The errors that a project run can raise.

All derive from :class:`ExecutionException`, have structured attributes and an exit code for the command line, and can be
pickled, because Prefect and process pools move exceptions between processes. Messages say what failed, with the file, option
or URI, and what to do; they hold no secret.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from typing_extensions import Unpack

from prefect_mlprojects.types import FailureCategory


def shown(value: str, *, lines: bool = False) -> str:
    """Returns a text with its control characters escaped, which a terminal would obey; `lines` keeps line breaks and tabs."""
    if value.isprintable():
        return value
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept or _is_blank(each) else each.encode("unicode_escape").decode()
        for each in value
    )


def _is_blank(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


@dataclass(frozen=True)
class Problem:
    """One problem in a project file or in the arguments of a run.

    Attributes:
        message: What is wrong and what was expected, in one sentence.
        file: The file with the problem, if any.
        line: The line in ``file``, counted from 1.
        fix: What to do about it.
        parameter: The name of the parameter or option with the problem, if any.
        value: Its value as given.
    """

    message: str
    file: Path | None = None
    line: int | None = None
    fix: str | None = None
    parameter: str | None = None
    value: str | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        location = "" if self.file is None else f"{self.file}{line}: "
        return shown(f"{location}{self.message}" + (f" ({self.fix})" if self.fix else ""))


def _restore(cls: type[ExecutionException], message: str, attributes: dict[str, Any]) -> ExecutionException:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(attributes)
    return error


class ExecutionException(Exception):  # noqa: N818 - MLflow's name for it
    """Base class of all errors of this package; the name is MLflow's.

    Args:
        message: The complete message, for users.

    Attributes:
        category: The stable category of the failure.
        exit_status: The exit code of ``mlprojects``: 2 for what the caller named wrongly, 1 for what failed or was refused,
            130 for a cancelled run.
    """

    category: FailureCategory = FailureCategory.INFRASTRUCTURE
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        # It may quote files and output of other people.
        super().__init__(shown(message, lines=True))

    @property
    def message(self) -> str:
        """The complete message, for users."""
        return str(self.args[0]) if self.args else ""

    @property
    def summary(self) -> str:
        """The message on one line, as flow runs' states show it."""
        return " ".join(line.strip() for line in self.message.splitlines())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.message, dict(self.__dict__))


class InvalidInputError(ExecutionException):
    """Something that the caller named does not exist or is not valid: a block, a flow run, a setting."""

    exit_status = 2


class _ProblemsError(InvalidInputError):
    """An error that lists all problems at once.

    Args:
        headline: What could not be done ("Project 'x' can't be loaded").
        problems: All problems found, in the order of the file or the arguments.
    """

    category = FailureCategory.USER_CODE

    def __init__(self, headline: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{headline}: {self.problems[0]}")
        else:
            super().__init__("\n".join([f"{headline}:", *(f"  - {problem}" for problem in self.problems)]))


class ProjectSpecError(_ProblemsError):
    """A project's files are malformed, or the requested entry point does not exist."""


class ParameterError(_ProblemsError):
    """Parameter values or run options are missing, unknown or invalid."""


class FetchError(ExecutionException):
    """A project, or the file of a parameter, does not exist, or its URI or version is not valid.

    Attributes:
        uri: The URI, redacted.
    """

    exit_status = 2

    def __init__(self, message: str, *, uri: str) -> None:
        self.uri = uri
        super().__init__(message)


class SourceUnavailableError(FetchError):
    """A project or file could not be fetched: its host is unreachable or refused, or the local disk failed."""

    exit_status = 1


class EnvironmentBuildError(ExecutionException):
    """The project's environment could not be built.

    Attributes:
        manager: The environment manager: ``local``, ``virtualenv``, ``uv`` or ``conda``.
        output_tail: The build's last lines of output.
    """

    category = FailureCategory.IMAGE

    def __init__(self, message: str, *, manager: str, output_tail: Iterable[str] = ()) -> None:
        self.manager = manager
        self.output_tail = tuple(output_tail)
        super().__init__(message)


class InvalidEnvironmentError(EnvironmentBuildError, InvalidInputError):
    """The environment manager or environment does not exist, or the project's environment files are malformed."""


class BackendError(ExecutionException):
    """A backend is unknown, misconfigured, or can't run the project.

    Attributes:
        backend: The backend's name.
    """

    exit_status = 2

    def __init__(self, message: str, *, backend: str) -> None:
        self.backend = backend
        super().__init__(message)


class BackendUnavailableError(BackendError):
    """A backend is unreachable, refused the run, or failed: no Docker engine, an image that can't be pulled."""

    exit_status = 1


class TrackingError(ExecutionException):
    """The MLflow tracking server refused a request or could not be reached.

    Attributes:
        tracking_uri: The tracking URI, redacted.
    """

    def __init__(self, message: str, *, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        super().__init__(message)


class InvalidTrackingError(TrackingError, InvalidInputError):
    """The MLflow experiment or run that the caller named does not exist or was deleted, or several are named."""


class PrefectServerError(ExecutionException):
    """The Prefect server could not be started or reached.

    Attributes:
        api_url: The API's address, if known.
    """

    def __init__(self, message: str, *, api_url: str | None = None) -> None:
        self.api_url = api_url
        super().__init__(message)


class _RunDetails(TypedDict, total=False):
    run_id: str | None
    flow_run_id: str | None
    output_tail: Iterable[str]
    cause: str


class _RunEnded(ExecutionException):
    """A run that did not finish successfully."""

    def __init__(self, message: str, **details: Unpack[_RunDetails]) -> None:
        self.cause = details.get("cause", "")
        self.run_id = details.get("run_id")
        self.flow_run_id = details.get("flow_run_id")
        self.output_tail = tuple(details.get("output_tail", ()))
        super().__init__(message)


class RunFailed(_RunEnded):
    """The project's command failed, or could not be started; other arguments are those of `RunCancelled`.

    Args:
        exit_code: The command's exit code, if it exited.
        signal: The number of the signal that killed it, if any.
        category: The stable category of the failure.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        category: FailureCategory = FailureCategory.USER_CODE,
        **details: Unpack[_RunDetails],
    ) -> None:
        self.exit_code = exit_code
        self.signal = signal
        self.category = category
        super().__init__(message, **details)


class RunCancelled(_RunEnded):
    """The run was cancelled: by its handle, by Prefect's API or UI, or by an interrupt.

    Args:
        message: The complete message: the cause and advice.
        run_id: The MLflow run's ID, if it was created.
        flow_run_id: The Prefect flow run's ID, if it was created.
        output_tail: The last lines of the project's output.
        cause: Why it ended, in a few words ("exit code 3"); may be empty.
    """

    category = FailureCategory.CANCELLED
    exit_status = 130


class RunTimedOut(_RunEnded):
    """The run exceeded its time-out and was stopped; other arguments are those of `RunCancelled`.

    Args:
        timeout: The time-out in seconds.
    """

    category = FailureCategory.TIMEOUT

    def __init__(self, message: str, *, timeout: float, **details: Unpack[_RunDetails]) -> None:
        self.timeout = timeout
        super().__init__(message, **details)
