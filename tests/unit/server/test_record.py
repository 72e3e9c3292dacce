"""The embedded server's state file: valid only for the process and instance that it names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from prefect_mlprojects._support.process.tree import process_birth
from prefect_mlprojects.server.record import (
    APPLICATION,
    INSTANCE_HEADER,
    ServerRecord,
    answers,
    is_alive,
    read_record,
    stop_process,
    write_record,
)


def record_of(pid: int, port: int = 9) -> ServerRecord:
    return ServerRecord(pid, process_birth(pid) or "", port, instance="this", ready=True)


def test_record_written_to_file_is_read_back(tmp_path: Path) -> None:
    record = record_of(os.getpid())
    write_record(tmp_path, replace(record, ready=False))
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["server.json"]


def test_stop_process_with_reused_pid_leaves_other_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", APPLICATION], stdin=subprocess.PIPE) as process:
        record = record_of(process.pid)
        recycled = replace(record, birth="earlier")
        assert (is_alive(record), is_alive(recycled)) == (True, False)
        stop_process(recycled)
        assert process.poll() is None, "another process was ended"
        stop_process(record)
        assert process.wait() != 0
        assert not is_alive(record)
        stop_process(record)


def test_stop_process_ignoring_sigterm_is_killed() -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, APPLICATION], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        record = record_of(process.pid)
        stop_process(record, timeout=0.5)
        assert not is_alive(record)


@contextmanager
def answering(instance: str | None, body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if instance is not None:
                self.send_header(INSTANCE_HEADER, instance)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        yield server.server_port


@pytest.mark.parametrize(
    ("instance", "body", "expected"),
    [
        ("this", b"true", True),
        (None, b"true", False),  # somebody else's Prefect server
        ("another", b"true", False),
        ("this", b"<html>", False),
    ],
)
def test_answers_of_another_server_is_false(instance: str | None, body: bytes, expected: bool) -> None:
    with answering(instance, body) as port:
        assert answers(record_of(os.getpid(), port)) is expected


def test_answers_without_listener_is_false() -> None:
    assert not answers(record_of(os.getpid(), 9))
