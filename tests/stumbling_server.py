"""A real HTTP server that stumbles, or is away, when a test says so."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path


class Stumbling(http.server.SimpleHTTPRequestHandler):
    """Gives files, and parts of them; fails as often as `failures` says for a path.

    While `down` is a status it answers everything so, after the first `gives` requests.
    """

    failures: dict[str, tuple[int, int]]  # path to how often, and with which status
    requests: list[str]
    gives_parts = True
    down = 0
    gives = 0

    def do_GET(self) -> None:
        self.answer(super().do_GET)

    def do_HEAD(self) -> None:
        self.answer(super().do_HEAD)

    def answer(self, plainly: Callable[[], None]) -> None:
        self.requests.append(f"{self.command} {self.path}")
        times, status = self.failures.get(self.path, (0, 0))
        if self.down and len(self.requests) > self.gives:
            self.send_error(self.down)
        elif times:
            self.failures[self.path] = times - 1, status
            self.send_error(status)
        elif self.gives_parts and self.headers["Range"]:
            self.give_part()
        else:
            plainly()

    def give_part(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Stumbling]]]:
    """The URL that gives a folder, and the handler, to make it stumble."""
    handler = type("Handler", (Stumbling,), {"failures": {}, "requests": []})
    make_handler = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()
