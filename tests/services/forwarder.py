"""A TCP port in front of a Unix socket, whose connections can be broken."""

from __future__ import annotations

import contextlib
import socket
import threading


class Forwarder:
    """Passes on connections to a Unix socket until it is told to break them.

    Args:
        target: The path of the socket.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def break_connections(self) -> int:
        """Breaks all that are open, and returns how many those were."""
        broken = list(self._open)
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        return len(broken) // 2

    def close(self) -> None:
        self._listener.close()
        self.break_connections()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(self._target)
                self._open |= {client, engine}
                for source, target in ((client, engine), (engine, client)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
        self._open.discard(source)
