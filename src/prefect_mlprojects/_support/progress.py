"""How far a long work has got: told where it is done, shown where somebody listens.

A listener holds for the context in which it was set, and for the threads that ``asyncio.to_thread`` starts from there; a work
that starts threads of its own takes ``progress_sink()`` with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

ProgressSink: TypeAlias = Callable[[str, float], None]
"""Takes what is being done, and how much of it, from 0 to 1; from any thread, so often that it must be quick."""


def _nobody(what: str, fraction: float) -> None: ...


_sink: ContextVar[ProgressSink] = ContextVar("progress_sink", default=_nobody)


def progress_sink() -> ProgressSink:
    """Returns what takes the progress of works in this context; it does nothing where nobody listens."""
    return _sink.get()


def tell_progress(what: str, done: float, total: float) -> None:
    """Tells how far a work has got.

    Args:
        what: The work, for people to read.
        done: How much of it is done, in any unit.
        total: How much there is, in the same unit; nothing is told of a work of unknown size.
    """
    if total > 0:
        _sink.get()(what, min(max(done / total, 0.0), 1.0))


@contextmanager
def progress_goes_to(sink: ProgressSink) -> Iterator[None]:
    """Has the progress of works in this context told to a listener.

    Args:
        sink: The listener.
    """
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)
