"""The one event loop, in a thread of its own, on which this process talks to Prefect and runs its flow runs.

A loop of our own lets ``run()`` work alike in a script, in a notebook whose loop runs already, and from any thread; the
sync flow engine would wait up to a second at each run's end for its heartbeat thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class BackgroundLoop:
    """An event loop running in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="prefect-mlprojects", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Starts a coroutine on the loop, from any thread; returns at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine on the loop and returns its result; for other threads than the loop's.

        An interrupt of the waiting thread cancels the coroutine.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("This call would wait for itself: it was made on the loop's own thread.")
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


_lock = threading.Lock()
_current: BackgroundLoop | None = None


def background_loop() -> BackgroundLoop:
    """Returns this process's loop, starting it when it is first needed."""
    global _current
    with _lock:
        if _current is None:
            _current = BackgroundLoop()
        return _current


def _forget_after_fork() -> None:
    # A forked child has the object but not the thread; it starts a loop of its own when it needs one.
    global _current, _lock
    _current = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def call_before_exit(callback: Callable[[], None]) -> None:
    """Calls ``callback`` when the interpreter is about to end, while threads can still be started.

    ``atexit`` comes too late: by then ``concurrent.futures`` refuses new work, on which runs that go on depend.
    CPython's own executors use the same hook.
    """
    # Hooks run in the reverse order of their registration; the executors' own one must come after ours.
    import concurrent.futures.thread  # noqa: F401

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]  # noqa: SLF001
    register(callback)
