"""Finds out why a local command ended: from what the shell and the system report to a cause and an advice."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import MappingProxyType

_ADVICE_BY_EXIT_CODE = MappingProxyType(
    {
        126: "The command was found but may not be executed: check its permissions (chmod +x) and its first line (#!).",
        127: "A command was not found: check the entry point's command, and that the environment has the program.",
    }
)
_ADVICE_BY_SIGNAL = MappingProxyType(
    {
        signal.SIGKILL: "Somebody killed it; often the system does when memory runs out.",
        signal.SIGSEGV: "It accessed memory that it must not: a bug in native code, or mismatched binary packages.",
        signal.SIGABRT: "It aborted itself: its last lines of output may say why.",
        signal.SIGXCPU: "It used up its limit of CPU time (ulimit -t).",
        signal.SIGXFSZ: "It wrote a file beyond its size limit (ulimit -f).",
    }
)
_SHELL_SIGNAL_BASE = 128


@dataclass(frozen=True)
class Cause:
    """Why a command ended.

    Attributes:
        exit_code: The exit code, when it exited.
        signal: The number of the signal that ended it, when one did.
        text: The cause in words.
        advice: What to do about it; empty when there is nothing to say.
    """

    exit_code: int | None
    signal: int | None
    text: str
    advice: str = ""


def find_cause(return_code: int) -> Cause:
    """Explains a return code as ``subprocess`` reports it.

    Args:
        return_code: 0 or more for an exit code, the negative number of the signal that ended it otherwise. A shell reports
            the end of its child by a signal as the exit code 128 plus the signal's number (bash(1), EXIT STATUS).
    """
    if return_code < 0:
        name, advice = _describe_signal(-return_code)
        return Cause(None, -return_code, f"ended by {name}", advice)
    if return_code > _SHELL_SIGNAL_BASE and _is_signal(return_code - _SHELL_SIGNAL_BASE):
        number = return_code - _SHELL_SIGNAL_BASE
        name, advice = _describe_signal(number)
        return Cause(return_code, number, f"exit code {return_code}: ended by {name}", advice)
    return Cause(return_code, None, f"exit code {return_code}", _ADVICE_BY_EXIT_CODE.get(return_code, ""))


def _is_signal(number: int) -> bool:
    return number in {each.value for each in signal.Signals}


def _describe_signal(number: int) -> tuple[str, str]:
    if not _is_signal(number):
        return f"signal {number}", ""
    known = signal.Signals(number)
    return known.name, _ADVICE_BY_SIGNAL.get(known, "")
