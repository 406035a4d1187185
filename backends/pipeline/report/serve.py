"""A page that follows runs while they train: served on this machine, and made again when their files have changed."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from edm2_core.errors import InputError

HOST = "127.0.0.1"  # other machines cannot ask


class Live:
    """``make(version)`` is the page at that version, ``version()`` says which files are there; a page is made when
    it is asked for, and once for each version."""

    def __init__(self, make: Callable[[str], str], version: Callable[[], str]) -> None:
        self._make, self.version = make, version
        self._lock, self._made = threading.Lock(), ("", "")

    def page(self) -> str:
        """The page as the files are now. Raises InputError where they cannot be read."""
        with self._lock:
            version = self.version()
            if self._made[0] != version:
                self._made = version, self._make(version)
            return self._made[1]


def open_server(live: Live, port: int, /) -> ThreadingHTTPServer:
    """A server of the page at / and of its version at /version, to be run by ``serve_forever``. Port 0: any free one.

    Raises:
        InputError: the port is taken, or none.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                if self.path == "/":
                    self._answer(200, "text/html", live.page())
                elif self.path == "/version":
                    self._answer(200, "text/plain", live.version())
                else:
                    self._answer(404, "text/plain", "the page is at /")
            except InputError as error:
                self._answer(500, "text/plain", f"error: {error}")

        def _answer(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """The terminal stays quiet."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--http-port must be a free port, got {port}: choose another") from error
