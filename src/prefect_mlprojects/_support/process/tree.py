"""Ends process trees. Run as a program, this module is the guard, which does so when the process it guards is killed.

A tree is a process group and all processes that left it: the execution's cookie in their environment identifies those that
moved to another session or were orphaned (as in Jenkins' ProcessTreeKiller).

The guard (``python -I -S tree.py``) reads lines from its stdin, a pipe whose other end only the guarded process holds: end
of file means that this process is dead. This works on Linux and macOS; a parent-death signal is Linux-only and fires when a
thread ends. Only the standard library is imported, so that the guard starts in some 15 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

COOKIE_VARIABLE = "PREFECT_MLPROJECTS_EXECUTION_ID"
_LONGEST_POLL_SECONDS = 0.2
_SHORTEST_POLL_SECONDS = 0.02
_KILL_SECONDS = 5.0


def find_members(group: int | None, cookie: str) -> list[int]:
    """Returns the live processes that are in the group or have the cookie."""
    members = _scan_proc(group, cookie) if sys.platform == "linux" else _scan_ps(group, cookie)
    return [pid for pid in members if pid != os.getpid()]


def _scan_proc(group: int | None, cookie: str) -> list[int]:
    members = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # proc(5): the state, parent and process group follow the command in parentheses.
            with open(f"/proc/{entry.name}/stat", "rb") as stream:  # noqa: PTH123 - some hundred files, read often
                fields = stream.read().rpartition(b")")[2].split()
            if fields[0] in {b"Z", b"X"}:
                continue
            if (group is not None and int(fields[2]) == group) or _has_cookie(entry.name, cookie):
                members.append(int(entry.name))
    return members


def _has_cookie(pid: str, cookie: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:  # noqa: PTH123 - as above
            environment = stream.read()
    except OSError:
        # Another user's process.
        return False
    wanted = cookie.encode()
    prefix = f"{COOKIE_VARIABLE}=".encode()
    return wanted in environment and any(
        wanted in variable[len(prefix) :].split(b"/")
        for variable in environment.split(b"\0")
        if variable.startswith(prefix)
    )


def _scan_ps(group: int | None, cookie: str) -> list[int]:
    listed = subprocess.run(
        ["ps", "-axEww", "-o", "pid=,pgid=,stat=,command="],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return parse_ps(listed.stdout, group, cookie)


def parse_ps(listing: str, group: int | None, cookie: str) -> list[int]:
    """Returns the live processes of a tree from the output of ``ps -E -o pid=,pgid=,stat=,command=``.

    macOS hides the environment of programs in ``/bin`` and ``/usr/bin``, so only those in the group are found.
    """
    members = []
    for row in listing.splitlines():
        pid, own_group, state, *command = row.split(None, 3)
        if state.startswith("Z"):
            continue
        words = " ".join(command).split()
        cookies = [word.partition("=")[2] for word in words if word.startswith(f"{COOKIE_VARIABLE}=")]
        if (group is not None and int(own_group) == group) or any(cookie in each.split("/") for each in cookies):
            members.append(int(pid))
    return members


def end_tree(
    group: int | None, cookie: str, grace_period: float, delay: float = 0.0, *, interrupt: bool = False
) -> None:
    """Ends a tree with SIGTERM and, after the grace period, SIGKILL; returns once all its processes have exited.

    SIGTERM is sent after `delay` seconds to exit by itself. With `interrupt`, SIGINT precedes it by half the grace period,
    whose end stays the same. The group's first process must not have been waited for, so that its id is not reused.
    """
    members = _wait_for_end(find_members(group, cookie), group, cookie, delay)
    if interrupt:
        grace_period /= 2
        _signal(members, signal.SIGINT)
        members = _wait_for_end(members, group, cookie, grace_period)
    _signal(members, signal.SIGTERM)
    members = _wait_for_end(members, group, cookie, grace_period)
    deadline = time.monotonic() + _KILL_SECONDS
    while members and time.monotonic() < deadline:
        # Repeated: a process may start another one between the scan and the signal.
        _signal(members, signal.SIGKILL)
        _wait_for_any(members, _LONGEST_POLL_SECONDS)
        members = find_members(group, cookie)


def _wait_for_end(members: list[int], group: int | None, cookie: str, seconds: float) -> list[int]:
    """Waits up to `seconds` until a tree has ended; returns its remaining processes."""
    deadline = time.monotonic() + seconds
    while members and (remaining := deadline - time.monotonic()) > 0:
        _wait_for_any(members, remaining)
        members = find_members(group, cookie)
    return members


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _wait_for_any(pids: list[int], timeout: float) -> None:
    """Waits until one of the processes exits; without pidfds, for a short time."""
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        for pid in pids:
            try:
                descriptor = open_pidfd(pid)
            except ProcessLookupError:
                return
            if descriptor is None:
                time.sleep(min(timeout, _SHORTEST_POLL_SECONDS))
                return
            stack.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(0.0, timeout) * 1000)


def open_pidfd(pid: int) -> int | None:
    """Opens a descriptor that becomes readable when the process exits; None without Linux 5.3, or if a sandbox refuses.

    Raises:
        ProcessLookupError: No process has this pid.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def process_birth(pid: int) -> str | None:
    """Returns the start time of a live process, which identifies it together with its pid; else None."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return listed.stdout.strip() or None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    # proc(5): field 3 is the state, field 22 the start time in ticks since boot.
    return None if fields[0] in {"Z", "X"} else f"{boot}/{fields[19]}"


def process_owner_and_command(pid: int) -> tuple[int | None, str]:
    """Returns the effective user id and the command line of a process; None and empty if it is gone."""
    process = Path(f"/proc/{pid}")
    try:
        if Path("/proc/self/stat").exists():
            return process.stat().st_uid, (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(
                errors="replace"
            )
        command = ["ps", "-ww", "-o", "uid=,command=", "-p", str(pid)]
        uid, _, rest = (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
        )
        return int(uid), rest
    except (OSError, ValueError):
        return None, ""


def ancestor_values(variable: str) -> list[str]:
    """Returns the values that a variable had when each ancestor of this process started, the nearest first; Linux only.

    An ancestor of another user counts as without the variable.
    """
    values, pid = [], os.getppid()
    prefix = f"{variable}=".encode()
    while pid > 1:
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            found = (each for each in (process / "environ").read_bytes().split(b"\0") if each.startswith(prefix))
            values += [os.fsdecode(each[len(prefix) :]) for each in found]
        try:
            pid = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return values


def main() -> None:
    """Reads ``add COOKIE GRACE``, ``group COOKIE PGID`` and ``remove COOKIE``; at end of file, ends the remaining trees."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    grace_periods: dict[str, float] = {}
    groups: dict[str, int] = {}
    for line in sys.stdin:
        command, cookie, *rest = line.split()
        if command == "add":
            grace_periods[cookie] = float(rest[0])
        elif command == "group":
            groups[cookie] = int(rest[0])
        else:
            grace_periods.pop(cookie, None)
            groups.pop(cookie, None)
    workers = []
    for cookie, grace_period in grace_periods.items():
        # One process per tree: their grace periods run at the same time.
        worker = os.fork()
        if worker == 0:
            end_tree(groups.get(cookie), cookie, grace_period)
            os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)


if __name__ == "__main__":
    main()
