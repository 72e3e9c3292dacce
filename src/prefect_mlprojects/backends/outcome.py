"""How an execution ended and why: one value for every backend, from pure functions."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prefect_mlprojects.types import FailureCategory, StopSignal

Ending: TypeAlias = Literal["exited", "stopped", "timed-out", "not-started", "lost"]

_CATEGORY_BY_ENDING = {
    "exited": FailureCategory.USER_CODE,
    "stopped": FailureCategory.CANCELLED,
    "timed-out": FailureCategory.TIMEOUT,
    "not-started": FailureCategory.INFRASTRUCTURE,
    "lost": FailureCategory.LOST,
}


@dataclass(frozen=True)
class Outcome:
    """How an execution ended, and why.

    Attributes:
        ending: ``exited`` by itself, ``stopped`` by a stop request, ``timed-out``, ``not-started``, or ``lost``: it
            continued without being watched, and its end is unknown.
        exit_code: The command's exit code, if it exited by itself.
        signal: The number of the signal that ended it, if one did.
        cause: Why it ended, in words ("exit code 3", "ended by SIGKILL").
        advice: What to do about it; may be empty.
        output_tail: The last lines of both streams, in the order they came.
        reason: The category, where the backend knows better than `ending`: out of memory, image, preempted ...
    """

    ending: Ending
    exit_code: int | None = None
    signal: int | None = None
    cause: str = ""
    advice: str = ""
    output_tail: tuple[str, ...] = ()
    reason: FailureCategory | None = None

    @property
    def succeeded(self) -> bool:
        """True if the command exited by itself with code 0."""
        return self.ending == "exited" and self.exit_code == 0

    @property
    def category(self) -> FailureCategory | None:
        """The stable category of a failure; None for a success."""
        return None if self.succeeded else self.reason or _CATEGORY_BY_ENDING[self.ending]


def stopped_outcome(stop: StopSignal, output_tail: tuple[str, ...] = ()) -> Outcome:
    """Returns the outcome of an execution that a stop request ended."""
    return Outcome("stopped", cause=str(stop.reason), output_tail=output_tail)


def timed_out_outcome(timeout: float | None, output_tail: tuple[str, ...] = ()) -> Outcome:
    """Returns the outcome of an execution that took longer than `timeout` seconds."""
    return Outcome("timed-out", cause=f"it took longer than its timeout of {timeout or 0:g} s", output_tail=output_tail)


_ADVICE_BY_EXIT_CODE = {
    126: "The command was found but may not be executed: check its permissions (chmod +x) and its first line (#!).",
    127: "A command was not found: check the entry point's command, and that the environment has the program.",
}
_ADVICE_BY_SIGNAL = {
    signal.SIGKILL: "It was killed; often the system does so when memory runs out.",
    signal.SIGSEGV: "It accessed memory that it must not: a bug in native code, or mismatched binary packages.",
    signal.SIGABRT: "It aborted itself: its last lines of output may say why.",
    signal.SIGXCPU: "It used up its limit of CPU time (ulimit -t).",
    signal.SIGXFSZ: "It wrote a file beyond its size limit (ulimit -f).",
}
_SHELL_SIGNAL_BASE = 128


def explain_exit(return_code: int, output_tail: tuple[str, ...] = ()) -> Outcome:
    """Explains a return code of ``subprocess``: 0 or more is an exit code, a negative number the signal that ended it.

    A shell reports the end of its child by a signal as the exit code 128 plus the signal's number (bash(1), EXIT STATUS).
    """
    if return_code < 0:
        name, advice = _describe_signal(-return_code)
        return Outcome("exited", None, -return_code, f"ended by {name}", advice, output_tail)
    number = return_code - _SHELL_SIGNAL_BASE
    if _is_signal(number):
        name, advice = _describe_signal(number)
        return Outcome("exited", return_code, number, f"exit code {return_code}: ended by {name}", advice, output_tail)
    advice = _ADVICE_BY_EXIT_CODE.get(return_code, "")
    return Outcome("exited", return_code, None, f"exit code {return_code}", advice, output_tail)


def _is_signal(number: int) -> bool:
    return number in {each.value for each in signal.Signals}


def _describe_signal(number: int) -> tuple[str, str]:
    if not _is_signal(number):
        return f"signal {number}", ""
    known = signal.Signals(number)
    return known.name, _ADVICE_BY_SIGNAL.get(known, "")
