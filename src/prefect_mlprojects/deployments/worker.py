"""``mlprojects worker``: Prefect's process worker, whose runs have true states when it is stopped.

It is two processes. The one that the user started takes the signals. The worker is its child, in a session of its own, so that
Ctrl-C on a terminal does not reach the runs, and is asked to stop by lines on its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_mlprojects.types import WorkerStop

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

_RUN_BYTES = 512 << 20  # of memory that a run's own process and a small program need
_RUNS_PER_CORE = 4  # runs on other machines only wait
_SETTLED_SECONDS = 1.0  # within which a run that was about to start has started


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a worker: `on_stop` is what it does with its runs when it is asked to stop."""

    work_pool: str
    name: str | None
    limit: int
    once: bool
    on_stop: WorkerStop


def default_limit() -> int:
    """Returns how many runs a worker executes at a time if nobody says it: by this machine's cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return _RUNS_PER_CORE * cores
    return max(1, min(_RUNS_PER_CORE * cores, memory // _RUN_BYTES))


def run_worker(options: WorkerOptions, environment: Mapping[str, str]) -> int:
    """Runs a worker until it ends, and returns its exit code; SIGINT, SIGTERM and SIGHUP ask it to stop."""
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(process.stdin.fileno(), b"stop\n")

    with _handling(ask):
        command = [sys.executable, "-m", __name__, json.dumps(asdict(options))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(environment), start_new_session=True)
        assert process.stdin is not None
        with process.stdin:
            # One that came before there was anybody to tell.
            if asked:
                ask(asked[0], None)
            return process.wait()


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A shell's `&` has SIGINT ignored, which is nobody's wish for a worker; `nohup` has SIGHUP ignored on purpose.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Worker:
    """The worker's process."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._active: set[UUID] = set()
        self._cancelled: set[UUID] = set()
        self._asked = 0
        self._abandoned = False
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Executes runs until it is asked to stop and its runs have ended, or, with ``once``, those that are due."""
        import anyio
        from prefect.workers.process import ProcessWorker

        options = self._options
        worker = ProcessWorker(work_pool_name=options.work_pool, name=options.name, limit=options.limit)
        poll, execute = worker.get_and_submit_flow_runs, worker.run

        async def poll_unless_stopping() -> list[Any]:
            return [] if self._stopping else await poll()

        async def execute_counted(flow_run: Any, *arguments: Any, **named: Any) -> Any:
            self._active.add(flow_run.id)
            self._changed.set()
            try:
                return await execute(flow_run, *arguments, **named)
            finally:
                self._active.discard(flow_run.id)
                self._changed.set()

        worker.get_and_submit_flow_runs = poll_unless_stopping  # type: ignore[method-assign]
        worker.run = execute_counted  # type: ignore[method-assign]
        self._listen()
        async with anyio.create_task_group() as group:
            group.start_soon(self._stop_when_asked, group)
            await worker.start(run_once=options.once, printer=_say)
            group.cancel_scope.cancel()
        await self._end_states()

    @property
    def _stopping(self) -> bool:
        return self._asked > 0 or self._abandoned

    @property
    def _cancels(self) -> bool:
        return self._asked > 1 or (self._asked == 1 and self._options.on_stop == "cancel")

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask)

        def read() -> None:
            # Not by sys.stdin, whose lock a thread must not hold when the process exits.
            while data := os.read(0, 4096):
                for _ in range(data.count(b"\n")):
                    loop.call_soon_threadsafe(self._ask)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._abandon)

        threading.Thread(target=read, daemon=True).start()

    def _ask(self) -> None:
        self._asked += 1
        count = len(self._active)
        runs = f"{count} run{'' if count == 1 else 's'}"
        if self._asked > 2:
            _say(f"Killing {runs}.")
        elif self._cancels:
            _say(f"Stopping: no more runs are taken, {runs} cancelled. Their work ends within its grace period.")
        else:
            _say(f"Stopping: no more runs are taken, {runs} awaited. The next signal cancels them.")
        self._changed.set()

    def _abandon(self) -> None:
        """Goes on with its runs only: the process that the user started was killed."""
        self._abandoned = True
        self._changed.set()

    async def _stop_when_asked(self, group: TaskGroup) -> None:
        while self._asked <= 2:
            self._changed.clear()
            if self._cancels:
                await self._cancel(self._active - self._cancelled)
            settled = _SETTLED_SECONDS if self._stopping and not self._active else None
            try:
                await asyncio.wait_for(self._changed.wait(), settled)
            except asyncio.TimeoutError:
                break
        group.cancel_scope.cancel()

    async def _cancel(self, flow_runs: set[UUID]) -> None:
        """Asks runs to stop, as Prefect's UI does: they end their work and report their state themselves."""
        from prefect.states import Cancelling

        self._cancelled |= flow_runs
        for flow_run in flow_runs:
            await _set_state(flow_run, Cancelling(message="The worker was stopped."))

    async def _end_states(self) -> None:
        """Gives a final state to runs whose process ended before it could report one."""
        from prefect.states import Cancelled

        for flow_run in self._cancelled:
            await _set_state(flow_run, Cancelled(message="The worker was stopped."))


async def _set_state(flow_run: UUID, state: Any) -> None:
    """Sets a state, unless the run has ended, or the server does not answer."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        async with get_client() as client:
            current = (await client.read_flow_run(flow_run)).state
            if current is None or not current.is_final():
                await client.set_flow_run_state(flow_run, state, force=state.is_final())
    except (httpx.HTTPError, OSError) as error:
        _say(f"The state of the flow run {flow_run} could not be set: {type(error).__name__}")


def _say(text: str) -> None:
    """Prints a line; whoever reads it may be gone."""
    with contextlib.suppress(OSError):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def main() -> None:
    """Runs the worker's process; its options are its argument."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    asyncio.run(_Worker(WorkerOptions(**json.loads(sys.argv[1]))).run())


if __name__ == "__main__":
    main()
