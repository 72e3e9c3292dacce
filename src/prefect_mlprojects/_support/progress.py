"""Reports the progress of long operations to a listener of the current context.

The context includes threads that ``asyncio.to_thread`` starts. An operation that starts its own threads passes
`progress_sink()` to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

ProgressSink: TypeAlias = Callable[[str, float], None]
"""Receives a description and the fraction done, from 0 to 1; called often and from any thread, so it must be quick."""


def _ignore(description: str, fraction: float) -> None: ...


_sink: ContextVar[ProgressSink] = ContextVar("progress_sink", default=_ignore)


def progress_sink() -> ProgressSink:
    """Returns the listener of the current context; a no-op if there is none."""
    return _sink.get()


def report_progress(description: str, done: float, total: float) -> None:
    """Reports `done` of `total`, in any unit; an unknown total (0) is not reported."""
    if total > 0:
        _sink.get()(description, min(max(done / total, 0.0), 1.0))


@contextmanager
def send_progress_to(sink: ProgressSink) -> Iterator[None]:
    """Registers a progress listener for the current context during the block."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)
