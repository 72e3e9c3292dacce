"""A package index of one tiny package behind basic authentication."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "tinything"
_WHEEL = f"{PACKAGE}-1.0-py3-none-any.whl"


def _wheel() -> bytes:
    content, info = io.BytesIO(), f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr(f"{PACKAGE}.py", "VALUE = 'tiny'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return content.getvalue()


@contextmanager
def package_index(user: str, password: str) -> Iterator[str]:
    """Serves the package as `tinything` to one user; yields HOST:PORT, whose index is at ``/simple``."""
    expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    pages = {
        f"/simple/{PACKAGE}/": ("text/html", f'<a href="/files/{_WHEEL}">{_WHEEL}</a>'.encode()),
        f"/files/{_WHEEL}": ("application/octet-stream", _wheel()),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = pages.get(self.path)
            allowed = self.headers.get("Authorization") == expected
            self.send_response(401 if not allowed else 404 if found is None else 200)
            if not allowed:
                self.send_header("WWW-Authenticate", 'Basic realm="index"')
            kind, content = found if allowed and found is not None else ("text/plain", b"")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # uv asks for a wheel's size first

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
