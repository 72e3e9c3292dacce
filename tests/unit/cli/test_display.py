"""The display of a run's steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest

# A build that prints much, from several threads, while the live region is drawn as often as it can be.
BUSY = """
import threading
from prefect_mlprojects.cli.display import RunDisplay
from prefect_mlprojects.tasks.session import StepEvent
display = RunDisplay()
with display:
    assert display._live is not None
    stop = threading.Event()
    def draw():
        while not stop.is_set():
            display._live and display._live.refresh()
    drawer = threading.Thread(target=draw, daemon=True)
    drawer.start()
    display.step(StepEvent("resolve-env", "started"))
    def build():
        for number in range(30):
            display.step(StepEvent("resolve-env", "progress", f"Warning: {number}"))
    builders = [threading.Thread(target=build, daemon=True) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    display.step(StepEvent("resolve-env", "finished", "done"))
    display.step(StepEvent("execute", "started"))
    stop.set()
    drawer.join()
    display.step(StepEvent("execute", "finished"))
"""


# A build that fails before the command starts.
FAILED = """
from prefect_mlprojects.cli.display import RunDisplay
from prefect_mlprojects.tasks.session import StepEvent
with RunDisplay() as display:
    display.step(StepEvent("fetch", "started"))
    display.step(StepEvent("fetch", "finished", "/project"))
    display.step(StepEvent("resolve-env", "started"))
    display.step(StepEvent("resolve-env", "failed", "The environment can't be built", output=("no such package",)))
"""


def on_a_terminal(program: str) -> str:
    """Runs a program with a terminal as its stderr; returns what it wrote there."""
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(controller, 65536):
                shown.append(data)
        except OSError:
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert process.wait(timeout=60) == 0, b"".join(shown).decode(errors="replace")[-2000:]
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        os.close(controller)
    return b"".join(shown).decode()


def test_drawing_and_printing_do_not_deadlock() -> None:
    text = on_a_terminal(BUSY)
    assert text.count("Warning: 29") >= 3
    assert "resolve-env" in text
    assert text.rstrip().rsplit("\n", 1)[-1].count("execute") == 1


def test_failed_step_stays_on_the_terminal() -> None:
    text = on_a_terminal(FAILED)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).rstrip().splitlines()[-2:]
    assert [line.split()[:2] for line in last] == [["✓", "fetch"], ["✗", "resolve-env"]]
    assert "no such package" in text
