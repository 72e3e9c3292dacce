"""Ends process trees: for this package, and on its own as the guard that does so when this process is killed.

A tree is a process group and whatever left it: each process of an execution carries the execution's cookie in its environment, by
which those that moved to a session of their own, or were orphaned, are found (Jenkins' ProcessTreeKiller finds them alike).

Started as a program (``python -I -S _guard.py``) this is the guard. It reads lines from its stdin, a pipe whose other end only the
process it guards holds: the end of the pipe means that this process is dead, however it died, and the guard ends what is left.
It works on Linux and macOS alike; it needs no parent-death signal, which only Linux has and which a thread's end would set off. It
imports nothing but the standard library, so that it starts in some 15 ms.
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
    """Returns the live processes of a tree.

    Args:
        group: The process group's id, if it is known.
        cookie: The execution's cookie.
    """
    members = _scan_proc(group, cookie) if sys.platform == "linux" else _scan_ps(group, cookie)
    return [pid for pid in members if pid != os.getpid()]


def _scan_proc(group: int | None, cookie: str) -> list[int]:
    members = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # proc(5): after the command in parentheses come the state, the parent and the process group.
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
    """Returns the live processes of a tree, as ``ps -E -o pid=,pgid=,stat=,command=`` lists them.

    macOS shows no environment for the programs that it protects (those in ``/bin`` and ``/usr/bin``): of these, only the members
    of the group are found.

    Args:
        listing: What ``ps`` printed: the environment follows the command, a row a process.
        group: The process group's id, if it is known.
        cookie: The execution's cookie.
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


def end_tree(group: int | None, cookie: str, grace: float, patience: float = 0.0) -> None:
    """Ends a tree: asks with SIGTERM, waits up to the grace period, kills with SIGKILL. Returns when all have ended.

    Args:
        group: The process group's id, if it is known. It must not have been given to another process meanwhile: a leader that is
            not waited for yet keeps it.
        cookie: The execution's cookie.
        grace: Seconds between asking and killing.
        patience: Seconds that the tree has to end by itself before it is asked.
    """
    members = _await_end(find_members(group, cookie), group, cookie, patience)
    _signal(members, signal.SIGTERM)
    members = _await_end(members, group, cookie, grace)
    deadline = time.monotonic() + _KILL_SECONDS
    while members and time.monotonic() < deadline:
        # Again and again: a process may start another one between the scan and the signal.
        _signal(members, signal.SIGKILL)
        _wait_for_any(members, _LONGEST_POLL_SECONDS)
        members = find_members(group, cookie)


def _await_end(members: list[int], group: int | None, cookie: str, seconds: float) -> list[int]:
    """Waits until a tree has ended, or for so long; returns what is left of it."""
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
    """Waits until one of the processes has ended; where the system can't tell, for a moment."""
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
    """Opens a descriptor that becomes readable when the process ends; None where there is no such thing.

    Linux has it since 5.3; older kernels, some sandboxes and a full descriptor table refuse it.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def main() -> None:
    """Guards: reads ``add COOKIE GRACE``, ``group COOKIE PGID`` and ``remove COOKIE``; at the end, ends what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    graces: dict[str, float] = {}
    groups: dict[str, int] = {}
    for line in sys.stdin:
        word, cookie, *rest = line.split()
        if word == "add":
            graces[cookie] = float(rest[0])
        elif word == "group":
            groups[cookie] = int(rest[0])
        else:
            graces.pop(cookie, None)
            groups.pop(cookie, None)
    children = []
    for cookie, grace in graces.items():
        # Each in a process of its own, so that one that takes its grace period does not hold up the others.
        child = os.fork()
        if child == 0:
            end_tree(groups.get(cookie), cookie, grace)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()

GUARD_PROGRAM = Path(__file__)
