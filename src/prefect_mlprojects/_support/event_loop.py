"""The event loop, in a daemon thread, on which this process calls Prefect and executes its flow runs.

So `run()` works in a script, in a notebook whose loop is running, and from any thread. Prefect's synchronous engine would
wait up to a second for its heartbeat thread at the end of each run. anyio's blocking portal does not fit: its tasks share a
task group, so a `BaseException` of one run (Prefect's `TerminationSignal`, `KeyboardInterrupt`) would cancel the others, and
a cancelled run could not await its clean-up, because anyio raises the cancellation again at each `await`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from prefect_mlprojects.types import StopSignal

_T = TypeVar("_T")

SIGNAL_SECONDS = 1.0
"""How long the main thread may wait at a time: it handles signals between two waits, if another thread received them."""


class BackgroundLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="prefect-mlprojects", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Starts a coroutine on the loop, in the caller's context; callable from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine on the loop and returns its result; an interrupt of the calling thread cancels it.

        Raises:
            RuntimeError: The caller is on the loop's own thread.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "BackgroundLoop.run() was called on the loop's own thread, where it would wait for itself."
            )
        future = self.submit(coroutine)
        try:
            while not concurrent.futures.wait([future], SIGNAL_SECONDS).done:
                pass
            return future.result()
        except BaseException:
            future.cancel()
            raise


_lock = threading.Lock()
_current: BackgroundLoop | None = None


def background_loop() -> BackgroundLoop:
    """Returns this process's loop; the first call starts it."""
    global _current
    with _lock:
        if _current is None:
            _current = BackgroundLoop()
        return _current


def _forget_after_fork() -> None:
    # A forked process inherits the object but not the thread.
    global _current, _lock
    _current = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def call_before_exit(callback: Callable[[], None]) -> None:
    """Calls `callback` before the interpreter exits, while threads can still be started.

    With ``atexit`` it would be too late: ``concurrent.futures`` refuses work by then. CPython's executors use this private hook.
    """
    # Hooks run in reverse order of registration; the executors' hook must be registered first.
    import concurrent.futures.thread  # noqa: F401

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]  # noqa: SLF001
    register(callback)


async def all_or_stop(stop: StopSignal, *awaitables: Awaitable[Any]) -> list[Any]:
    """Returns all results; at the first failure stops the others, waits for them and raises it."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    done, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    if pending:
        stop.request("another step of the run failed")
        await asyncio.wait(pending)
        for future in done:
            future.result()
    return [future.result() for future in futures]
