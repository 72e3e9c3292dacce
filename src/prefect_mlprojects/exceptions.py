"""The errors that a project run can raise.

Every error has :class:`ExecutionException` at its root, carries its facts as attributes, and survives pickling (Prefect and
process pools move exceptions between processes). Messages say what failed, which file, option or URI it was, and what to do;
they never hold a secret.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_mlprojects.types import FailureCategory


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a project file or a call.

    Attributes:
        message: What is wrong and what was expected, in one sentence.
        file: The file the problem is in, when it is in a file.
        line: The line in ``file``, counted from 1.
        fix: What to do about it.
        parameter: The parameter the problem is about, when it is about one.
        value: The offending value as given, when there is one.
    """

    message: str
    file: Path | None = None
    line: int | None = None
    fix: str | None = None
    parameter: str | None = None
    value: str | None = None

    def __str__(self) -> str:
        place = ""
        if self.file is not None:
            place = f"{self.file}:{self.line}: " if self.line is not None else f"{self.file}: "
        return f"{place}{self.message}" + (f" ({self.fix})" if self.fix else "")


def _restore(cls: type[ExecutionException], message: str, facts: dict[str, Any]) -> ExecutionException:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(facts)
    return error


class ExecutionException(Exception):  # noqa: N818 - MLflow's name for it
    """Root of every error that running a project can raise; named as MLflow names its own.

    Args:
        message: The whole message, ready to be shown to a user.

    Attributes:
        category: The stable category of the failure.
    """

    category: FailureCategory = FailureCategory.INFRASTRUCTURE

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The whole message, ready to be shown to a user."""
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.message, dict(self.__dict__))


def _list_problems(headline: str, problems: tuple[Problem, ...]) -> str:
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    return "\n".join([f"{headline}:", *(f"  - {problem}" for problem in problems)])


class ProjectSpecError(ExecutionException):
    """A project's files are malformed, or they lack the requested entry point.

    Args:
        headline: What could not be done ("Project 'x' can't be loaded").
        problems: Every problem found, in the order of the file.
    """

    category = FailureCategory.USER_CODE

    def __init__(self, headline: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_list_problems(headline, self.problems))


class ParameterError(ExecutionException):
    """Parameters or options of a call do not fit; all problems of the call at once.

    Args:
        headline: What the parameters were for ("Parameters of entry point 'main'").
        problems: Every problem found, each naming its parameter.
    """

    category = FailureCategory.USER_CODE

    def __init__(self, headline: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_list_problems(headline, self.problems))


class FetchError(ExecutionException):
    """A project, or a file that a parameter names, could not be fetched.

    Args:
        message: The whole message.
        uri: What could not be fetched, redacted.
    """

    def __init__(self, message: str, *, uri: str) -> None:
        self.uri = uri
        super().__init__(message)


class EnvironmentBuildError(ExecutionException):
    """The project's environment could not be chosen or built.

    Args:
        message: The whole message, ending with the resolver's or installer's last lines when there are any.
        manager: The environment manager: ``local``, ``virtualenv``, ``uv`` or ``conda``.
        output_tail: The last lines the build printed.
    """

    category = FailureCategory.IMAGE

    def __init__(self, message: str, *, manager: str, output_tail: Iterable[str] = ()) -> None:
        self.manager = manager
        self.output_tail = tuple(output_tail)
        super().__init__(message)


class BackendError(ExecutionException):
    """A backend is unknown, misconfigured, unreachable, or refused the run.

    Args:
        message: The whole message.
        backend: The backend's name.
    """

    def __init__(self, message: str, *, backend: str) -> None:
        self.backend = backend
        super().__init__(message)


class TrackingError(ExecutionException):
    """The MLflow tracking server refused or could not be reached.

    Args:
        message: The whole message.
        tracking_uri: The tracking URI, redacted.
    """

    def __init__(self, message: str, *, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        super().__init__(message)


class PrefectServerError(ExecutionException):
    """The Prefect server could not be started or reached.

    Args:
        message: The whole message.
        api_url: The API address that was tried, if one was known.
    """

    def __init__(self, message: str, *, api_url: str | None = None) -> None:
        self.api_url = api_url
        super().__init__(message)


class _RunEnded(ExecutionException):
    """A run that ended otherwise than by finishing.

    Args:
        message: The whole message.
        run_id: The MLflow run's id, if there is one.
        flow_run_id: The Prefect flow run's id, if there is one.
        output_tail: The last lines of the project's output.
        cause: Why it ended, in a few words ("exit code 3"); may be empty.
    """

    def __init__(
        self,
        message: str,
        *,
        run_id: str | None = None,
        flow_run_id: str | None = None,
        output_tail: Iterable[str] = (),
        cause: str = "",
    ) -> None:
        self.cause = cause
        self.run_id = run_id
        self.flow_run_id = flow_run_id
        self.output_tail = tuple(output_tail)
        super().__init__(message)


class RunFailed(_RunEnded):
    """The project's command ran and failed, or could not be started.

    Args:
        message: The whole message: exit code, cause and the last lines of output.
        exit_code: The command's exit code, if it exited.
        signal: The number of the signal that ended it, if one did.
        run_id: The MLflow run's id, if there is one.
        flow_run_id: The Prefect flow run's id, if there is one.
        output_tail: The last lines of the project's output.
        cause: Why it ended, in a few words ("exit code 3"); may be empty.
        category: The stable category of the failure.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        run_id: str | None = None,
        flow_run_id: str | None = None,
        output_tail: Iterable[str] = (),
        cause: str = "",
        category: FailureCategory = FailureCategory.USER_CODE,
    ) -> None:
        self.exit_code = exit_code
        self.signal = signal
        self.category = category
        super().__init__(message, run_id=run_id, flow_run_id=flow_run_id, output_tail=output_tail, cause=cause)


class RunCancelled(_RunEnded):
    """The run was cancelled: by its handle, by Prefect's API or UI, or by an interrupt."""

    category = FailureCategory.CANCELLED


class RunTimedOut(_RunEnded):
    """The run took longer than its timeout and was ended.

    Args:
        message: The whole message.
        timeout: The timeout, seconds.
        run_id: The MLflow run's id, if there is one.
        flow_run_id: The Prefect flow run's id, if there is one.
        output_tail: The last lines of the project's output.
        cause: Why it ended, in a few words ("exit code 3"); may be empty.
    """

    category = FailureCategory.TIMEOUT

    def __init__(
        self,
        message: str,
        *,
        timeout: float,
        run_id: str | None = None,
        flow_run_id: str | None = None,
        output_tail: Iterable[str] = (),
        cause: str = "",
    ) -> None:
        self.timeout = timeout
        super().__init__(message, run_id=run_id, flow_run_id=flow_run_id, output_tail=output_tail, cause=cause)
