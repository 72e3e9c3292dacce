"""How a handle shows its run."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from typing import Any

from prefect_mlprojects.runs.attached import AttachedSubmittedRun
from prefect_mlprojects.runs.presentation import RunView
from prefect_mlprojects.server.process import ServerAddress

HOSTILE = '<script>alert("1")</script>\x1b[2J\n& "quoted"'
ID = "2eb80103-33bd-4e85-abd0-af9e04f70df2"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name == "href"]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(view: RunView) -> _Tags:
    parser = _Tags()
    parser.feed(view.as_html())
    return parser


def test_html_has_status_values_and_links() -> None:
    view = RunView(ID, "FINISHED", "churn/main", parameters={"alpha": 0.5}, metrics={"rmse": 0.123456789})
    view = RunView(**{**view.__dict__, "url": "http://p/x", "run_id": "r1", "run_url": "http://m/y"})
    found = parsed(view)
    for words in ("FINISHED", "churn/main", "alpha = 0.5", "rmse = 0.123457", ID, "r1"):
        assert words in found.text
    assert found.links == ["http://p/x", "http://m/y"]
    assert view.as_text("X") == "<X churn/main FINISHED alpha=0.5 rmse=0.1235 http://p/x>"


def test_hostile_values_are_escaped() -> None:
    everywhere: dict[str, Any] = dict.fromkeys(("flow_run_id", "status", "name", "message", "run_id"), HOSTILE)
    view = RunView(**everywhere, parameters={HOSTILE: HOSTILE}, metrics={HOSTILE: 1.0}, url=f"javascript:{HOSTILE}")
    found = parsed(view)
    assert "script" not in found.tags
    assert found.links == []
    assert "alert" in found.text


def test_text_is_one_line_without_control_characters() -> None:
    text = RunView(ID, "RUNNING", "a/b", parameters={"x": HOSTILE}).as_text("X")
    assert text.isprintable()


def test_many_values_are_counted() -> None:
    view = RunView(ID, "FINISHED", parameters={f"p{number}": "v" * 1000 for number in range(500)})
    assert "and 480 more" in view.as_html()
    assert len(view.as_html()) < 20_000


def test_secrets_in_urls_are_redacted() -> None:
    view = RunView(ID, "FAILED", message="https://u:s3cret@h/x", parameters={"u": "https://u:s3cret@h/x"})
    assert "s3cret" not in view.as_html() + view.as_text("X")


def attached_to(api_url: str) -> AttachedSubmittedRun:
    handle = AttachedSubmittedRun.__new__(AttachedSubmittedRun)
    handle._flow_run_id, handle._url, handle._id = ID, None, ID  # type: ignore[assignment]
    handle._api = ServerAddress(api_url, None)
    return handle


def test_server_that_is_gone_does_not_raise(unused_port: int) -> None:
    handle = attached_to(f"http://127.0.0.1:{unused_port}/api")
    assert ID in repr(handle)
    assert "can&#x27;t be reached" in handle._repr_html_()


def test_server_that_hangs_is_not_waited_for() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        handle = attached_to(f"http://127.0.0.1:{listener.getsockname()[1]}/api")
        started = time.monotonic()
        assert "status unknown" in repr(handle)
        assert time.monotonic() - started < 10


def test_import_does_not_import_ipython() -> None:
    code = "import sys, prefect_mlprojects.runs.attached; print('IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
